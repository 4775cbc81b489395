"""Which format each of the published chat templates gets, and whether calls in its own rendering are read back."""

import json
from pathlib import Path
from typing import Any

import pytest
from recorded_answers import ARGUMENTS, TOOLS

from rtp_llm.srt.chat.messages import ChatTemplateError
from rtp_llm.srt.chat.template import ChatTemplate
from rtp_llm.srt.parser.chat_parser import ChatParser
from rtp_llm.srt.parser.choose import choose_format, find_name
from rtp_llm.srt.parser.events import Arguments, CallBegin
from rtp_llm.srt.parser.formats import Format
from rtp_llm.srt.parser.schemas import ToolSchemas
from rtp_llm.srt.parser.tables import CALLS_OF_TEMPLATE, THINKING_OF_TEMPLATE

# (calls, thinking, outcome of a call that was rendered): read: it is read back; no place: the template takes no tools;
# hidden: it does not show calls of an assistant, or fails on them; unknown: no built-in format has them
EXPECTED = {
    "Apertus-8B-Instruct": ("apertus", "apertus", "read"),
    "Apriel-1.6-15b-Thinker-fixed": ("apriel", "apriel", "read"),
    "Bielik-11B-v3.0-Instruct": ("hermes", "think", "read"),
    "ByteDance-Seed-OSS": ("seed_oss", "seed_oss", "read"),
    "Cohere2MoE": ("cohere_command3", "cohere_command3", "read"),
    "CohereForAI-c4ai-command-r-plus-tool_use": ("none", "none", "hidden"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("cohere_command3", "cohere_command3", "read"),
    "GLM-4.6": ("glm45", "think", "read"),
    "GLM-4.7-Flash": ("glm45", "think", "read"),
    "GLM-5.2": ("glm45", "think", "read"),
    "GigaChat3-10B-A1.8B": ("gigachat3", "none", "read"),
    "GigaChat3.1-10B-A1.8B": ("gigachat3", "none", "read"),
    "HuggingFaceTB-SmolLM3-3B": ("none", "think", "no place"),
    "Kimi-K2-Instruct": ("kimi_k2", "none", "hidden"),
    "Kimi-K2-Thinking": ("kimi_k2", "think", "hidden"),
    "LFM2-8B-A1B": ("lfm2", "none", "hidden"),
    "LFM2.5-8B-A1B": ("lfm2", "think", "read"),
    "LFM2.5-Instruct": ("none", "think", "hidden"),
    "MiMo-VL": ("hermes", "none", "read"),
    "MiniMax-M2": ("minimax_m2", "think", "read"),
    "MiniMax-M3": ("none", "none", "unknown"),
    "MiroThinker": ("none", "think", "hidden"),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral", "none", "read"),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("qwen3_coder", "think", "read"),
    "NVIDIA-Nemotron-Nano-v2": ("nemotron_nano_v2", "think", "read"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("hermes", "none", "read"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", "none", "read"),
    "Qwen-QwQ-32B": ("hermes", "think", "read"),
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", "none", "read"),
    "Qwen-Qwen3-0.6B": ("hermes", "think", "read"),
    "Qwen3-Coder": ("qwen3_coder", "none", "read"),
    "Qwen3.5-4B": ("qwen3_coder", "think", "read"),
    "Reka-Edge": ("hermes", "think", "read"),
    "StepFun3.5-Flash": ("qwen3_coder", "think", "read"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("deepseek_v3", "think", "no place"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("deepseek_v3", "think", "no place"),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek_v31", "think", "no place"),
    "deepseek-ai-DeepSeek-V3.2": ("deepseek_v32", "think", "read"),
    "deepseek-ai-DeepSeek-V4-Flash-0731": ("deepseek_v4", "think", "read"),
    "deepseek-ai-DeepSeek-V4": ("deepseek_v4", "think", "read"),
    "fireworks-ai-llama-3-firefunction-v2": ("phi4_mini_json", "none", "no place"),
    "google-gemma-2-2b-it": ("none", "none", "no place"),
    "google-gemma-4-31B-it-interleaved": ("gemma4", "gemma4", "read"),
    "google-gemma-4-31B-it": ("gemma4", "gemma4", "read"),
    "ibm-granite-granite-3.3-2B-Instruct": ("granite", "granite_thinking", "hidden"),
    "ibm-granite-granite-4.0": ("hermes", "none", "read"),
    "ibm-granite-granite-4.1": ("hermes", "none", "read"),
    "llama-cpp-deepseek-r1": ("deepseek_v3", "think", "hidden"),
    "llama-cpp-rwkv-world": ("none", "think", "no place"),
    "meetkai-functionary-medium-v3.1": ("functionary_v31", "none", "read"),
    "meetkai-functionary-medium-v3.2": ("none", "none", "unknown"),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3_json", "none", "read"),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama3_json", "none", "read"),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama3_json", "none", "read"),
    "microsoft-Phi-3.5-mini-instruct": ("none", "none", "no place"),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral", "mistral", "read"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", "none", "read"),
    "moonshotai-Kimi-K2": ("kimi_k2", "none", "read"),
    "openai-gpt-oss-120b": ("gpt-oss", "gpt-oss", "read"),
    "openbmb-MiniCPM5-1B": ("minicpm5", "think", "read"),
    "poolside-Laguna-S-2.1": ("glm45", "think", "read"),
    "poolside-Laguna-XS-2.1": ("glm45", "think", "read"),
    "poolside-Laguna-XS.2": ("glm45", "think", "read"),
    "stepfun-ai-Step-3.5-Flash": ("qwen3_coder", "think", "read"),
    "tencent-Hy3": ("hy_v3", "hy_v3", "read"),
    "unsloth-Apriel-1.5": ("apriel", "apriel", "read"),
    "unsloth-mistral-Devstral-Small-2507": ("mistral", "none", "read"),
    "upstage-Solar-Open-100B": ("solar_open", "solar_open", "read"),
}


def outcome(source: str) -> tuple[str, str, str]:
    names = find_name(source, CALLS_OF_TEMPLATE), find_name(source, THINKING_OF_TEMPLATE)
    return *names, _outcome_of_call(source)


def _outcome_of_call(source: str) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    call = {
        "id": "call00000",
        "type": "function",
        "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)},
    }
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    user = {"role": "user", "content": "Hi"}
    try:
        bare = template.render([user], tools=TOOLS, add_generation_prompt=False)
        text = template.render([user, calling], tools=TOOLS, add_generation_prompt=False)
    except ChatTemplateError as error:
        return "no place" if "no place for tools" in str(error) else "hidden"
    form = choose_format(source)
    return "read" if form.has_calls and _is_read(form, text.removeprefix(bare)) else "unknown"


def _is_read(form: Format, answer: str) -> bool:
    """Return whether the call is found in a message with its header, or from its first bracket on."""
    starts = [0, *(answer.index(bracket) for bracket in "{[" if bracket in answer)]
    return any(_calls(form, answer[start:]) == [("get_weather", ARGUMENTS)] for start in starts)


def _calls(form: Format, answer: str) -> list[tuple[str, Any]]:
    parser = ChatParser(form, ToolSchemas(TOOLS))
    events = [*parser.feed(answer), *parser.finish()]
    names = [event.name for event in events if isinstance(event, CallBegin)]
    texts = ["".join(e.text for e in events if isinstance(e, Arguments) and e.index == i) for i in range(len(names))]
    return [(name, json.loads(text)) for name, text in zip(names, texts, strict=True)]


def test_published_templates(data_dir: Path) -> None:
    folder = data_dir / "chat-templates"
    if not folder.is_dir():
        pytest.skip(f"no chat templates: {folder} does not exist")
    found = {path.stem: outcome(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.jinja"))}
    assert found == EXPECTED
