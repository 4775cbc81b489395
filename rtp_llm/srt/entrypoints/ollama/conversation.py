"""From Ollama's messages to those of OpenAI's form, which chat templates take: one for each."""

from collections.abc import Sequence
from typing import Any

from rtp_llm.srt.entrypoints.converted import Conversation, Place
from rtp_llm.srt.entrypoints.ollama.protocol import ChatBody, GenerateBody, Message
from rtp_llm.srt.sampling_params import InvalidRequest

Call = tuple[str, str]  # id and name of a call that has no result yet


def of_chat(body: ChatBody) -> Conversation:
    """Return a chat's conversation."""
    made = Conversation()
    waiting: list[Call] = []
    for i, message in enumerate(body.messages or ()):
        where, role = f"messages[{i}]", message.role.lower()
        images = message.images or []
        fields: dict[str, Any] = {"role": role}
        if message.content or images or not message.tool_calls:
            fields["content"] = content_of(message.content or "", images, where)
        if message.tool_calls:
            calls = _calls(message, f"call_{i}")
            waiting = [(call["id"], call["function"]["name"]) for call in calls]
            fields["tool_calls"] = calls
        if message.thinking:
            fields["reasoning_content"] = message.thinking
        if role == "tool":
            fields |= _answered(message, waiting)
        made.add(fields, _place(f"{where}.content", f"{where}.images", len(images)))
    return made


def of_completion(body: GenerateBody) -> Conversation:
    """Return the conversation that a prompt is the last message of."""
    made = Conversation()
    if body.system:
        made.add({"role": "system", "content": body.system}, Place("system"))
    images = body.images or []
    made.add(
        {"role": "user", "content": content_of(body.prompt or "", images, "")},
        _place("prompt", "images", len(images)),
    )
    return made


def image_sources(images: Sequence[str], where: str = "") -> list[str]:
    """Return images as ``data:`` URIs. Raise InvalidRequest for one that is none in base64: what it names is not
    fetched."""
    place = f"{where}.images" if where else "images"
    for i, image in enumerate(images):
        if ":" in image[:16]:
            raise InvalidRequest(f"{place}[{i}] must be base64 alone, no URL and no data: URI", place.partition("[")[0])
    return [f"data:;base64,{image}" for image in images]


def content_of(text: str, images: Sequence[str], where: str) -> str | list[dict[str, Any]]:
    """Return a message's content: its images come first."""
    if not images:
        return text
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": source}} for source in image_sources(images, where)
    ]
    return [*parts, {"type": "text", "text": text}] if text else parts


def _place(text: str, images: str, num_images: int) -> Place:
    return Place(text.removesuffix(".content"), [*(f"{images}[{i}]" for i in range(num_images)), text])


def _calls(message: Message, prefix: str) -> list[dict[str, Any]]:
    """Return the calls, each with an id: its own, or one by its place."""
    return [
        {
            "id": call.id or f"{prefix}_{i}",
            "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments},
        }
        for i, call in enumerate(message.tool_calls or ())
    ]


def _answered(message: Message, waiting: list[Call]) -> dict[str, Any]:
    """Return the fields that say which call a result is of, and take that call from those ``waiting``.

    It is the call of its id, else the first one of its function's name, else the first one.
    """
    call_id, name = message.tool_call_id, message.tool_name or message.name
    if call_id:
        found = [call for call in waiting if call[0] == call_id]
    else:
        found = [call for call in waiting if name in (None, call[1])]
    if found:
        waiting.remove(found[0])
        call_id, name = found[0][0], name or found[0][1]
    return {key: value for key, value in (("tool_call_id", call_id), ("name", name)) if value}
