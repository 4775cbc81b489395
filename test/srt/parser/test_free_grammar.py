"""Grammars of free text in which calls obey schemas: text is free, and what the reader finds of calls is right."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from byte_tokens import END, ByteTokens, allowed_tokens, num_taken
from recorded_answers import ANSWERS, JSON_ARGUMENTS, TOOLS, Answer

from rtp_llm.srt.parser.chat_parser import ChatParser
from rtp_llm.srt.parser.choose import choose_format
from rtp_llm.srt.parser.events import Arguments, CallBegin, Event
from rtp_llm.srt.parser.formats import Format
from rtp_llm.srt.parser.free_grammar import free_grammar
from rtp_llm.srt.parser.rules import CannotWrite
from rtp_llm.srt.parser.schemas import ToolSchemas
from rtp_llm.srt.parser.tables import TOOL_CALL_PARSERS

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
PLAIN = ByteTokens()
HEADERS = ByteTokens(HARMONY)
SPACES = set(b" \n")
NAMES = frozenset({"get_weather", "now"})
NUMBERS = {
    "type": "object",
    "properties": {"number": {"enum": [12, 345]}, "more": {"type": "boolean"}},
    "required": ["number"],
    "additionalProperties": False,
}
NUMBER_TOOLS = [{"type": "function", "function": {"name": "give_number", "parameters": NUMBERS}}]
# What only the reader forgives, and JSON that a model may not begin an answer with but for a call.
FORGIVEN = {
    "arguments first",
    "arguments as text",
    "nested as in OpenAI's messages",
    "no arguments",
    "new line in a string",
    "missing bracket",
    "llama3_json with its tag",
    "llama3_json, JSON",
    "llama3_json, other",
    "pythonic, a list",
    "Python's values, and JSON's",
    "mistral",
    "mistral, former",
    "gemma4's values",
}
WRITTEN = [answer for answer in ANSWERS if answer.name not in FORGIVEN and answer.tool_call_parser != "none"]
by_parser = pytest.mark.parametrize("parser", sorted(set(TOOL_CALL_PARSERS) - {"none"}))


def tokens_of(form: Format) -> ByteTokens:
    return PLAIN if form.channels is None else HEADERS


def strict(form: Format, tokens: ByteTokens, **options: Any) -> str:
    asked: dict[str, Any] = {"tools": TOOLS, "strict": NAMES, "thinks": False, "is_single": False} | options
    return free_grammar(form, token_ids=tokens.ids, **asked)


def read(form: Format, text: str, tools: Sequence[Any] = TOOLS, thinks: bool = False) -> list[Event]:
    reader = ChatParser(form, ToolSchemas(tools), thinks)
    return [*reader.feed(text), *reader.finish()]


@pytest.mark.parametrize("answer", WRITTEN, ids=lambda answer: answer.name)
def test_recorded_answers_are_taken(answer: Answer) -> None:
    form = choose_format("", answer.tool_call_parser, answer.reasoning_parser)
    tokens = tokens_of(form)
    for names in (NAMES, frozenset[str]()):
        grammar = strict(form, tokens, strict=names, thinks=answer.thinks)
        if names and answer.name == "tag in a string":
            continue  # it has an argument that its function does not have
        if answer.name != "closing tag in a value" or names:
            assert num_taken(tokens, grammar, answer.text) is None


def openings(form: Format) -> list[str]:
    if form.channels is not None:
        return ["<|channel|>commentary to=", " to=", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant to="]
    assert form.calls is not None
    return [*("Hello <b>\n" + text for text in form.calls.triggers), *form.calls.triggers, *form.calls.bare]


@by_parser
def test_a_call_that_is_opened_is_a_right_one(parser: str) -> None:
    """Whatever the mask allows from there on."""
    form = choose_format("", parser, "none")
    tokens, draw = tokens_of(form), random.Random(parser)
    grammar = strict(form, tokens, tools=NUMBER_TOOLS, strict=frozenset({"give_number"}), is_single=True)
    for opening in openings(form):
        matcher, taken = tokens.matcher(grammar), tokens.encode(opening)
        assert matcher.consume_tokens(taken), opening
        assert END not in allowed_tokens(matcher), "an open call cannot end"
        while END not in (allowed := allowed_tokens(matcher)):
            taken.append(draw.choice([i for i in allowed if i not in SPACES] or allowed))
            assert matcher.consume_token(taken[-1]) and len(taken) < 1000
        text = tokens.decode(taken, ("<|constrain|>",) if form.channels else ())
        events = read(form, text, NUMBER_TOOLS)
        assert [event.name for event in events if isinstance(event, CallBegin)] == ["give_number"], text
        arguments = json.loads("".join(event.text for event in events if isinstance(event, Arguments)))
        assert arguments["number"] in (12, 345) and set(arguments) <= {"number", "more"}, text
        assert matcher.consume_tokens(tokens.encode(" and so on")), "text is free again"


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


RIGHT = call("get_weather", JSON_ARGUMENTS)
WRONG = call("get_weather", '{"days": 3}')


@pytest.mark.parametrize(
    ("text", "thinks", "taken"),
    [
        ('Text <b> with < and {"a": 1} and 🙂.\n', False, True),
        (f"<think>Hm</think>I look.\n{RIGHT}\n{RIGHT}", False, True),
        (f"Hm</think>I look.\n{RIGHT} So <tool_", True, True),
        (WRONG, False, False),
        (f"Hm {WRONG}", True, False),
        (f"{RIGHT} and {WRONG}", False, False),
        ("The tag is <tool_call>.", False, False),
        (call("other", "{}"), False, False),
        (RIGHT[:-3], False, False),
    ],
)
def test_text_is_free_and_calls_are_not(text: str, thinks: bool, taken: bool) -> None:
    grammar = strict(choose_format("", "hermes", "qwen3"), PLAIN, thinks=thinks)
    assert (num_taken(PLAIN, grammar, text) is None) == taken


@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder", "pythonic", "gemma4", "kimi_k2", "deepseek_v32"])
def test_tools_that_are_not_strict(parser: str) -> None:
    """Their names are right, and their arguments may be any, also of schemas that no grammar knows."""
    tools = [TOOLS[0], {"type": "function", "function": {"name": "any", "parameters": {"not": {"required": ["a"]}}}}]
    form = choose_format("", parser, "none")
    grammar = strict(form, PLAIN, tools=tools, strict=frozenset({"get_weather"}))
    matcher, draw = PLAIN.matcher(grammar), random.Random(7)
    assert form.calls is not None
    taken = PLAIN.encode((*form.calls.triggers, *form.calls.bare)[0])
    assert matcher.consume_tokens(taken)
    while END not in (allowed := allowed_tokens(matcher)):
        wanted = [i for i in allowed if i in set(b"any>}])")] or [i for i in allowed if i not in SPACES] or allowed
        taken.append(draw.choice(wanted))
        assert matcher.consume_token(taken[-1])
        if len(taken) > 600:
            break
    assert b"any" in bytes(taken) and b"get_weather" not in bytes(taken)


@pytest.mark.parametrize(
    ("names", "thinks", "text", "taken"),
    [
        (("granite", "granite"), False, f"Here is my thought process: {WRONG} Here is my response: Ok", True),
        (("hermes", "granite"), False, f"Here is my thought process: {WRONG} Here is my response: Ok {RIGHT}", True),
        (("hermes", "granite"), False, f"Ok. Here is my thought process: {WRONG}", False),
        (("hermes", "granite"), False, f" \nHere is my response: {WRONG}", False),
        (("hermes", "kimi"), True, f"{WRONG}◁/think▷{RIGHT}", True),
        (("hermes", "kimi"), True, f"{WRONG}◁/think▷{WRONG}", False),
        (("gemma4", "gemma4"), False, "So <|channel>thought\n<|tool_call>call:no<channel|> Ok", True),
        (("gemma4", "gemma4"), False, "So <|tool_call>call:no", False),
        (("llama3_json", "qwen3"), True, '{"a": 1}</think> So {"a": 1}', True),
        (("llama3_json", "qwen3"), True, 'Hm</think>\n{"a": 1}', False),
        (("llama3_json", "qwen3"), True, "Hm<|python_tag|>print()", False),
        (("llama3_json", "none"), False, 'It is {"a": 1}', True),
        (("llama3_json", "none"), False, ' \n{"a": 1}', False),
        (("llama3_json", "none"), False, '{"name": "now", "parameters": {}} ok {"a": 1}', True),
        (("llama3_json", "none"), False, '{"name": "now", "parameters": {}}\n{"a": 1}', False),
        (("llama3_json", "cohere_command3"), False, '<|START_RESPONSE|>{"a": 1}', False),
        (("pythonic", "none"), False, "See [1], and f(x).", True),
        (("pythonic", "none"), False, "[1]", False),
    ],
)
def test_thinking_and_beginnings(names: tuple[str, str], thinks: bool, text: str, taken: bool) -> None:
    """Calls are looked for where the reader looks for them."""
    grammar = strict(choose_format("", *names), PLAIN, thinks=thinks)
    assert (num_taken(PLAIN, grammar, text) is None) == taken


@pytest.mark.parametrize("parser", ["hermes", "granite", "olmo3"])
def test_one_call_at_most(parser: str) -> None:
    form = choose_format("", parser, "none")
    text = next(answer.text for answer in ANSWERS if answer.tool_call_parser == parser and len(answer.calls) == 2)
    assert form.calls is not None
    num = num_taken(PLAIN, strict(form, PLAIN, is_single=True), text)
    events = read(form, PLAIN.decode(PLAIN.encode(text)[:num]))
    assert sum(isinstance(event, CallBegin) for event in events) == 1


def test_special_tokens() -> None:
    """Those that open calls lead to them, all others may stand anywhere, but no tag is put together around one."""
    form = choose_format("", "qwen3_coder", "qwen3")
    tokens = ByteTokens(("<tool_call>", "</tool_call>", "<think>", "</think>", "<|other|>"))
    grammar = strict(form, tokens)
    good = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    assert num_taken(tokens, grammar, f"<think>Hm</think>a < b<|other|> {good} ok<|other|>") is None
    assert num_taken(tokens, grammar, "</tool_call><|other|>") is None
    assert num_taken(tokens, grammar, "<tool_call><|other|>") == 1
    assert num_taken(tokens, grammar, "<func<|other|>") == 5
    single = strict(form, tokens, is_single=True)
    assert num_taken(tokens, single, f"{good}<|other|> Ok") is None
    assert num_taken(tokens, single, f"{good}<tool_call>") == len(tokens.encode(good))


CALL = f"to=functions.get_weather <|constrain|>json<|message|>{JSON_ARGUMENTS}"


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (
            "<|channel|>analysis<|message|>to=5<|end|><|start|>assistant<|channel|>final<|message|>Ok<|return|>",
            True,
        ),
        (f"<|channel|>commentary {CALL}<|call|>", True),
        (f"<|channel|>commentary {CALL}<|call|><|start|>assistant<|channel|>commentary {CALL}", True),
        (f" {CALL.replace(' <', '<|channel|>commentary <')}", True),
        ("Hello", True),
        ("<|channel|>commentary to=browser.search<|message|>", False),
        ("<|channel|>commentary to=functions.get_weather<|message|>{}", False),
        ("<|channel|>commentary to=functions.get_weathers", False),
        ("<|channel|>commentary t<|constrain|>o=", False),
    ],
)
def test_messages_with_headers(text: str, taken: bool) -> None:
    form = choose_format("", "openai", "openai_gptoss")
    assert (num_taken(HEADERS, strict(form, HEADERS), text) is None) == taken


def test_one_message_to_a_function_at_most() -> None:
    grammar = strict(choose_format("", "openai", "openai_gptoss"), HEADERS, is_single=True)
    first = f"<|channel|>commentary {CALL}<|call|><|start|>assistant"
    assert num_taken(HEADERS, grammar, f"{first}<|channel|>final<|message|>Ok") is None
    assert num_taken(HEADERS, grammar, f"{first}<|channel|>commentary {CALL}") is not None


def test_what_has_no_grammar() -> None:
    with pytest.raises(CannotWrite, match="not known"):
        strict(choose_format("", "none", "qwen3"), PLAIN)
    with pytest.raises(CannotWrite, match="no special token"):
        strict(choose_format("", "openai", "openai_gptoss"), PLAIN)
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(CannotWrite, match="the parameters of f: strings with pattern"):
        strict(choose_format("", "qwen3_coder", "none"), PLAIN, tools=tools, strict=frozenset({"f"}))
    strict(choose_format("", "qwen3_coder", "none"), PLAIN, tools=tools, strict=frozenset())


def test_the_reader_finds_what_the_grammar_has_bound() -> None:
    """Random garbage with openings between: of what a grammar takes, all calls are right."""
    form, draw = choose_format("", "qwen3_coder", "qwen3"), random.Random(11)
    pieces = ["<tool_call>", "<function=", "give_number>", "\n", "<parameter=number>\n12\n</parameter>", "</function>"]
    pieces += ["</tool_call>", "<think>", "</think>", "x", " ", "<"]
    pieces += ["<tool_call><function=give_number>\n<parameter=number>\n12\n</parameter>\n</function></tool_call>"]
    grammar = strict(form, PLAIN, tools=NUMBER_TOOLS, strict=frozenset({"give_number"}))
    num_calls = 0
    for _ in range(300):
        text = "".join(draw.choice(pieces) for _ in range(12))
        taken = num_taken(PLAIN, grammar, text)
        events = read(form, PLAIN.decode(PLAIN.encode(text)[:taken]), NUMBER_TOOLS)
        if taken is None:
            begun = [event for event in events if isinstance(event, CallBegin)]
            said = "".join(event.text for event in events if isinstance(event, Arguments))
            num_calls += len(begun)
            assert {event.name for event in begun} <= {"give_number"} and said == '{"number": 12}' * len(begun)
    assert num_calls
