"""llama.cpp's endpoints over HTTP: what a scripted core says, and what a tiny model generates."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from recorded_answers import TOOLS
from scripted_core import SPECIAL, ScriptedCore, scripted_speaker

from tiny_server import InProcess, wait_for

FILLING = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"]
USER = {"role": "user", "content": "the weather"}
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
GREEDY = {"prompt": "the cat", "n_predict": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[InProcess, ScriptedCore]]:
    with scripted_speaker(tmp_path_factory.mktemp("spoken"), [*SPECIAL, *FILLING]) as running:
        yield running


@pytest.fixture
def core(running: tuple[InProcess, ScriptedCore]) -> ScriptedCore:
    running[1].prompts, running[1].grammars = [], []
    return running[1]


@pytest.fixture(scope="module")
def spoken(running: tuple[InProcess, ScriptedCore]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running[0].url, timeout=60) as connected:
        yield connected


@pytest.fixture(scope="module")
def tiny(server: InProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as connected:
        yield connected


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def streamed(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    response = client.post(path, json=body | {"stream": True})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.removesuffix("\n\n").split("\n\n")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_a_completion(tiny: httpx.Client) -> None:
    answer = post(tiny, "/completion", **GREEDY, return_tokens=True, seed=7)
    assert answer["content"] and len(answer["tokens"]) == answer["tokens_predicted"] == 6
    assert (answer["prompt"], answer["model"], answer["index"]) == ("the cat", "tiny", 0)
    assert (answer["stop"], answer["stop_type"], answer["stopping_word"], answer["truncated"]) == (
        True,
        "limit",
        "",
        False,
    )
    settings = answer["generation_settings"]
    assert (settings["n_predict"], settings["temperature"], settings["seed"]) == (6, 0, 7)
    timings = answer["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == answer["tokens_evaluated"] == 2
    assert timings["predicted_n"] == 6 and timings["prompt_ms"] > 0
    same = post(tiny, "/v1/completions", prompt="the cat", max_tokens=6, temperature=0, ignore_eos=True)
    assert same["choices"][0]["text"] == answer["content"]


def test_a_stream_is_the_whole_in_parts(tiny: httpx.Client) -> None:
    whole = post(tiny, "/completion", **GREEDY, return_tokens=True)
    *parts, last = streamed(tiny, "/completion", **GREEDY, return_tokens=True)
    assert not any(part["stop"] for part in parts) and last["stop"] and last["content"] == ""
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
    for name in ("stop_type", "prompt", "tokens_predicted", "tokens_evaluated"):
        assert last[name] == whole[name]


def test_why_a_completion_stops(tiny: httpx.Client, core: ScriptedCore, spoken: httpx.Client) -> None:
    whole = post(tiny, "/completion", **GREEDY)["content"]
    cut = post(tiny, "/completion", **GREEDY | {"stop": [whole[2:4]]})
    assert (cut["stop_type"], cut["stopping_word"], cut["content"]) == ("word", whole[2:4], whole[:2])
    full = post(tiny, "/completion", prompt=[5] * 508, n_predict=-1, temperature=0, ignore_eos=True)
    assert (full["stop_type"], full["truncated"], full["tokens_predicted"]) == ("limit", True, 4)
    core.texts = ["one\ntwo"]
    ended = post(spoken, "/completion", prompt="x")
    assert (ended["stop_type"], ended["has_new_line"], ended["content"]) == ("eos", True, "one\ntwo")
    assert core.prompts == ["x"]


def test_prompts_of_all_forms(tiny: httpx.Client) -> None:
    ids = post(tiny, "/tokenize", content="the cat")["tokens"]
    whole = post(tiny, "/completion", **GREEDY)
    for prompt in (ids, {"prompt_string": "the cat"}, [ids[0], " cat"], ["the", *ids[1:]]):
        assert post(tiny, "/completion", **GREEDY | {"prompt": prompt})["content"] == whole["content"], prompt
    several = post(
        tiny, "/completion", **GREEDY | {"prompt": ["the cat", ids, {"prompt_string": "the cat"}, [ids[0], " cat"]]}
    )
    assert [answer["index"] for answer in several] == [0, 1, 2, 3]
    assert {answer["content"] for answer in several} == {whole["content"]}
    assert len(post(tiny, "/completion", **GREEDY | {"prompt": ["the cat"]})) == 1
    assert len(post(tiny, "/completion", **GREEDY | {"n_cmpl": 2})) == 2


def test_probabilities(tiny: httpx.Client) -> None:
    asked = GREEDY | {"n_probs": 3}
    whole = post(tiny, "/completion", **asked, return_tokens=True)
    items = whole["completion_probabilities"]
    assert [item["id"] for item in items] == whole["tokens"]
    assert bytes(byte for item in items for byte in item["bytes"]).decode("utf-8", "replace") == whole["content"]
    for item in items:
        assert len(item["top_logprobs"]) == 3 and item["top_logprobs"][0]["id"] == item["id"]  # greedy
        assert item["logprob"] == item["top_logprobs"][0]["logprob"] <= 0
    *parts, last = streamed(tiny, "/completion", **asked)
    told = [item for part in parts for item in part["completion_probabilities"]]
    for item, alone in zip(items, told, strict=True):  # last digits depend on what is in the cache
        assert alone["logprob"] == pytest.approx(item["logprob"], abs=1e-4)
        assert {name: alone[name] for name in ("id", "token", "bytes")} == {
            name: item[name] for name in ("id", "token", "bytes")
        }
        assert [top["id"] for top in alone["top_logprobs"]] == [top["id"] for top in item["top_logprobs"]]
    assert "completion_probabilities" not in last


def test_biases(tiny: httpx.Client) -> None:
    whole = post(tiny, "/completion", **GREEDY, return_tokens=True)
    first = whole["tokens"][0]
    for bias in ([[first, False]], [[first, -100]], {str(first): -100}):
        answer = post(tiny, "/completion", **GREEDY, return_tokens=True, logit_bias=bias)
        assert first not in answer["tokens"]
    dog = post(tiny, "/tokenize", content=" dog")["tokens"]
    for bias in ([[" dog", 100]], {" dog": 100}):
        answer = post(tiny, "/completion", **GREEDY, return_tokens=True, logit_bias=bias)
        assert set(answer["tokens"]) <= set(dog)


def test_forms_of_the_text(tiny: httpx.Client) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}
    assert set(json.loads(post(tiny, "/completion", prompt="x", json_schema=schema)["content"])) <= {1, 2}
    yes = post(tiny, "/completion", prompt="x", grammar='root ::= "yes" | "no"')
    assert yes["content"] in ("yes", "no") and yes["stop_type"] == "eos"
    assert "grammar" in refused(tiny, "/completion", prompt="x", grammar="root ::= nothing")["message"]


def test_fields_of_the_answer(tiny: httpx.Client) -> None:
    names = ["content", "generation_settings/n_predict", "timings/predicted_n", "nothing", "content/nothing"]
    answer = post(tiny, "/completion", **GREEDY, response_fields=names)
    assert set(answer) == set(names[:3]) and answer["generation_settings/n_predict"] == 6
    *parts, last = streamed(tiny, "/completion", **GREEDY, response_fields=names)
    assert set(last) == {"stop", *names[:3]} and "tokens" in parts[0]


def test_a_prompt_that_is_not_cached(tiny: httpx.Client) -> None:
    asked = {"prompt": "the cat sat on the mat " * 20, "n_predict": 1}
    post(tiny, "/completion", **asked)
    assert post(tiny, "/completion", **asked)["tokens_cached"] > 0
    assert post(tiny, "/completion", **asked, cache_prompt=False)["tokens_cached"] == 0


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("samplers", ["top_k"]),
        ("mirostat", 2),
        ("id_slot", 3),
        ("dry_multiplier", 0.8),
        ("n_indent", 4),
        ("t_max_predict_ms", 500),
        ("lora", [{"id": 0, "scale": 1.0}]),
        ("n_predict", -2),
        ("n_probs", 21),
        ("nonsense", 1),
        ("logit_bias", [[10**6, 1.0]]),
        ("prompt", []),
        ("prompt", [1, ["x"]]),
        ("multimodal_data", {"prompt_string": "x", "multimodal_data": ["x"]}),
        ("repeat_last_n", 64),
    ],
)
def test_what_is_refused(tiny: httpx.Client, param: str, value: Any) -> None:
    body = {"prompt": "x", "repeat_penalty": 1.1, "prompt" if param == "multimodal_data" else param: value}
    error = refused(tiny, "/completion", **body)
    assert param in error["message"] or error["param"] == param, error


def test_fields_at_their_defaults_ask_for_nothing(tiny: httpx.Client) -> None:
    neutral = {"mirostat": 0, "id_slot": -1, "dry_multiplier": 0.0, "typical_p": 1.0, "xtc_threshold": 0.1, "lora": []}
    plain = post(tiny, "/completion", **GREEDY)
    assert post(tiny, "/completion", **GREEDY, **neutral, repeat_last_n=64)["content"] == plain["content"]


def test_filling_in(core: ScriptedCore, spoken: httpx.Client) -> None:
    core.texts = ["a, b<|file_sep|>", "a"]
    asked = {
        "input_prefix": "def f",
        "prompt": "(",
        "input_suffix": "):\n",
        "input_extra": [{"filename": "x", "text": "y"}],
    }
    answer = post(spoken, "/infill", **asked, n_predict=100)
    assert core.prompts == [
        "<|file_sep|>x\ny<|file_sep|>filename\n<|fim_prefix|>def f(<|fim_suffix|>):\n<|fim_middle|>"
    ]
    assert answer["prompt"] == core.prompts[0]
    assert streamed(spoken, "/infill", **asked)[0]["content"] == "a"
    assert "text" in refused(spoken, "/infill", **asked | {"input_extra": [{"filename": "x"}]})["message"]
    assert refused(spoken, "/infill", input_prefix="x")["param"] == "input_suffix"
    assert "8192" not in refused(spoken, "/infill", **asked | {"n_predict": 10**6})["message"]


def test_a_model_that_cannot_fill_in(tiny: httpx.Client) -> None:
    error = refused(tiny, "/infill", input_prefix="a", input_suffix="b")
    assert error["code"] == "not_supported" and "no tokens for filling in" in error["message"]


def test_tokens_and_texts(tiny: httpx.Client) -> None:
    text = "größer 媽 🙂 the cat"
    whole = post(tiny, "/tokenize", content=text)
    assert post(tiny, "/detokenize", tokens=whole["tokens"])["content"] == text
    pieces = post(tiny, "/tokenize", content=text, with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == whole["tokens"]
    assert any(isinstance(piece["piece"], list) for piece in pieces)
    joined = b"".join(p.encode() if isinstance(p := piece["piece"], str) else bytes(p) for piece in pieces)
    assert joined.decode() == text
    assert whole["tokens"] == post(tiny, "/tokenize", content=text, add_special=True)["tokens"]  # it adds none
    special = post(tiny, "/tokenize", content="a<|end|>")["tokens"]
    spelled = post(tiny, "/tokenize", content="a<|end|>", parse_special=False)["tokens"]
    assert special[-1] == 0 and 0 not in spelled and len(spelled) > len(special)
    assert refused(tiny, "/tokenize", prompt=text, parse_special=False)["param"] == "parse_special"
    assert "content" in refused(tiny, "/tokenize", content=text, prompt=text)["message"]
    assert refused(tiny, "/tokenize", content=text, add_special=True, add_special_tokens=True)["param"] == "add_special"


def test_the_prompt_of_a_chat(core: ScriptedCore, spoken: httpx.Client) -> None:
    """Its text and its number of tokens are those that the same body gets answered."""
    core.texts = ["Hello"] * 3
    assert post(spoken, "/apply-template", messages=[USER]) == {"prompt": "<|user|>the weather<|end|><|assistant|>"}
    for more in ({}, {"tools": TOOLS}, {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 3}):
        body = {"messages": [USER], **more}
        answer = post(spoken, CHAT, **body)
        assert post(spoken, "/apply-template", **body)["prompt"] == core.prompts[-1]
        count = post(spoken, f"{CHAT}/input_tokens", **body)
        assert count == {"object": "response.input_tokens", "input_tokens": answer["usage"]["prompt_tokens"]}
        assert post(spoken, "/chat/completions/input_tokens", **body) == count
    assert refused(spoken, "/apply-template", messages=[])["param"] == "messages"


def test_the_tokens_of_a_response(core: ScriptedCore, spoken: httpx.Client) -> None:
    core.texts = ["Hello", "Again"]
    first = post(spoken, RESPONSES, input="the weather", instructions="Be kind.")
    body = {"input": "and now?", "previous_response_id": first["id"]}
    second = post(spoken, RESPONSES, **body)
    for path in (f"{RESPONSES}/input_tokens", "/responses/input_tokens"):
        assert post(spoken, path, **body)["input_tokens"] == second["usage"]["input_tokens"]
    assert refused(spoken, f"{RESPONSES}/input_tokens", **body | {"previous_response_id": "x"})["code"] == (
        "previous_response_not_found"
    )


def test_properties(spoken: httpx.Client, tiny: httpx.Client) -> None:
    properties = tiny.get("/props").json()
    slots = tiny.get("/slots").json()
    assert properties["total_slots"] == len(slots) > 0
    defaults = properties["default_generation_settings"]
    assert defaults["n_ctx"] == slots[0]["n_ctx"] == 512 and defaults["params"]["n_predict"] == -1
    assert (properties["model_alias"], properties["eos_token"]) == ("tiny", "<|end|>")
    assert "add_generation_prompt" in properties["chat_template"] and not properties["modalities"]["vision"]
    assert not properties["chat_template_caps"]["supports_tools"]
    assert spoken.get("/props").json()["chat_template_caps"]["supports_tools"]


def test_slots(core: ScriptedCore, spoken: httpx.Client) -> None:
    assert not any(slot["is_processing"] for slot in spoken.get("/slots?fail_on_no_slot=1").json())
    core.texts, core.holds = ["Hello world"] * 8, True
    try:
        with spoken.stream("POST", "/completion", json={"prompt": "x", "n_cmpl": 8, "stream": True, "top_k": 3}):
            wait_for(lambda: all(slot["is_processing"] for slot in spoken.get("/slots").json()))
            slot = spoken.get("/slots").json()[0]
            assert slot["params"]["top_k"] == 3 and slot["n_prompt_tokens"] == 1
            full = spoken.get("/slots?fail_on_no_slot=1")
            assert full.status_code == 503 and full.json()["error"]["code"] == "no_free_slot"
    finally:
        core.holds = False
    wait_for(lambda: not any(slot["is_processing"] for slot in spoken.get("/slots").json()))


def test_health(tiny: httpx.Client) -> None:
    assert tiny.get("/v1/health").json() == {"status": "ok"}
