"""From Anthropic's messages to those of OpenAI's form, which chat templates take.

system                         a message of role system
user: text, image              a message of role user
user: tool_result              a message of role tool; its images are the next user message's
assistant: text, thinking, tool_use   one message, with reasoning_content and tool_calls
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rtp_llm.srt.entrypoints.anthropic.protocol import (
    Block,
    CountTokensRequest,
    ImageBlock,
    MessageParam,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    URLSource,
)
from rtp_llm.srt.entrypoints.converted import Conversation, Place
from rtp_llm.srt.sampling_params import InvalidRequest

# Lines at the beginning of a system text by which clients tell the API about themselves, such as
# ``x-anthropic-billing-header: cch=...;``. They change with each request: in the prompt, they would change its prefix.
HEADER_LINES = re.compile(r"\A(?:x-anthropic-[\w-]+:[^\n]*(?:\n+|\Z))+")
TEXT_BETWEEN_BLOCKS = "\n"
Part = dict[str, Any]


def converted(body: CountTokensRequest) -> Conversation:
    """Return the conversation in OpenAI's form. Raise InvalidRequest for a block that its message cannot hold."""
    made = Conversation()
    system = _system_parts(body.system or "", "system")
    if system:
        made.add(*_of_parts("system", system, "system"))
    names: dict[str, str] = {}  # of the functions called so far, by the call's id
    for i, message in enumerate(body.messages):
        where = f"messages[{i}]"
        if message.role == "system":
            made.add(*_of_parts("system", _system_parts(_checked(message, where), where), where))
        elif message.role == "assistant":
            made.add(_assistant(_checked(message, where), names), Place(where))
        else:
            _add_user(made, _checked(message, where), names, where)
    return made


def calls_tools(message: MessageParam) -> bool:
    return isinstance(message.content, list) and any(isinstance(block, ToolUseBlock) for block in message.content)


ROLES: dict[str, tuple[type[Any], ...]] = {
    "system": (TextBlock,),
    "user": (TextBlock, ImageBlock, ToolResultBlock),
    "assistant": (TextBlock, ToolUseBlock, ThinkingBlock, RedactedThinkingBlock),
}


def _checked(message: MessageParam, where: str) -> str | list[Block]:
    for i, block in enumerate(message.content if isinstance(message.content, list) else ()):
        if not isinstance(block, ROLES[message.role]):
            raise InvalidRequest(
                f"{where}.content[{i}] is of type {block.type!r}, which a message of role {message.role!r} cannot hold",
                "messages",
            )
    return message.content


def _system_parts(content: str | Sequence[Any], where: str) -> list[tuple[Part, str]]:
    """Return the texts without header lines, and without those that were nothing else, each with its place."""
    if isinstance(content, str):
        parts = [(HEADER_LINES.sub("", content), where)]
    else:
        parts = [(HEADER_LINES.sub("", block.text), f"{where}[{i}]") for i, block in enumerate(content)]
    return [({"type": "text", "text": text}, place) for text, place in parts if text]


def _of_parts(role: str, parts: Sequence[tuple[Part, str]], where: str, **more: Any) -> tuple[dict[str, Any], Place]:
    """Return a message of these parts, and its place. One text alone is a string."""
    content: Any = [part for part, _ in parts]
    if not parts:
        content = ""
    elif len(parts) == 1 and content[0]["type"] == "text":
        content = content[0]["text"]
    return {"role": role, **more, "content": content}, Place(where, [place for _, place in parts])


def _assistant(content: str | Sequence[Any], names: dict[str, str]) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts = [block.text for block in content if isinstance(block, TextBlock)]
    thinking = [block.thinking for block in content if isinstance(block, ThinkingBlock) and block.thinking]
    calls = [block for block in content if isinstance(block, ToolUseBlock)]
    names |= {block.id: block.name for block in calls}
    message: dict[str, Any] = {"role": "assistant"}
    if texts or not calls:
        message["content"] = TEXT_BETWEEN_BLOCKS.join(texts)
    if thinking:
        message["reasoning_content"] = TEXT_BETWEEN_BLOCKS.join(thinking)
    if calls:
        message["tool_calls"] = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
            for block in calls
        ]
    return message


def _add_user(made: Conversation, content: str | Sequence[Any], names: dict[str, str], where: str) -> None:
    """Add messages of role tool and user, in the order of the blocks."""
    if isinstance(content, str):
        made.add({"role": "user", "content": content}, Place(where))
        return
    waiting: list[tuple[Part, str]] = []
    said: list[tuple[Part, str]] = []
    for i, block in enumerate(content):
        place = f"{where}.content[{i}]"
        if not isinstance(block, ToolResultBlock):
            said.append((_part(block), place))
            continue
        if said:
            made.add(*_of_parts("user", [*waiting, *said], where))
            waiting, said = [], []
        made.add(*_of_parts("tool", _result_texts(block, place), place, **_call(block, names)))
        waiting += _result_images(block, place)
    if waiting or said or not content:
        made.add(*_of_parts("user", [*waiting, *said], where))


def _part(block: TextBlock | ImageBlock) -> Part:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    source = block.source
    url = source.url if isinstance(source, URLSource) else f"data:{source.media_type};base64,{source.data}"
    return {"type": "image_url", "image_url": {"url": url}}


def _call(block: ToolResultBlock, names: dict[str, str]) -> dict[str, Any]:
    """Return the fields that say which call this is the result of."""
    name = names.get(block.tool_use_id)
    return {"tool_call_id": block.tool_use_id} | ({} if name is None else {"name": name})


def _result_texts(block: ToolResultBlock, where: str) -> list[tuple[Part, str]]:
    """Return a result's texts; that of an error says so."""
    if isinstance(block.content, list):
        texts = [(part.text, f"{where}.content[{i}]") for i, part in _of_kind(block.content, TextBlock)]
    else:
        texts = [(block.content or "", where)]
    if block.is_error and not any(text.lower().startswith("error") for text, _ in texts[:1]):
        texts = [(f"Error: {texts[0][0]}", texts[0][1]), *texts[1:]] if texts else [("Error", where)]
    return [({"type": "text", "text": text}, place) for text, place in texts]


def _result_images(block: ToolResultBlock, where: str) -> list[tuple[Part, str]]:
    blocks = block.content if isinstance(block.content, list) else []
    return [(_part(part), f"{where}.content[{i}]") for i, part in _of_kind(blocks, ImageBlock)]


def _of_kind(blocks: Sequence[Any], kind: type[Any]) -> Iterator[tuple[int, Any]]:
    return ((i, block) for i, block in enumerate(blocks) if isinstance(block, kind))
