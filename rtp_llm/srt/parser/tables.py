"""The built-in formats, by the names of vLLM's and SGLang's parsers, and how they are known by a chat template's text.

Sources: the chat templates that models are published with, and their prompts to the model.
"""

from dataclasses import replace

from rtp_llm.srt.parser.formats import (
    BareKeysCall,
    Calls,
    Channels,
    Format,
    HeadCall,
    JsonCall,
    KeyEnd,
    PythonCall,
    TagCall,
    Thinking,
)

JSON = (JsonCall(),)

# Calls

HERMES = Calls(JSON, wrap=("<tool_call>", "</tool_call>"))

_EQUALS_TAGS = TagCall(
    name=("", ">"),
    key="<parameter=",
    key_ends=(KeyEnd(">"),),
    value=("", "</parameter>"),
    trims_lines=True,
    end="</function>",
)
QWEN3_CODER = Calls(
    (_EQUALS_TAGS,), section=("<tool_call>", "</tool_call>"), section_is_optional=True, wrap=("<function=", "")
)
SEED_OSS = replace(
    QWEN3_CODER,
    body=(replace(_EQUALS_TAGS, trims_lines=False),),
    section=("<seed:tool_call>", "</seed:tool_call>"),
)

LLAMA3_JSON = Calls(
    (JsonCall(names=("name", "function"), arguments=("parameters", "arguments")),),
    wrap=("<|python_tag|>", ""),
    separator=";",
    bare=("{",),
)
LLAMA4_PYTHONIC = Calls(
    (PythonCall(),),
    section=("<|python_start|>", "<|python_end|>"),
    section_is_optional=True,
    is_list=True,
    bare=("[",),
)
PYTHONIC = Calls((PythonCall(),), is_list=True, bare=("[",))
OLMO3 = Calls((PythonCall(),), section=("<function_calls>", "</function_calls>"))
LFM2 = Calls((PythonCall(),), section=("<|tool_call_start|>", "<|tool_call_end|>"), is_list=True)

MISTRAL = Calls(
    (JsonCall(), HeadCall(id_after_name="[CALL_ID]", after_name=("[ARGS]",), optional=("[ARGS]",))),
    wrap=("[TOOL_CALLS]", ""),
    is_list=True,
    id_chars=9,
)

