"""Grammars of calls: they take recorded answers, and what they generate is read as calls."""

import json
import random
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from recorded_answers import ANSWERS, JSON_ARGUMENTS, TOOLS, Answer

from rtp_llm.srt.parser.chat_parser import ChatParser
from rtp_llm.srt.parser.choose import choose_format
from rtp_llm.srt.parser.demanded_grammar import demanded_grammar
from rtp_llm.srt.parser.events import Arguments, CallBegin
from rtp_llm.srt.parser.rules import CannotWrite
from rtp_llm.srt.parser.schemas import ToolSchemas
from rtp_llm.srt.parser.tables import TOOL_CALL_PARSERS

BYTES = LLTokenizer("byte")
NUMBERS = {
    "type": "object",
    "properties": {"number": {"enum": [12, 345]}, "more": {"type": "boolean"}},
    "required": ["number"],
    "additionalProperties": False,
}
NUMBER_TOOLS = [{"type": "function", "function": {"name": "give_number", "parameters": NUMBERS}}]
# Written as their templates do; the others have forms that only the reader forgives, or words before the call.
TAKEN = (
    "seed_oss",
    "llama3_json",
    "llama4_pythonic",
    "olmo3",
    "deepseek_v31",
    "deepseek_v4",
    "glm45",
    "hy_v3",
    "minicpm5",
    "granite",
    "granite4",
    "nemotron",
    "functionary",
    "longcat",
    "apertus",
    "minimax_m2",
)
WITH_FREE_TEXT = {"openai", "gpt-oss"}  # thinking, which a random walk does not end
by_parser = pytest.mark.parametrize("parser", sorted(set(TOOL_CALL_PARSERS) - {"none"} - WITH_FREE_TEXT))


def matcher_of(grammar: str) -> LLMatcher:
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.is_error(), (matcher.get_error(), grammar)
    return matcher


def is_taken(grammar: str, text: str) -> bool:
    matcher = matcher_of(grammar)
    ids = list(text.encode())
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("answer", [a for a in ANSWERS if a.name in TAKEN], ids=lambda answer: answer.name)
def test_recorded_answers_are_taken(answer: Answer) -> None:
    form = choose_format("", answer.tool_call_parser, answer.reasoning_parser)
    assert is_taken(demanded_grammar(form, TOOLS, {}, thinks=answer.thinks, is_single=False), answer.text)


@pytest.mark.parametrize(
    ("parameters", "taken", "refused"),
    [
        (None, ["{}"], ['{"a": 1}']),
        ({"type": "object", "properties": {}}, ["{}"], ['{"a": 1}']),
        ({"properties": {"a": {}, "b": {}}, "required": ["b"]}, ['{"a": 1, "b": 2}', '{"b": 1}'], ['{"b": 1, "c": 2}']),
        ({"properties": {"a": {}}, "additionalProperties": True}, ['{"c": 2}', "{}"], ["[]"]),
        ({"patternProperties": {"^x": {"type": "null"}}}, ['{"xy": null, "a": 2}'], ['{"xy": 1}']),
        ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, ['{"b": 1}'], ["{}"]),
        ({"required": ["a"]}, ['{"a": 1}'], ["{}"]),
        ({"properties": {"a": {"type": "string", "format": "password"}}}, ['{"a": "x"}'], ['{"a": 1}']),
        ({"properties": {"format": {"const": "path"}}, "required": ["format"]}, ['{"format": "path"}'], ["{}"]),
    ],
)
def test_arguments_that_no_schema_names(parameters: Any, taken: list[str], refused: list[str]) -> None:
    """There are none, unless the schema says more than what it names."""
    function = {"name": "f"} | ({} if parameters is None else {"parameters": parameters})
    tools = [{"type": "function", "function": function}]
    grammar = demanded_grammar(choose_format("", "hermes"), tools, {}, thinks=False, is_single=True)
    for arguments in (*taken, *refused):
        text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
        assert is_taken(grammar, text) == (arguments in taken), arguments


@by_parser
def test_what_is_generated_is_a_call(parser: str) -> None:
    """Random walks under the mask."""
    form = choose_format("", parser, "none")
    draw = random.Random(parser)
    grammar = demanded_grammar(form, NUMBER_TOOLS, {}, thinks=False, is_single=True)
    for _ in range(2):
        text = generated(grammar, draw)
        reader = ChatParser(form, ToolSchemas(NUMBER_TOOLS))
        events = [*reader.feed(text), *reader.finish()]
        assert [event.name for event in events if isinstance(event, CallBegin)] == ["give_number"], text
        arguments = json.loads("".join(event.text for event in events if isinstance(event, Arguments)))
        assert arguments["number"] in (12, 345) and set(arguments) <= {"number", "more"}, text


