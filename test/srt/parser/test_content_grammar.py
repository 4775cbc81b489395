"""Grammars of answers whose content has a form: thinking may come before it, calls in place of it."""

import json
import random
from typing import Any

import pytest
from byte_tokens import END, ByteTokens, allowed_tokens, num_taken
from recorded_answers import JSON_ARGUMENTS, TOOLS

from rtp_llm.srt.parser.chat_parser import ChatParser
from rtp_llm.srt.parser.choose import choose_format
from rtp_llm.srt.parser.content_grammar import content_grammar
from rtp_llm.srt.parser.events import Arguments, CallBegin
from rtp_llm.srt.parser.formats import Format
from rtp_llm.srt.parser.rules import CannotWrite
from rtp_llm.srt.parser.schemas import ToolSchemas
from rtp_llm.srt.parser.tables import TOOL_CALL_PARSERS

OF_NUMBER = "start: /[0-9]{1,3}/"
PLAIN = ByteTokens()
NUMBERS = {
    "type": "object",
    "properties": {"number": {"enum": [12, 345]}},
    "required": ["number"],
    "additionalProperties": False,
}
NUMBER_TOOLS = [{"type": "function", "function": {"name": "give_number", "parameters": NUMBERS}}]
WITH_FREE_TEXT = {"openai", "gpt-oss"}  # thinking, which a random walk does not end
by_parser = pytest.mark.parametrize("parser", sorted(set(TOOL_CALL_PARSERS) - {"none"} - WITH_FREE_TEXT))


def whole(form: Format, tools: list[Any], **options: Any) -> str:
    """Return the grammar with one for its content."""
    asked: dict[str, Any] = {"strict": frozenset({"give_number"}), "thinks": False, "is_single": True} | options
    around = content_grammar(form, tools, token_ids={}, **asked)
    parts = [{"name": "answer", "lark_grammar": around}, {"name": "content", "lark_grammar": OF_NUMBER}]
    return json.dumps({"grammars": parts})


def is_taken(grammar: str, text: str) -> bool:
    return num_taken(PLAIN, grammar, text) is None


def generated(grammar: str, draw: random.Random, most: int = 2000) -> str:
    matcher = PLAIN.matcher(grammar)
    taken: list[int] = []
    while not matcher.is_stopped() and not (matcher.is_accepting() and draw.random() < 0.3):
        allowed = [token for token in allowed_tokens(matcher) if token < END]
        token = draw.choice([token for token in allowed if token not in b" \n"] or allowed)  # space may go on for long
        assert matcher.consume_token(token) and len(taken) < most
        taken.append(token)
    return PLAIN.decode(taken)


@by_parser
def test_content_or_calls(parser: str) -> None:
    """Random walks under the mask give both, and nothing else."""
    form = choose_format("", parser, "none")
    draw = random.Random(parser)
    grammar = whole(form, NUMBER_TOOLS)
    assert is_taken(grammar, "12") and not is_taken(grammar, "1234") and not is_taken(grammar, "12 ")
    kinds = set()
    for _ in range(200):
        text = generated(grammar, draw)
        reader = ChatParser(form, ToolSchemas(NUMBER_TOOLS))
        events = [*reader.feed(text), *reader.finish()]
        names = [event.name for event in events if isinstance(event, CallBegin)]
        if names:
            assert names == ["give_number"], text
            arguments = "".join(event.text for event in events if isinstance(event, Arguments))
            assert json.loads(arguments)["number"] in (12, 345), text
        else:
            assert text.isdecimal(), text
        kinds.add(bool(names))
        if len(kinds) == 2:
            break
    assert kinds == {True, False}


@pytest.mark.parametrize(
    ("thinks", "text", "taken"),
    [(True, "Hm</think>\n\n12", True), (True, "12", False), (False, "12", True), (False, "<think>Hm</think>12", True)]
    + [(False, "Hm</think>12", False)],
)
def test_thinking_comes_first(thinks: bool, text: str, taken: bool) -> None:
    assert is_taken(whole(choose_format("", "hermes", "qwen3"), TOOLS, thinks=thinks), text) == taken


def test_content_alone() -> None:
    """Without tools, of a model that thinks."""
    for thinks in (True, False):
        grammar = whole(choose_format("", "none", "qwen3"), [], thinks=thinks)
        thought = "Hm 1</think>\n\n" if thinks else "<think>Hm 1</think>\n\n"
        assert is_taken(grammar, f"{thought}12") and is_taken(grammar, f"{thought.strip()}12")
        assert is_taken(grammar, "12") != thinks and not is_taken(grammar, f"{thought}12</think>12")
    grammar = whole(choose_format("", "openai", "openai_gptoss"), [])
    final, thought = "<|channel|>final<|message|>12", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
    assert is_taken(grammar, final) and is_taken(grammar, thought + final) and not is_taken(grammar, "12")


@pytest.mark.parametrize("is_single", [True, False])
def test_how_many_calls_and_whose_arguments(is_single: bool) -> None:
    form = choose_format("", "hermes", "none")
    grammar = whole(form, [*TOOLS, *NUMBER_TOOLS], is_single=is_single)
    call = '<tool_call>\n{"name": "NAME", "arguments": {"number": 7}}\n</tool_call>'
    assert is_taken(grammar, call.replace("NAME", "now"))
    assert not is_taken(grammar, call.replace("NAME", "give_number"))  # is strict
    two = "\n".join([call.replace("NAME", "now")] * 2)
    assert is_taken(grammar, two) != is_single


def test_messages_with_headers() -> None:
    form = choose_format("", "openai", "openai_gptoss")
    final, thought = "<|channel|>final<|message|>12", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
    call = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{JSON_ARGUMENTS}"
    grammar = whole(form, TOOLS)
    assert is_taken(grammar, final) and is_taken(grammar, thought + final) and not is_taken(grammar, "12")
    assert is_taken(grammar, call) and is_taken(grammar, thought + call)


def test_tools_without_a_grammar() -> None:
    with pytest.raises(CannotWrite, match="not known"):
        whole(choose_format("", "none", "none"), TOOLS)
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a+"}}}
    function = {"name": "give_number", "parameters": schema}
    with pytest.raises(CannotWrite, match="give_number"):
        whole(choose_format("", "gemma4", "gemma4"), [{"function": function}])
