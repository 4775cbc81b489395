"""The output of a response: items, and the stream's events that tell of them, from the events of an answer's text.

One writer makes both, so that a stream and a whole answer say the same. An item's events come in OpenAI's order: it is
added, its part is added, the text comes in deltas and once more as a whole, the part is done, the item is done. Calls
have no parts.
"""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from rtp_llm.srt.entrypoints.openai.responses.protocol import Item
from rtp_llm.srt.parser.events import Arguments, CallBegin, Content, Event, Reasoning

StreamEvent = dict[str, Any]  # its type and fields, without the sequence number

PARTS = {"message": "output_text", "reasoning": "reasoning_text"}  # an item's type -> that of its one part
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


class OutputWriter:
    """Writes one response's items into ``output``; the last may be open still."""

    def __init__(self) -> None:
        self.output: list[Item] = []
        self._open: Item | None = None

    def write(self, event: Event) -> Iterator[StreamEvent]:
        if isinstance(event, Content):
            yield from self._say("message", event.text)
        elif isinstance(event, Reasoning):
            yield from self._say("reasoning", event.text)
        elif isinstance(event, CallBegin):
            yield from self._begin("function_call", {"call_id": event.id, "name": event.name, "arguments": ""})
        elif isinstance(event, Arguments):
            assert self._open is not None  # a call's arguments follow its beginning
            self._open["arguments"] += event.text
            yield self._of_item("response.function_call_arguments.delta", delta=event.text)
        else:
            yield from self._end("completed")

    def finish(self, is_complete: bool) -> Iterator[StreamEvent]:
        """End the answer. One that says nothing is an empty message."""
        if not self.output:
            yield from self._say("message", "")
        yield from self._end("completed" if is_complete else "incomplete")

    def _say(self, kind: str, text: str) -> Iterator[StreamEvent]:
        if self._open is None or self._open["type"] != kind:
            yield from self._begin(kind, {"role": "assistant"} if kind == "message" else {"summary": []})
        part = self._part()
        part["text"] += text
        if text:
            logprobs: Item = {"logprobs": []} if kind == "message" else {}
            yield self._of_part(f"response.{part['type']}.delta", delta=text, **logprobs)

    def _begin(self, kind: str, fields: Item) -> Iterator[StreamEvent]:
        yield from self._end("completed")
        has_part = kind in PARTS
        content: Item = {"content": []} if has_part else {}
        item = {"id": new_id(kind), "type": kind, "status": "in_progress", **fields, **content}
        self.output.append(item)
        self._open = item
        yield {"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": {**item, **content}}
        if has_part:
            extra: Item = {"annotations": [], "logprobs": []} if kind == "message" else {}
            part = {"type": PARTS[kind], "text": "", **extra}
            item["content"] = [part]
            yield self._of_part("response.content_part.added", part=dict(part))

    def _end(self, status: str) -> Iterator[StreamEvent]:
        item = self._open
        if item is None:
            return
        if item["type"] == "function_call":
            whole = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **whole)
        else:
            part = self._part()
            logprobs: Item = {"logprobs": []} if item["type"] == "message" else {}
            yield self._of_part(f"response.{part['type']}.done", text=part["text"], **logprobs)
            yield self._of_part("response.content_part.done", part=dict(part))
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.output) - 1, "item": item}
        self._open = None

    def _part(self) -> Item:
        assert self._open is not None  # only called while an item with a part is open
        part: Item = self._open["content"][0]
        return part

    def _of_item(self, kind: str, **fields: Any) -> StreamEvent:
        return {"type": kind, "item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, **fields}

    def _of_part(self, kind: str, **fields: Any) -> StreamEvent:
        return self._of_item(kind, content_index=0, **fields)


def new_id(kind: str) -> str:
    """Return an id for an item of this type."""
    return f"{PREFIXES[kind]}_{uuid4().hex}"
