"""Answers as models write them, in every built-in format, with what they say. Written after the chat templates."""

import re
from dataclasses import dataclass, field
from typing import Any

CITY, DAYS = 'Pa"ris\n<b>é</b>', 3
ARGUMENTS = {"city": CITY, "days": DAYS}
JSON_ARGUMENTS = '{"city": "Pa\\"ris\\n<b>é</b>", "days": 3}'
CALL = ("get_weather", ARGUMENTS)
EMPTY_CALL = ("now", {})
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}},
    },
]


@dataclass(frozen=True)
class Answer:
    """``text`` in a format: names of its parsers, and what the text says. ``ids``: those that stand in it."""

    name: str
    tool_call_parser: str
    reasoning_parser: str
    text: str
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    thinks: bool = False
    ids: tuple[str, ...] = ()


def _json(name: str, arguments: str = JSON_ARGUMENTS, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def _opensource(text: str) -> str:
    return re.sub(r"<(/?)(think|tool_calls?|tool_sep|arg_key|arg_value)>", r"<\1\2:opensource>", text)


_ONE = _json("get_weather")
_TWO = _json("now", "{}")
_BOTH = [CALL, EMPTY_CALL]
_TAGS = f"<parameter=city>\n{CITY}\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
_GLM = f"<arg_key>city</arg_key>\n<arg_value>{CITY}</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
_PYTHON = 'get_weather(city="Pa\\"ris\\n<b>é</b>", days=3)'
_SEP = "<｜tool▁sep｜>"
_BEGIN, _END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_DSML = (
    '<｜DSML｜invoke name="get_weather">\n'
    f'<｜DSML｜parameter name="city" string="true">{CITY}</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n'
)

ANSWERS = [
    Answer("plain", "none", "none", "  Hello <think>x</think> \n", content="  Hello <think>x</think> \n"),
    Answer(
        "hermes",
        "hermes",
        "qwen3",
        f"<think>\nHm <b>\n</think>\n\nI look.\n<tool_call>\n{_ONE}\n</tool_call>\n<tool_call>\n{_TWO}\n</tool_call>",
        "I look.",
        "Hm <b>",
        _BOTH,
    ),
    Answer("opened", "hermes", "qwen3", "Hm\n</think>\n\nYes \n", content="Yes \n", reasoning="Hm", thinks=True),
    Answer("no close", "hermes", "deepseek_r1", "Hm ", reasoning="Hm"),
    Answer("implied", "hermes", "deepseek_r1", "<think>Hm</think>Yes", content="Yes", reasoning="Hm"),
    Answer(
        "call in thinking",
        "qwen3_coder",
        "qwen3",
        f"Hm\n<tool_call>\n<function=get_weather>\n{_TAGS}</function>\n</tool_call>",
        reasoning="Hm",
        calls=[CALL],
        thinks=True,
    ),
    Answer(
        "thinking between calls",
        "glm45",
        "glm45",
        "<think>a</think><tool_call>now</tool_call>\n<think>b</think>c",
        content="c",
        reasoning="ab",
        calls=[EMPTY_CALL],
    ),
    Answer(
        "arguments first",
        "hermes",
        "none",
        f'<tool_call>{{"arguments": {JSON_ARGUMENTS}, "id": [1, "}}"], "name": "get_weather"}}</tool_call>',
        calls=[CALL],
    ),
    Answer(
        "arguments as text",
        "hermes",
        "none",
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
        calls=[("now", {"a": 1})],
    ),
    Answer(
        "nested as in OpenAI's messages",
        "hermes",
        "none",
        f'<tool_call>{{"type": "function", "function": {_ONE}}}</tool_call>',
        calls=[CALL],
    ),
    Answer("no arguments", "hermes", "none", '<tool_call>{"name": "now"}</tool_call> ok', "ok", calls=[EMPTY_CALL]),
    Answer(
        "tag in a string",
        "hermes",
        "none",
        '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>"}}</tool_call>',
        calls=[("now", {"a": "</tool_call>"})],
    ),
    Answer(
        "new line in a string",
        "hermes",
        "none",
        '<tool_call>{"name": "now", "arguments": {"a": "x\ny"}}</tool_call>',
        calls=[("now", {"a": "x\ny"})],
    ),
    Answer(
        "missing bracket",
        "hermes",
        "none",
        '<tool_call>{"name": "now", "arguments": {"a": 1}</tool_call> ok',
        content="ok",
        calls=[("now", {"a": 1})],
    ),
    Answer(
        "qwen3_coder",
        "qwen3_coder",
        "none",
        f"Well.\n\n<tool_call>\n<function=get_weather>\n{_TAGS}</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "Well.",
        calls=_BOTH,
    ),
    Answer(
        "qwen3_coder without its first tag",
        "qwen3_coder",
        "none",
        f"<function=get_weather>\n{_TAGS}</function>\n</tool_call>",
        calls=[CALL],
        content="</tool_call>",
    ),
    Answer(
        "closing tag in a value",
        "qwen3_coder",
        "none",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\na</parameter>\nb</function>\n\n</parameter>\n"
        "</function>\n</tool_call>",
        calls=[("get_weather", {"city": "a</parameter>\nb</function>\n"})],
    ),
    Answer(
        "seed_oss",
        "seed_oss",
        "seed_oss",
        f"<seed:think>Hm</seed:think>\n<seed:tool_call>\n<function=get_weather>\n<parameter=city>{CITY}</parameter>\n"
        "<parameter=days>3</parameter>\n</function>\n</seed:tool_call>",
        reasoning="Hm",
        calls=[CALL],
    ),
    Answer("llama3_json", "llama3_json", "none", _json("get_weather", key="parameters"), calls=[CALL]),
    Answer(
        "llama3_json, two",
        "llama3_json",
        "none",
        '{"name": "now", "parameters": {}}; {"type": "function", "function": "now", "parameters": {"a": {"b": []}}}',
        calls=[EMPTY_CALL, ("now", {"a": {"b": []}})],
    ),
    Answer("llama3_json with its tag", "llama3_json", "none", f"<|python_tag|>{_ONE}", calls=[CALL]),
    Answer("llama3_json, JSON", "llama3_json", "none", '{"name": "Ada"}', content='{"name": "Ada"}'),
    Answer("llama3_json, other", "llama3_json", "none", '{"a": 1} {', content='{"a": 1} {'),
    Answer("llama4_pythonic", "llama4_pythonic", "none", f"[{_PYTHON}, now()]", calls=_BOTH),
    Answer("pythonic, a list", "pythonic", "none", "[1, 2] now()", content="[1, 2] now()"),
    Answer("olmo3", "olmo3", "olmo3", f"<function_calls>\n{_PYTHON}\nnow()\n</function_calls>", calls=_BOTH),
    Answer(
        "lfm2",
        "lfm2",
        "none",
        f"I look.<|tool_call_start|>[{_PYTHON}, now()]<|tool_call_end|>Checking.",
        "I look.Checking.",
        calls=_BOTH,
    ),
    Answer(
        "Python's values, and JSON's",
        "lfm2",
        "none",
        "<|tool_call_start|>[now(a=[1, (2, 'x]')], b={'k': None}, c=true, d=-1.5, e=\"a\nb\")]<|tool_call_end|>",
        calls=[("now", {"a": [1, [2, "x]"]], "b": {"k": None}, "c": True, "d": -1.5, "e": "a\nb"})],
    ),
    Answer(
        "mistral", "mistral", "none", f"[TOOL_CALLS]get_weather[ARGS]{JSON_ARGUMENTS}[TOOL_CALLS]now{{}}", calls=_BOTH
    ),
    Answer(
        "mistral with ids",
        "mistral",
        "mistral",
        f"[THINK]Hm[/THINK]So[TOOL_CALLS]get_weather[CALL_ID]abcDEF123[ARGS]{JSON_ARGUMENTS}",
        "So",
        "Hm",
        [CALL],
        ids=("abcDEF123",),
    ),
    Answer(
        "mistral, former", "mistral", "none", f'[TOOL_CALLS][{_ONE[:-1]}, "id": "a23456789"}}, {_TWO}]', calls=_BOTH
    ),
    Answer(
        "deepseek_v3",
        "deepseek_v3",
        "deepseek_r1",
        f"Hm</think>Ok<｜tool▁calls▁begin｜>{_BEGIN}function{_SEP}get_weather\n```json\n{JSON_ARGUMENTS}\n```{_END}\n"
        f"{_BEGIN}function{_SEP}now\n```json\n{{}}\n```{_END}<｜tool▁calls▁end｜>",
        "Ok",
        "Hm",
        _BOTH,
    ),
    Answer(
        "deepseek_v31",
        "deepseek_v31",
        "deepseek_v3",
        f"<｜tool▁calls▁begin｜>{_BEGIN}get_weather{_SEP}{JSON_ARGUMENTS}{_END}{_BEGIN}now{_SEP}{{}}{_END}"
        "<｜tool▁calls▁end｜>",
        calls=_BOTH,
    ),
    Answer(
        "deepseek_v32",
        "deepseek_v32",
        "deepseek_v3",
        f"Ok\n\n<｜DSML｜function_calls>\n{_DSML}</｜DSML｜function_calls>",
        "Ok",
        calls=_BOTH,
    ),
    Answer("deepseek_v4", "deepseek_v4", "none", f"<｜DSML｜tool_calls>\n{_DSML}</｜DSML｜tool_calls>", calls=_BOTH),
    Answer(
        "kimi_k2",
        "kimi_k2",
        "kimi_k2",
        "<think>Hm</think>Ok<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{JSON_ARGUMENTS}<|tool_call_end|><|tool_call_begin|>functions.now:1"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "Ok",
        "Hm",
        _BOTH,
        ids=("functions.get_weather:0", "functions.now:1"),
    ),
    Answer(
        "glm45", "glm45", "none", f"<tool_call>get_weather\n{_GLM}</tool_call>\n<tool_call>now</tool_call>", calls=_BOTH
    ),
    Answer(
        "glm47", "glm47", "none", f"<tool_call>get_weather{_GLM}</tool_call>".replace("\n<arg", "<arg"), calls=[CALL]
    ),
    Answer(
        "hy_v3",
        "hy_v3",
        "hy_v3",
        _opensource(
            f"<think>Hm</think><tool_calls>\n<tool_call>get_weather<tool_sep>\n{_GLM}</tool_call>\n"
            "<tool_call>now<tool_sep>\n</tool_call>\n</tool_calls>"
        ),
        reasoning="Hm",
        calls=_BOTH,
    ),
    Answer(
        "minimax_m2",
        "minimax_m2",
        "minimax_m2",
        f'Hm</think>\n\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">{CITY}</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        reasoning="Hm",
        calls=_BOTH,
        thinks=True,
    ),
    Answer(
        "minicpm5",
        "minicpm5",
        "none",
        f'<function name="get_weather"><param name="city"><![CDATA[{CITY}]]></param><param name="days">3</param>'
        '</function><function name="now"></function>',
        calls=_BOTH,
    ),
    Answer(
        "gemma4",
        "gemma4",
        "gemma4",
        f'<|channel>thought\nHm\n<channel|>Ok<|tool_call>call:get_weather{{city:<|"|>{CITY}<|"|>,days:3}}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
        "Ok",
        "Hm",
        _BOTH,
    ),
    Answer(
        "gemma4's values",
        "gemma4",
        "none",
        '<|tool_call>call:now{a:[1, true, <|"|>x,}<|"|>],b:{c:null,<|"|>d e<|"|>:<|"|><|"|>},f:bare word}<tool_call|>',
        calls=[("now", {"a": [1, True, "x,}"], "b": {"c": None, "d e": ""}, "f": "bare word"})],
    ),
    Answer("granite", "granite", "none", f"<|tool_call|>[{_ONE}, {_TWO}]", calls=_BOTH),
    Answer("granite4", "granite4", "none", f"<tool_call>\n{_ONE}\n</tool_call>", calls=[CALL]),
    Answer(
        "granite's thinking",
        "granite",
        "granite_thinking",
        "<think>Hm</think>\n<response>Ok</response>",
        content="Ok",
        reasoning="Hm",
    ),
    Answer(
        "cohere",
        "cohere_command3",
        "cohere_command3",
        '<|START_THINKING|>Hm<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", '
        f'"parameters": {JSON_ARGUMENTS}}},\n    {{"tool_call_id": "1", "tool_name": "now", "parameters": {{}}}}\n]'
        "<|END_ACTION|>",
        reasoning="Hm",
        calls=_BOTH,
    ),
    Answer(
        "cohere's response",
        "cohere_command3",
        "cohere_command3",
        "<|START_THINKING|>Hm<|END_THINKING|><|START_RESPONSE|>Ok<|END_RESPONSE|>",
        "Ok",
        "Hm",
    ),
    Answer(
        "apertus",
        "apertus",
        "apertus",
        f'<|inner_prefix|>Hm<|inner_suffix|><|tools_prefix|>[{{"get_weather": {JSON_ARGUMENTS}}}, {{"now": {{}}}}]'
        "<|tools_suffix|>",
        reasoning="Hm",
        calls=_BOTH,
    ),
    Answer(
        "apriel",
        "apriel",
        "apriel",
        f"Hm\n[BEGIN FINAL RESPONSE]\nOk\n<tool_calls>[{_ONE}, {_TWO}]</tool_calls>\n[END FINAL RESPONSE]",
        "Ok",
        "Hm",
        _BOTH,
        thinks=True,
    ),
    Answer("nemotron", "nemotron_nano_v2", "none", f"<TOOLCALL>[{_ONE}, {_TWO}]</TOOLCALL>", calls=_BOTH),
    Answer("phi4", "phi4_mini_json", "none", f" functools[{_ONE}, {_TWO}]", calls=_BOTH),
    Answer("internlm", "internlm", "none", f"a<|action_start|><|plugin|>\n{_ONE}<|action_end|>", "a", calls=[CALL]),
    Answer("gigachat3", "gigachat3", "none", f"function call<|role_sep|>\n{_ONE}", calls=[CALL]),
    Answer("gigachat3.1", "gigachat3", "none", f"Ok<|function_call|>{_ONE}", "Ok", calls=[CALL]),
    Answer(
        "functionary", "functionary_v31", "none", f"<function=get_weather>{JSON_ARGUMENTS}</function>", calls=[CALL]
    ),
    Answer("longcat", "longcat", "none", f"<longcat_tool_call>{_ONE}</longcat_tool_call>", calls=[CALL]),
    Answer(
        "solar_open",
        "solar_open",
        "solar_open",
        "<|think|>Hm<|end|><|begin|>assistant<|tool_calls|><|tool_call:begin|>c1<|tool_call:name|>get_weather"
        f"<|tool_call:args|>{JSON_ARGUMENTS}<|tool_call:end|><|calls|>",
        reasoning="Hm",
        calls=[CALL],
        ids=("c1",),
    ),
    Answer(
        "harmony",
        "openai",
        "openai_gptoss",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        f"{JSON_ARGUMENTS}<|call|>",
        "I look.",
        "Hm",
        [CALL],
    ),
    Answer(
        "harmony, recipient first",
        "openai",
        "openai_gptoss",
        " to=functions.now<|channel|>commentary json<|message|>{}",
        calls=[EMPTY_CALL],
    ),
    Answer(
        "harmony, final",
        "openai",
        "openai_gptoss",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Ok <|x",
        "Ok <|x",
        "Hm",
    ),
    Answer("harmony without a header", "openai", "openai_gptoss", "Ok\n", content="Ok\n"),
]
