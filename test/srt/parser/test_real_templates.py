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
EXPECTED = {}


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
