"""xgrammar as the compiler: what it takes, what is refused by name, and that its masks are right."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokens import byte_tokenizer

from rtp_llm.srt.configs import grammar_backends
from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.constrained.backend import GrammarError, Matcher
from rtp_llm.srt.constrained.check import checked_grammar
from rtp_llm.srt.constrained.xgrammar_schema import is_taken, kept_schema
from rtp_llm.srt.entrypoints.engine import Engine
from rtp_llm.srt.request_spec import GrammarSpec
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams
from tiny_server import make_checkpoint

REFUSED: list[tuple[Any, str]] = [
    ({"not": {}}, "not without type"),
    ({"type": "string", "pattern": "a"}, "pattern beside type"),
    ({"type": "string", "format": "date"}, "format"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "object", "properties": {"a": {"multipleOf": 3}}}, "multipleOf"),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "null"}}, "additionalProperties"),
    ({"type": "object", "required": ["a"]}, "required of 'a'"),
    ({"anyOf": [{}], "type": "string"}, "type beside anyOf"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"minimum": 1}}}, "minimum"),
    ({"$ref": "other.json"}, r"\$ref to 'other.json'"),
    ({"enum": ["a", 1], "type": "string"}, "type beside the value 1"),
    ({"enum": [True], "type": "integer"}, "type beside the value true"),
    ({"type": "string", "maxLength": 100_000}, "maxLength is 100000"),
    (False, "false"),
]


@pytest.mark.parametrize(("schema", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_it_would_not_keep_is_refused_by_name(schema: Any, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        kept_schema(GrammarSpec("json_schema", json.dumps(schema)))


def test_refusals_come_before_the_core() -> None:
    params = SamplingParams(json_schema={"type": "array", "uniqueItems": True, "items": {"type": "integer"}})
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        checked_grammar(params, object())  # llguidance refuses it, too
    params = SamplingParams(json_schema={"type": "string", "pattern": "a+"})
    assert checked_grammar(params, object()) is not None
    with pytest.raises(InvalidRequest, match="xgrammar does not enforce: pattern") as caught:
        checked_grammar(params, object(), backend="xgrammar")
    assert caught.value.param == "json_schema"
    assert checked_grammar(params, object(), around="start: @content", backend="xgrammar") is not None


def test_what_it_takes() -> None:
    schema = GrammarSpec("json_schema", "{}")
    assert is_taken(schema) and is_taken(GrammarSpec("choice", '["a"]'))
    assert is_taken(GrammarSpec("grammar", 'root ::= "a"')) and not is_taken(GrammarSpec("grammar", 'start: "a"'))
    assert not is_taken(GrammarSpec("regex", "a")) and not is_taken(
        GrammarSpec("json_schema", "{}", around="start: @content")
    )


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_backends, "find_spec", lambda name: None)
    with pytest.raises(ServerArgsError, match=r"pip install 'rtp-llm\[xgrammar\]'"):
        ServerArgs(grammar_backend="xgrammar")


@pytest.fixture(scope="module")
def backend() -> Any:
    pytest.importorskip("xgrammar")
    from rtp_llm.srt.constrained.xgrammar_backend import XGrammarBackend

    return XGrammarBackend(byte_tokenizer(), 257, forces_tokens=True)


def allowed(backend: Any, *matchers: Matcher) -> list[set[int]]:
    words = np.empty((len(matchers), 9), dtype=np.int32)
    backend.fill(matchers, words)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def after(backend: Any, spec: GrammarSpec, text: str, ends: list[int]) -> Matcher:
    matcher: Matcher = backend.compile(spec, ends)
    for byte in text.encode():
        assert matcher.accept(byte), (text, matcher.error)
    return matcher


@pytest.mark.parametrize("ends", [[256], []], ids=str)
def test_masks_and_ends(backend: Any, ends: list[int]) -> None:
    choice = GrammarSpec("choice", json.dumps(["ab", "abc", 'é"\\']))
    gbnf, regex = GrammarSpec("grammar", 'root ::= "a" "b"*'), GrammarSpec("regex", "a[bc]")
    matchers = [after(backend, choice, "ab", ends), after(backend, regex, "a", ends), after(backend, gbnf, "a", ends)]
    letters = [set(b"c"), set(b"bc"), set(b"b")]
    assert allowed(backend, *matchers) == [letters[0] | set(ends), letters[1], letters[2] | set(ends)]
    assert allowed(backend, matchers[2]) == [letters[2] | set(ends)] and not matchers[2].is_complete
    copy = matchers[0].fork()
    assert copy.accept(ord("c")) and copy.is_complete and not matchers[0].is_complete
    assert not copy.accept(ord("d")) and "does not allow" in copy.error and copy.fork().error
    assert len(allowed(backend, copy)[0]) > 250  # after an error, all
    whole = after(backend, choice, 'é"\\', ends)
    assert whole.is_complete and allowed(backend, whole) == [set(ends)] and whole.forced_tokens() == []
    assert after(backend, choice, "", ends).forced_tokens() == [] and after(backend, regex, "ab", ends).is_complete
    assert after(backend, GrammarSpec("choice", '["abc"]'), "a", ends).forced_tokens() == [*b"bc"]


@pytest.mark.parametrize(
    ("schema", "space", "texts", "wrong"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, None, ['{"a": 1}', "{}"], ['{"b": 1}']),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, "", ['{"a":[1]}'], ['{"a": 1}', "{}"]),
        ({"type": "object"}, None, ['{"b": {"c": null}}'], ["[]"]),
        ({"type": "string", "enum": ["a", "b"]}, None, ['"a"'], ['"c"']),
        ({"type": "number", "minimum": 0.5}, None, ["0.5", "7"], ["0.4", "-1"]),
    ],
)
def test_schemas(backend: Any, schema: Any, space: str | None, texts: list[str], wrong: list[str]) -> None:
    spec = GrammarSpec("json_schema", json.dumps(schema), space)
    for text in texts:
        assert 256 in allowed(backend, after(backend, spec, text, [256]))[0]
    for text in wrong:
        matcher = backend.compile(spec, [256])
        assert not all(matcher.accept(byte) for byte in [*text.encode(), 256]), text


def test_wrong_grammars(backend: Any) -> None:
    for spec in (GrammarSpec("grammar", "root ::= ("), GrammarSpec("json_schema", '{"type": "x"}')):
        with pytest.raises(GrammarError):
            backend.compile(spec, [256])


def test_answers_of_an_engine(tmp_path: Path) -> None:
    """The same as with llguidance where a form leaves no choice; and each kind of grammar in one batch."""
    pytest.importorskip("xgrammar")
    schema = {"type": "object", "properties": {"name": {"enum": ["a cat"]}}, "required": ["name"]}
    forms: list[dict[str, Any]] = [
        {"structured_outputs": {"json": schema, "disable_any_whitespace": True}},
        {"structured_outputs": {"choice": ["the dog"]}},
        {"ebnf": 'root ::= "the" " mat"'},
        {"regex": "[ab]{4}"},
        {},
    ]
    args = {"model_path": make_checkpoint(tmp_path), "device": "cpu", "max_total_tokens": 2048}
    engine = Engine(grammar_backend="xgrammar", **args)
    try:
        params = [{"max_new_tokens": 40, "temperature": 1.0, "seed": 5} | form for form in forms]
        texts = [result["text"] for result in engine.generate(["the cat"] * len(forms), params)]
        with pytest.raises(InvalidRequest, match="pattern"):
            engine.generate("the cat", {"json_schema": {"type": "string", "pattern": "a+"}})
    finally:
        engine.shutdown()
    assert texts[:3] == ['{"name":"a cat"}', "the dog", "the mat"] and set(texts[3]) <= set("ab") and len(texts[3]) == 4
