"""From the items of a request, and of the responses before it, to the messages of a chat."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.srt.entrypoints.openai.responses.protocol import Item, ItemReference, ResponsesRequest
from rtp_llm.srt.entrypoints.openai.responses.writer import new_id
from rtp_llm.srt.sampling_params import InvalidRequest

MAX_ITEMS = 16_384  # of a conversation
FIRST_ROLES = ("system", "developer")
PLACE = re.compile(r"\bmessages\[(\d+)\]")


def input_items(body: ResponsesRequest, find_item: Callable[[str], Item | None]) -> list[Item]:
    """Return the items of a request's input, each with an id, and messages with a list of parts.

    Args:
        find_item: returns an item that is referred to by its id; None: there is none.
    """
    if isinstance(body.input, str):
        part = {"type": "input_text", "text": body.input}
        return [{"id": new_id("message"), "type": "message", "role": "user", "content": [part]}]
    items: list[Item] = []
    for i, given in enumerate(body.input):
        if isinstance(given, ItemReference):
            found = find_item(given.id)
            if found is None:
                raise InvalidRequest(f"input[{i}] refers to the item {given.id[:64]!a}, which is not here", "input")
            items.append(found)
            continue
        item = {"id": new_id(given.type), **given.model_dump(exclude_none=True)}
        if item["type"] == "message" and isinstance(item["content"], str):
            item["content"] = [_text_part(item["role"], item["content"])]
        items.append(item)
    return items


def _text_part(role: str, text: str) -> Item:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}


@dataclass(slots=True)
class Conversation:
    """Messages, and for each the place in the request where it begins, such as ``input[2]``."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the places into an InvalidRequest raised within, which names messages."""
        try:
            yield
        except InvalidRequest as error:
            raise type(error)(PLACE.sub(self._place, str(error)), error.param) from None

    def _place(self, match: re.Match[str]) -> str:
        i = int(match[1])
        return self.places[i] if i < len(self.places) else match[0]

    def add(self, message: dict[str, Any], place: str) -> None:
        self.messages.append(message)
        self.places.append(place)

    def add_first(self, text: str, place: str) -> None:
        """Add a system message; those that begin a conversation are one, since templates show only one."""
        if not self.messages:
            self.add({"role": "system", "content": text}, place)
        else:
            self.messages[0] = {"role": "system", "content": f"{self.messages[0]['content']}\n\n{text}"}


def conversation_of(instructions: str | None, items: Sequence[Item], num_former: int) -> Conversation:
    """Return the messages that items make. An assistant's thinking, text and calls in a row are one message.

    Args:
        num_former: number of items from the responses before this one.

    Raises:
        InvalidRequest: there are too many items, or the output of a call that there is not.
    """
    if len(items) > MAX_ITEMS:
        raise InvalidRequest(f"the conversation has {len(items)} items; at most {MAX_ITEMS} are taken", "input")
    conversation = Conversation()
    if instructions is not None:
        conversation.add_first(instructions, "instructions")
    call_ids: set[str] = set()
    for i, item in enumerate(items):
        place = f"input[{i - num_former}]" if i >= num_former else "an item of the responses before"
        if item["type"] == "function_call_output":
            if item["call_id"] not in call_ids:
                raise InvalidRequest(f"{place}: there is no call {item['call_id'][:64]!a} before its output", "input")
            content = _content(item["output"])
            conversation.add({"role": "tool", "tool_call_id": item["call_id"], "content": content}, place)
        elif item["type"] == "message" and item["role"] != "assistant":
            _add_message(conversation, item, place)
        else:
            if item["type"] == "function_call":
                call_ids.add(item["call_id"])
            _add_to_turn(conversation, item, place)
    return conversation


def _add_message(conversation: Conversation, item: Item, place: str) -> None:
    content = _content(item["content"])
    begins = all(message["role"] in FIRST_ROLES for message in conversation.messages)
    if begins and item["role"] in FIRST_ROLES and isinstance(content, str):
        conversation.add_first(content, place)
    else:
        conversation.add({"role": item["role"], "content": content}, place)


def _add_to_turn(conversation: Conversation, item: Item, place: str) -> None:
    """Add what an assistant thought, said or called to its turn, or begin one."""
    last = conversation.messages[-1] if conversation.messages else {}
    if last.get("role") != "assistant" or _ends_turn(last, item["type"]):
        last = {"role": "assistant", "content": None}
        conversation.add(last, place)
    if item["type"] == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        last.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
    elif item["type"] == "reasoning":
        parts = item.get("content") or item.get("summary") or ()
        last["reasoning_content"] = "\n".join(part["text"] for part in parts)
    else:
        last["content"] = _content(item["content"])


def _ends_turn(message: dict[str, Any], kind: str) -> bool:
    """Return whether a turn that says this ends before an item of ``kind``."""
    if kind == "function_call":
        return False
    has_said = message["content"] is not None or "tool_calls" in message
    return has_said or (kind == "reasoning" and "reasoning_content" in message)


def _content(parts: str | list[Item]) -> str | list[Item]:
    """Return a message's content: a text, unless there are images."""
    if isinstance(parts, str):
        return parts
    if all(part["type"] != "input_image" for part in parts):
        return "".join(_text(part) for part in parts)
    return [_image(part) if part["type"] == "input_image" else {"type": "text", "text": _text(part)} for part in parts]


def _text(part: Item) -> str:
    text: str = part["refusal"] if part["type"] == "refusal" else part["text"]
    return text


def _image(part: Item) -> Item:
    detail = part.get("detail", "auto")
    return {
        "type": "image_url",
        "image_url": {"url": part["image_url"], "detail": "high" if detail == "original" else detail},
    }