def generated(grammar: str, draw: random.Random, most: int = 2000) -> str:
    matcher = matcher_of(grammar)
    taken: list[int] = []
    while not matcher.is_stopped() and not (matcher.is_accepting() and draw.random() < 0.3):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = [int(i) for i in np.flatnonzero(bits) if i < 256]
        choices = [i for i in allowed if i not in b" \n"] or allowed  # space may go on for long
        token = draw.choice(choices)
        assert matcher.consume_token(token) and len(taken) < most
        taken.append(token)
    return bytes(taken).decode()


@pytest.mark.parametrize(
    ("thinks", "head", "taken"),
    [(True, "Hm</think>\n\n", True), (True, "", False), (False, "", True), (False, "<think>Hm</think>", True)]
    + [(False, "Hm</think>", False), (False, "I look.\n", False)],
)
def test_thinking_comes_first(thinks: bool, head: str, taken: bool) -> None:
    form = choose_format("", "hermes", "qwen3")
    text = f'{head}<tool_call>\n{{"name": "get_weather", "arguments": {JSON_ARGUMENTS}}}\n</tool_call>'
    assert is_taken(demanded_grammar(form, TOOLS, {}, thinks, is_single=True), text) == taken


def test_messages_with_headers() -> None:
    grammar = demanded_grammar(choose_format("", "openai", "openai_gptoss"), TOOLS, {}, False, True)
    call = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{JSON_ARGUMENTS}"
    assert is_taken(grammar, call) and not is_taken(grammar, "<|channel|>final<|message|>Ok")
    assert is_taken(grammar, f"<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{call}")


def test_how_many_calls() -> None:
    form = choose_format("", "hermes", "none")
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for is_single in (True, False):
        assert is_taken(demanded_grammar(form, TOOLS, {}, False, is_single), f"{call}\n{call}") != is_single


def test_formats_and_schemas_without_a_grammar() -> None:
    with pytest.raises(CannotWrite, match="not known"):
        demanded_grammar(choose_format("", "none", "none"), TOOLS, {}, False, True)
    gemma = choose_format("", "gemma4", "gemma4")
    for schema, words in (
        ({"pattern": "a+", "type": "string"}, "parameters of f: pattern"),
        ({"anyOf": [{"type": "string"}], "enum": ["a"]}, "anyOf with enum"),
        ({"oneOf": [{"type": "string"}]}, "oneOf"),
        ({"type": "date"}, "the type date"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        (False, "false"),
    ):
        function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
        with pytest.raises(CannotWrite, match=words):
            demanded_grammar(gemma, [{"function": function}], {}, False, True)


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "deepseek_v32", "minicpm5"])
def test_strings_without_quotes(name: str) -> None:
    """What a grammar allows is what the reader then finds."""
    properties: dict[str, Any] = {
        "unit": {"enum": ["C", "F"]},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "places": {"type": "array", "items": {"enum": ["x"]}, "minItems": 1, "maxItems": 2},
    }
    parameters = {"type": "object", "properties": properties, "required": ["unit", "places"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    form = choose_format("", name, "none")
    del properties["maybe"]  # free text, which a random walk does not end
    text = generated(demanded_grammar(form, tools, {}, False, True), random.Random(1))
    reader = ChatParser(form, ToolSchemas(tools))
    events = [*reader.feed(text), *reader.finish()]
    arguments = json.loads("".join(event.text for event in events if isinstance(event, Arguments)))
    assert arguments["unit"] in ("C", "F") and set(arguments["places"]) == {"x"}, text
    for schema in (
        {"type": "string", "pattern": "a"},
        {"enum": ["a", 1]},
        {"type": ["string", "null"], "minLength": 1},
    ):
        properties["more"] = schema
        with pytest.raises(CannotWrite, match="the parameters of f: strings with"):
            demanded_grammar(form, tools, {}, False, True)
    parameters["properties"] = {"maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]}}
    matcher_of(demanded_grammar(form, tools, {}, False, True))
    parameters["not"] = {}
    with pytest.raises(CannotWrite, match="the parameters of f: not"):
        demanded_grammar(form, tools, {}, False, True)


def test_strings_without_quotes_of_given_lengths() -> None:
    form = choose_format("", "qwen3_coder", "none")
    schema = {"type": "string", "minLength": 2, "maxLength": 3}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, "required": ["a"]}}
    grammar = demanded_grammar(form, [{"function": function}], {}, False, True)
    for text, taken in (("ab", True), ("abc", True), ("a", False), ("abcd", False), ("é\n", True)):
        call = f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"
        assert is_taken(grammar, call) == taken, text


def test_definitions_of_arguments_that_are_written_one_by_one() -> None:
    parameters = {
        "$defs": {"unit": {"enum": ["C", "F"], "type": "string"}, "tree": {"type": "object"}},
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"$ref": "#/$defs/unit"}, "at": {"$ref": "#/$defs/tree"}},
        "required": ["city", "unit"],
    }
    form = choose_format("", "glm45", "none")
    grammar = demanded_grammar(form, [{"function": {"name": "f", "parameters": parameters}}], {}, False, True)
    call = "<tool_call>f{}</tool_call>"
    pair = "<arg_key>{}</arg_key><arg_value>{}</arg_value>".format
    text = call.format(pair("city", "Paris") + pair("unit", "C") + pair("at", '{"a": 1}'))
    assert is_taken(grammar, text) and not is_taken(grammar, text.replace(">C<", ">K<"))


