"""Grammars of answers that think and then are of a form."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from rtp_llm.srt.parser.choose import choose_format
from rtp_llm.srt.parser.form_grammar import form_after_thinking
from rtp_llm.srt.request_spec import GrammarSpec

BYTES = LLTokenizer("byte")
NUMBERS = {
    "type": "object",
    "properties": {"number": {"enum": [12, 345]}, "more": {"type": "boolean"}},
    "required": ["number"],
    "additionalProperties": False,
}
JSON_FORM = GrammarSpec("json_schema", json.dumps(NUMBERS))
CHOICE = GrammarSpec("choice", json.dumps(["é\n", '<think>"']))


def is_taken(grammar: str | None, text: str) -> bool:
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.is_error(), (matcher.get_error(), grammar)
    ids = list(text.encode())
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("spec", "content", "taken"),
    [
        (JSON_FORM, '{"number": 12}', True),
        (JSON_FORM, '{ "number":345, "more": true }', True),
        (JSON_FORM, '{"number": 13}', False),
        (GrammarSpec("json_schema", JSON_FORM.text, ""), '{"number": 12}', False),
        (GrammarSpec("json_schema", JSON_FORM.text, ""), '{"number":12}', True),
        (GrammarSpec("json_schema", json.dumps({**NUMBERS, "x-guidance": {"lenient": True}})), '{"number": 12}', True),
        (CHOICE, "é\n", True),
        (CHOICE, '<think>"', True),
        (CHOICE, "e", False),
    ],
)
def test_a_form_after_thinking(spec: GrammarSpec, content: str, taken: bool) -> None:
    tags = form_after_thinking(choose_format("", "none", "qwen3"), spec, {})
    for thinking in ("Hm {</think>", "</think>\n\n"):
        assert is_taken(tags, thinking + content) == taken
    assert not is_taken(tags, content) and not is_taken(tags, f"</think>{content}more")
    headers = form_after_thinking(choose_format("", "openai", "openai_gptoss"), spec, {})
    final = f"<|channel|>final<|message|>{content}"
    assert is_taken(headers, final) == is_taken(
        headers, f"<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{final}"
    )
    assert is_taken(headers, final) == taken and not is_taken(headers, content)


def test_forms_that_are_no_part_of_a_grammar() -> None:
    for spec in (GrammarSpec("grammar", 'start: "a"'), GrammarSpec("regex", "a"), GrammarSpec("structural_tag", "{}")):
        assert form_after_thinking(choose_format("", "none", "qwen3"), spec, {}) is None
