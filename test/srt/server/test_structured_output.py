"""Structured output over HTTP: what a grammar allows and nothing else, on every route, with every other option."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from rtp_llm.srt.managers import tokenizer_manager
from tiny_server import InProcess

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "dog"]},
        "tame": {"type": "boolean"},
    },
    "required": ["name", "age", "kind", "tame"],
    "additionalProperties": False,
}
OF_PERSON = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
OF_ADDRESS = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "format": "idn-email"}}}
FREE = {"temperature": 1.0, "seed": 7}


def post(server: InProcess, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def completed(server: InProcess, max_tokens: int = 300, **options: Any) -> dict[str, Any]:
    body = {"prompt": "the cat", "max_tokens": max_tokens} | FREE | options
    answer = post(server, "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def choice(server: InProcess, **options: Any) -> dict[str, Any]:
    return completed(server, **options)["choices"][0]


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == list(PERSON["properties"])
        and len(person["name"]) <= 8
        and 0 <= person["age"] <= 130
        and person["kind"] in ("cat", "dog")
        and isinstance(person["tame"], bool)
    )


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "response_format": ({"response_format": OF_PERSON}, is_person),
    "structured_outputs.json": ({"structured_outputs": {"json": PERSON}}, is_person),
    "json_schema": ({"json_schema": json.dumps(PERSON)}, is_person),
    "compact": (
        {"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}},
        lambda text: is_person(text) and re.match(r'\{"name":"', text),
    ),
    "json_object": ({"response_format": {"type": "json_object", "schema": PERSON}}, is_person),
    "format of any text": (
        {"json_schema": {"type": "string", "format": "password", "maxLength": 3}},
        lambda text: len(json.loads(text)) <= 3,
    ),
    "regex": ({"regex": "[ab]{3,5}c"}, re.compile("[ab]{3,5}c").fullmatch),
    "structured_outputs.regex": ({"structured_outputs": {"regex": "x|y"}}, re.compile("x|y").fullmatch),
    "choice": ({"structured_outputs": {"choice": ["the dog", "a tree"]}}, ["the dog", "a tree"].__contains__),
    "ebnf": ({"ebnf": 'root ::= ("ab" | "cd") "e"'}, ["abe", "cde"].__contains__),
    "grammar": ({"grammar": 'root ::= "a"{5,5}'}, "aaaaa".__eq__),
    "grammar in Lark": ({"structured_outputs": {"grammar": 'start: "ab" "e"?'}}, ["ab", "abe"].__contains__),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_text_is_what_the_grammar_allows(server: InProcess, form: str) -> None:
    grammar, is_right = FORMS[form]
    for seed in range(4):
        found = choice(server, seed=seed, **grammar)
        assert found["finish_reason"] == "stop" and is_right(found["text"]), found


def test_any_object(server: InProcess) -> None:
    form = {"response_format": {"type": "json_object"}}
    found = [choice(server, seed=seed, **form) for seed in range(6)]
    ended = [each["text"] for each in found if each["finish_reason"] == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)
    assert all(each["text"].startswith("{") for each in found)


def test_free_text_with_tags(server: InProcess) -> None:
    tag = {"structures": [{"begin": "<f>", "schema": {"enum": [12]}, "end": "</f>"}], "triggers": ["<f"]}
    text = choice(server, structural_tag=tag, max_tokens=40)["text"]
    assert all(piece.startswith("12</f>") for piece in text.split("<f>")[1:])


def test_all_routes_and_streams_agree(server: InProcess) -> None:
    text = choice(server, response_format=OF_PERSON)["text"]
    params = FREE | {"max_new_tokens": 300, "response_format": OF_PERSON}
    native = post(server, "/generate", {"text": "the cat", "sampling_params": params}).json()
    assert native["text"] == text and native["meta_info"]["finish_reason"] == {"type": "stop", "matched": None}
    body = {"prompt": "the cat", "max_tokens": 300, "response_format": OF_PERSON, "stream": True} | FREE
    lines = post(server, "/v1/completions", body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == text
    chat = {"messages": [{"role": "user", "content": "hi"}], "response_format": OF_PERSON, "max_tokens": 300} | FREE
    assert is_person(post(server, "/v1/chat/completions", chat).json()["choices"][0]["message"]["content"])


def test_with_other_options(server: InProcess) -> None:
    several = completed(server, n=3, response_format=OF_PERSON)["choices"]
    assert all(is_person(each["text"]) for each in several) and len({each["text"] for each in several}) == 3
    assert several[0]["text"] == choice(server, response_format=OF_PERSON)["text"]
    penalised = choice(server, response_format=OF_PERSON, frequency_penalty=2.0, repetition_penalty=1.5)
    assert is_person(penalised["text"])
    greedy = choice(server, response_format=OF_PERSON, temperature=0)
    assert is_person(greedy["text"])
    cut = choice(server, response_format=OF_PERSON, max_tokens=5)
    assert cut["finish_reason"] == "length" and several[0]["text"].startswith(cut["text"])
    stopped = choice(server, response_format=OF_PERSON, stop='"age"')
    assert stopped["finish_reason"] == "stop" and stopped["text"] == several[0]["text"].partition('"age"')[0]


def test_the_end_comes_where_the_grammar_may_end(server: InProcess) -> None:
    for seed in range(5):
        found = choice(server, regex="(ab)*", seed=seed, max_tokens=60)
        assert re.fullmatch("(ab)*", found["text"]) or found["finish_reason"] == "length"
    long = choice(server, regex="(ab)*", min_tokens=20, max_tokens=60)
    assert len(long["text"]) >= 20 and re.match("(ab)*a?$", long["text"])
    endless = choice(server, regex="(ab)*", ignore_eos=True, max_tokens=30)
    assert endless["finish_reason"] == "length" and re.match("(ab)*a?$", endless["text"])
    assert choice(server, regex="abc", ignore_eos=True)["finish_reason"] == "stop"


def test_logprobs_are_those_of_free_text(server: InProcess) -> None:
    answer = choice(server, regex="[ab]{4}", logprobs=3)
    told = answer["logprobs"]
    assert all(value < 0 for value in told["token_logprobs"])
    best = [max(top, key=top.__getitem__) for top in told["top_logprobs"]]
    assert any(set(token) - set("ab") for token in best)  # the model would have gone on otherwise


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "keyword": ({"json_schema": {"not": {}}}, "json_schema", "cannot be enforced: not"),
    "several keywords": ({"json_schema": {"uniqueItems": True, "type": "array"}}, "json_schema", "uniqueItems"),
    "format": ({"response_format": OF_ADDRESS}, "response_format", "idn-email"),
    "no JSON": ({"json_schema": "{"}, "json_schema", "not JSON"),
    "nothing matches": ({"json_schema": {"enum": []}}, "json_schema", "Unsatisfiable"),
    "itself": ({"json_schema": {"$ref": "#"}}, "json_schema", "no text matches"),
    "elsewhere": ({"json_schema": {"$ref": "http://x/y"}}, "json_schema", "http://x/y"),
    "regex": ({"regex": "("}, "regex", "regex parse error"),
    "alternatives": ({"json_schema": {"oneOf": [{"enum": [3]}, {"type": "integer"}]}}, "json_schema", "give anyOf"),
    "older field": ({"guided_regex": "a"}, "guided_regex", 'structured_outputs: {"regex"'),
    "look-ahead": ({"regex": "a(?=b)"}, "regex", "look-around"),
    "grammar": ({"ebnf": "nonsense"}, "ebnf", "Expected ::="),
    "two": ({"regex": "a", "ebnf": "b"}, "ebnf", "two grammars"),
    "kind": ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
    "no object": ({"response_format": {"type": "json_object", "schema": 123}}, "response_format", "must be an object"),
    "no type": ({"response_format": {"type": "json_object", "schema": {"type": "x"}}}, "response_format", "type"),
    "passed over": ({"response_format": {"type": "json_object", "schem": {}}}, "response_format", "no field 'schem'"),
    "schema elsewhere": ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format", "no field"),
    "other name": ({"grammar": "nonsense"}, "grammar", "Expected ::="),
    "two names": ({"grammar": "a", "ebnf": "b"}, "grammar", "names of one field"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
    "no field": ({"structured_outputs": {"xml": 1}}, "structured_outputs", "no field 'xml'"),
    "none of them": ({"structured_outputs": {"json": None}}, "structured_outputs", "must have one of"),
    "no texts": ({"structured_outputs": {"choice": []}}, "structured_outputs", "list of strings"),
    "tag": ({"structural_tag": {"structures": []}}, "structural_tag", "structures"),
    "other tag": ({"structural_tag": {"format": {"type": "any_text"}}}, "structural_tag", "with 'format'"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_honoured_is_refused_by_name(server: InProcess, case: str, stream: bool) -> None:
    grammar, param, words = WRONG[case]
    answer = post(server, "/v1/completions", {"prompt": "a", "stream": stream} | grammar)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"], error


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


HOSTILE: dict[str, dict[str, Any]] = {
    "deep schema": {"json_schema": nested(10_000)},
    "deep expression": {"regex": "(" * 10_000 + "a" + ")" * 10_000},
    "repeated expression": {"regex": "((a{1000}){1000}){1000}"},
    "large enum": {"json_schema": json.dumps({"enum": [f"text {i}" for i in range(350_000)]})},
    "deep grammar": {"ebnf": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "products": {
        "json_schema": {"allOf": [{"anyOf": [{"required": [f"{i}-{j}"]} for j in range(9)]} for i in range(9)]}
    },
    "mutual references": {
        "json_schema": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    },
}


def test_hostile_grammars_cost_their_own_request_alone(server: InProcess) -> None:
    expected = choice(server, response_format=OF_PERSON, seed=3)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(choice, server, response_format=OF_PERSON, seed=3) for _ in range(3)]
        for name, grammar in HOSTILE.items():
            answer = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 30} | grammar)
            assert answer.status_code in (400, 413), (name, answer.status_code, answer.text[:300])
        assert [other.result() for other in others] == [expected] * 3


def test_an_aborted_request_leaves_nothing(server: InProcess) -> None:
    body = {"prompt": "a", "regex": "[a-z ]+", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 30
    while server.core.client.num_live or not server.core.core.scheduler.idle:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not server.core.core.grammars.matchers and not len(server.core.core.grammars)


def test_grammars_are_checked_beside_the_event_loop(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    real = tokenizer_manager.checked_grammar

    def noting(*args: Any) -> Any:
        threads.add(threading.current_thread().name)
        return real(*args)

    monkeypatch.setattr(tokenizer_manager, "checked_grammar", noting)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "regex": "ab"}
    for path, body in (
        ("/v1/completions", {"prompt": "a", "regex": "ab"}),
        ("/v1/chat/completions", chat),
        ("/generate", {"text": "a", "sampling_params": {"regex": "ab"}}),
        ("/generate", {"text": ["a", "b"], "sampling_params": [{}, {"regex": "ab"}]}),
    ):
        assert post(server, path, body).status_code == 200
        assert threads and all(name.startswith("rtp-llm-text") for name in threads), (path, threads)
        threads.clear()