_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_WRAP = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
DEEPSEEK_V3 = Calls(
    (
        HeadCall(
            before_name=("function", "<｜tool▁sep｜>"),
            after_name=("```json",),
            after_arguments=("```",),
            optional=("```json", "```"),
        ),
    ),
    section=_DEEPSEEK_SECTION,
    section_is_optional=True,
    wrap=_DEEPSEEK_WRAP,
)
DEEPSEEK_V31 = replace(DEEPSEEK_V3, body=(HeadCall(after_name=("<｜tool▁sep｜>",)),))
_DSML = TagCall(
    name=("", '">'),
    key='<｜DSML｜parameter name="',
    key_ends=(KeyEnd('" string="true">', True), KeyEnd('" string="false">', False), KeyEnd('">')),
    value=("", "</｜DSML｜parameter>"),
    end="</｜DSML｜invoke>",
)
DEEPSEEK_V32 = Calls(
    (_DSML,),
    section=("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
    wrap=('<｜DSML｜invoke name="', ""),
)
DEEPSEEK_V4 = replace(DEEPSEEK_V32, section=("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"))

KIMI_K2 = Calls(
    (HeadCall(name_is_id=True, after_name=("<|tool_call_argument_begin|>",)),),
    section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    section_is_optional=True,
    wrap=("<|tool_call_begin|>", "<|tool_call_end|>"),
)
GLM45 = Calls(
    (TagCall(name=("", ""), key="<arg_key>", key_ends=(KeyEnd("</arg_key>"),), value=("<arg_value>", "</arg_value>")),),
    wrap=("<tool_call>", "</tool_call>"),
)
HY_V3 = Calls(
    (
        TagCall(
            name=("", "<tool_sep:opensource>"),
            key="<arg_key:opensource>",
            key_ends=(KeyEnd("</arg_key:opensource>"),),
            value=("<arg_value:opensource>", "</arg_value:opensource>"),
        ),
    ),
    section=("<tool_calls:opensource>", "</tool_calls:opensource>"),
    wrap=("<tool_call:opensource>", "</tool_call:opensource>"),
)
MINIMAX_M2 = Calls(
    (
        TagCall(
            name=("", '">'),
            key='<parameter name="',
            key_ends=(KeyEnd('">'),),
            value=("", "</parameter>"),
            end="</invoke>",
        ),
    ),
    section=("<minimax:tool_call>", "</minimax:tool_call>"),
    wrap=('<invoke name="', ""),
)
MINICPM5 = Calls(
    (
        TagCall(
            name=("", '">'),
            key='<param name="',
            key_ends=(KeyEnd('"><![CDATA[', True, "]]>"), KeyEnd('">')),
            value=("", "</param>"),
            end="</function>",
        ),
    ),
    wrap=('<function name="', ""),
)
GEMMA4 = Calls((BareKeysCall(prefix="call:", quote='<|"|>'),), wrap=("<|tool_call>", "<tool_call|>"))
GRANITE = Calls(JSON, wrap=("<|tool_call|>", ""), wraps=(("<tool_call>", "</tool_call>"),), is_list=True)
COHERE = Calls(
    (JsonCall(names=("tool_name",), arguments=("parameters",), id_first="tool_call_id"),),
    section=("<|START_ACTION|>", "<|END_ACTION|>"),
    is_list=True,
)
APERTUS = Calls((JsonCall(name_is_key=True),), section=("<|tools_prefix|>", "<|tools_suffix|>"), is_list=True)
APRIEL = Calls(JSON, section=("<tool_calls>", "</tool_calls>"), is_list=True)
NEMOTRON = Calls(JSON, section=("<TOOLCALL>", "</TOOLCALL>"), is_list=True)
PHI4_MINI = Calls(JSON, section=("functools", ""), is_list=True)
INTERNLM = Calls(JSON, wrap=("<|action_start|><|plugin|>", "<|action_end|>"))

GIGACHAT3 = Calls(JSON, wrap=("<|function_call|>", ""), wraps=(("function call<|role_sep|>", ""),))
FUNCTIONARY_V31 = Calls((HeadCall(after_name=(">",), after_arguments=("</function>",)),), wrap=("<function=", ""))
LONGCAT = Calls(JSON, wrap=("<longcat_tool_call>", "</longcat_tool_call>"))
SOLAR = Calls(
    (HeadCall(id_before_name="<|tool_call:name|>", after_name=("<|tool_call:args|>",)),),
    section=("<|tool_calls|>", "<|calls|>"),
    section_is_optional=True,
    wrap=("<|tool_call:begin|>", "<|tool_call:end|>"),
)
# Thinking

THINK = Thinking("<think>", "</think>", ends_at_call=True, end="\n</think>")
IMPLIED_THINK = replace(THINK, is_implied=True)
CHANNEL = Thinking("<|channel>thought\n", "<channel|>", anywhere=True)

HARMONY = Channels(
    start="<|start|>",
    channel="<|channel|>",
    message="<|message|>",
    ends=("<|end|>", "<|return|>", "<|call|>"),
    thinking=("analysis",),
)

# What templates and people may choose: the names are vLLM's and SGLang's.

TOOL_CALL_PARSERS: dict[str, Calls | Channels | None] = {
    "none": None,
    "apertus": APERTUS,
    "apriel": APRIEL,
    "cohere_command3": COHERE,
    "cohere_command4": COHERE,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseekv3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "deepseekv31": DEEPSEEK_V31,
    "deepseek_v32": DEEPSEEK_V32,
    "deepseekv32": DEEPSEEK_V32,
    "deepseek_v4": DEEPSEEK_V4,
    "deepseekv4": DEEPSEEK_V4,
    "functionary_v31": FUNCTIONARY_V31,
    "gemma4": GEMMA4,
    "gigachat3": GIGACHAT3,
    "glm": GLM45,
    "glm45": GLM45,
    "glm47": GLM45,
    "gpt-oss": HARMONY,
    "openai": HARMONY,
    "granite": GRANITE,
    "granite4": HERMES,
    "hermes": HERMES,
    "hy_v3": HY_V3,
    "internlm": INTERNLM,
    "interns1": INTERNLM,
    "jamba": APRIEL,
    "kimi_k2": KIMI_K2,
    "lfm2": LFM2,
    "llama3": LLAMA3_JSON,
    "llama3_json": LLAMA3_JSON,
    "llama4_json": LLAMA3_JSON,
    "llama4_pythonic": LLAMA4_PYTHONIC,
    "longcat": LONGCAT,
    "mimo": HERMES,
    "minicpm5": MINICPM5,
    "minimax-m2": MINIMAX_M2,
    "minimax_m2": MINIMAX_M2,
    "mistral": MISTRAL,
    "nemotron_nano_v2": NEMOTRON,
    "olmo3": OLMO3,
    "phi4_mini_json": PHI4_MINI,
    "poolside_v1": GLM45,
    "pythonic": PYTHONIC,
    "qwen": HERMES,
    "qwen25": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "qwen3_json": HERMES,
    "qwen3_xml": QWEN3_CODER,
    "seed_oss": SEED_OSS,
    "solar_open": SOLAR,
    "step3p5": QWEN3_CODER,
}

REASONING_PARSERS: dict[str, Format] = {
    "none": Format(),
    "apertus": Format(Thinking("<|inner_prefix|>", "<|inner_suffix|>", anywhere=True)),
    "apriel": Format(
        Thinking("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"), hidden=("[END FINAL RESPONSE]",)
    ),
    "cohere_command3": Format(
        Thinking("<|START_THINKING|>", "<|END_THINKING|>", anywhere=True, ends_at_call=True),
        hidden=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    ),
    "deepseek-r1": Format(IMPLIED_THINK),
    "deepseek_r1": Format(IMPLIED_THINK),
    "gemma4": Format(CHANNEL),
    "gpt-oss": Format(channels=HARMONY),
    "openai_gptoss": Format(channels=HARMONY),
    "granite": Format(Thinking("Here is my thought process:", "Here is my response:")),
    "granite_thinking": Format(THINK, hidden=("<response>", "</response>")),
    "hy_v3": Format(Thinking("<think:opensource>", "</think:opensource>", ends_at_call=True)),
    "kimi": Format(Thinking("◁think▷", "◁/think▷")),
    "minimax-append-think": Format(),
    "minimax_m2_append_think": Format(),
    "mistral": Format(Thinking("[THINK]", "[/THINK]", ends_at_call=True)),
    "poolside_v1": Format(THINK),
    "seed_oss": Format(Thinking("<seed:think>", "</seed:think>", ends_at_call=True)),
    "solar_open": Format(Thinking("<|think|>", "<|end|>", anywhere=True), hidden=("<|begin|>assistant", "<|content|>")),
} | dict.fromkeys(
    (
        "deepseek-v3",
        "deepseek_v3",
        "deepseek_v4",
        "ernie45",
        "glm45",
        "glm47",
        "holo2",
        "interns1",
        "kimi_k2",
        "mimo",
        "minimax",
        "minimax_m2",
        "nemotron_3",
        "nemotron_v3",
        "olmo3",
        "qwen3",
        "qwen3-thinking",
        "step3",
        "step3p5",
        "think",
    ),
    Format(THINK),
)
REASONING_PARSERS["cohere_command4"] = REASONING_PARSERS["cohere_command3"]
REASONING_PARSERS["granite_thinking_parser"] = REASONING_PARSERS["granite_thinking"]

# The format of calls, by texts that all occur in a chat template; the first row that fits counts.
CALLS_OF_TEMPLATE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gpt-oss", ("<|channel|>", "<|message|>", "<|start|>")),
    ("deepseek_v4", ("DSML", "tool_calls>")),
    ("deepseek_v32", ("DSML", "function_calls>")),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("kimi_k2", ("<|tool_call_begin|>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("none", ("]<]minimax[>[",)),  # M3: arguments are nested tags
    ("seed_oss", ("<seed:tool_call>",)),
    ("none", ("<use_mcp_tool>",)),  # a tool's server stands beside its name
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("functionary_v31", ("<function=",)),
    ("minicpm5", ("<function name=", "<param name=")),
    ("hy_v3", ("<tool_sep{}>", ":opensource")),
    ("glm45", ("<arg_key>", "<arg_value>")),
    ("gemma4", ("<|tool_call>call:",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("cohere_command3", ("<|START_ACTION|>",)),
    ("apertus", ("<|tools_prefix|>",)),
    ("nemotron_nano_v2", ("<TOOLCALL>",)),
    ("solar_open", ("<|tool_call:begin|>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("lfm2", ("<|tool_list_start|>",)),
    ("olmo3", ("<function_calls>",)),
    ("gigachat3", ("<|role_sep|>", "function call")),
    ("gigachat3", ("<|function_call|>",)),
    ("granite", ("<|tool_call|>",)),
    ("phi4_mini_json", ("functools",)),
    ("apriel", ("<tool_calls>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("internlm", ("<|action_start|>",)),
    ("hermes", ("<tool_call>",)),
    ("llama4_pythonic", ("<|python_start|>",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ('{"name": ', '"parameters": ', "<|start_header_id|>")),
)
THINKING_OF_TEMPLATE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gpt-oss", ("<|channel|>", "<|message|>", "<|start|>")),
    ("gemma4", ("<|channel>thought", "<channel|>")),
    ("seed_oss", ("<seed:think>",)),
    ("cohere_command3", ("<|START_THINKING|>",)),
    ("cohere_command3", ("<|START_RESPONSE|>",)),
    ("hy_v3", ("<think{}>", ":opensource")),
    ("mistral", ("[THINK]",)),
    ("apertus", ("<|inner_prefix|>",)),
    ("apriel", ("[BEGIN FINAL RESPONSE]",)),
    ("solar_open", ("<|think|>", "<|content|>")),
    ("granite_thinking", ("<response>", "<think>", "<|start_of_role|>")),
    ("kimi", ("◁think▷",)),
    ("think", ("</think>",)),
    ("think", ("<think>",)),
)