@pytest.mark.parametrize(
    ("arguments", "taken"), [("a=1, b=True, c=2", True), ("a=1", True), ("b=false, c=2", True), ("c=2, b=true", False)]
)
def test_arguments_that_may_be_left_out(arguments: str, taken: bool) -> None:
    properties = {"a": {"type": "integer"}, "b": {"type": "boolean"}, "c": {"type": "integer"}}
    tools = [{"function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}]
    grammar = demanded_grammar(choose_format("", "pythonic", "none"), tools, {}, False, True)
    assert is_taken(grammar, f"[f({arguments})]") == taken


def test_values_with_bare_keys() -> None:
    places = {"type": "array", "items": {"type": "string"}}
    unit = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}, "deep": places}, "required": ["unit"]}
    function = {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": places, "b": unit}, "required": ["a", "b"]},
    }
    grammar = demanded_grammar(choose_format("", "gemma4", "none"), [{"function": function}], {}, False, True)
    text = '<|tool_call>call:f{a:[<|"|>x, y<|"|>,<|"|>z<|"|>],b:{unit:<|"|>C<|"|>,deep:[]}}<tool_call|>'
    assert is_taken(grammar, text) and not is_taken(grammar, text.replace("C", "K"))


def test_values_with_bare_keys_of_all_kinds() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    properties = {
        "n": {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}], "default": None},
        "l": {"type": "array", "items": {"const": "x"}, "minItems": 1, "maxItems": 2},
        "t": {"$ref": "#/$defs/node"},
        "w": {},
    }
    parameters = {"$defs": {"node": node}, "type": "object", "properties": properties, "required": ["n", "l", "w"]}
    tools = [{"function": {"name": "f", "parameters": parameters}}]
    grammar = demanded_grammar(choose_format("", "gemma4", "none"), tools, {}, False, True)
    x, whatever = '<|"|>x<|"|>', '{a:[1,null],b:<|"|>,}<|"|>}'
    for n, listed, tree, taken in (
        ("3", x, ",t:{next:{next:{}}}", True),
        ("null", f"{x},{x}", "", True),
        ("2", x, "", False),
        ("3", "", "", False),
        ("3", f"{x},{x},{x}", "", False),
        ("3", x, ",t:{last:{}}", False),
    ):
        text = f"<|tool_call>call:f{{n:{n},l:[{listed}]{tree},w:{whatever}}}<tool_call|>"
        assert is_taken(grammar, text) == taken, text


def test_special_tokens_are_named_by_their_ids() -> None:
    form = choose_format("", "hermes", "qwen3")
    ids: dict[str, Any] = {"<tool_call>": 300, "</tool_call>": 301, "<think>": 302, "</think>": 303}
    grammar = demanded_grammar(form, TOOLS, ids, False, True)
    assert all(f"<[{number}]>" in grammar and text not in grammar for text, number in ids.items())
