"""An answer's events as blocks of Anthropic's messages: as a stream tells them, and as a whole message holds them."""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any, cast

from rtp_llm.srt.entrypoints.anthropic.protocol import AnswerBlock
from rtp_llm.srt.entrypoints.chat_answer import read_arguments
from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning

StreamEvent = dict[str, Any]


class BlockWriter:
    """Turns the events of one answer into events of its blocks.

    A block is content_block_start, any number of content_block_delta, and content_block_stop; its texts together are
    the whole. Thinking ends with a signature, by which clients know that it is complete.

    Args:
        shows_thinking: otherwise its blocks have no text.
    """

    def __init__(self, shows_thinking: bool = True) -> None:
        self._shows_thinking = shows_thinking
        self._index = -1
        self._kind: str | None = None  # of the block that is open
        self._digest = sha256()

    def write(self, events: Iterable[Event]) -> Iterator[StreamEvent]:
        for event in events:
            if isinstance(event, Content):
                yield from self._in_block("text", {"text": ""})
                yield self._delta({"type": "text_delta", "text": event.text})
            elif isinstance(event, Reasoning):
                yield from self._in_block("thinking", {"thinking": "", "signature": ""})
                self._digest.update(event.text.encode())
                if self._shows_thinking:
                    yield self._delta({"type": "thinking_delta", "thinking": event.text})
            elif isinstance(event, CallBegin):
                yield from self.close()
                yield from self._in_block("tool_use", {"id": event.id, "name": event.name, "input": {}})
            elif isinstance(event, Arguments):
                yield self._delta({"type": "input_json_delta", "partial_json": event.text})
            else:
                assert isinstance(event, CallEnd)  # the last kind
                yield from self.close()

    def close(self) -> Iterator[StreamEvent]:
        """Yield the end of the block that is open, if one is."""
        if self._kind is None:
            return
        if self._kind == "thinking":
            yield self._delta({"type": "signature_delta", "signature": self._digest.hexdigest()})
            self._digest = sha256()
        yield {"type": "content_block_stop", "index": self._index}
        self._kind = None

    def _in_block(self, kind: str, fields: dict[str, Any]) -> Iterator[StreamEvent]:
        """Yield what leads to a block of this kind: nothing, if one is open."""
        if kind == self._kind:
            return
        yield from self.close()
        self._index += 1
        self._kind = kind
        yield {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **fields}}

    def _delta(self, delta: dict[str, Any]) -> StreamEvent:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def whole_blocks(events: Sequence[Event], shows_thinking: bool = True) -> list[AnswerBlock]:
    """Return the blocks of a whole answer."""
    writer = BlockWriter(shows_thinking)
    blocks: list[dict[str, Any]] = []
    inputs: dict[int, str] = {}
    for event in (*writer.write(events), *writer.close()):
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            for name, text in event["delta"].items():
                if name == "partial_json":
                    inputs[event["index"]] = inputs.get(event["index"], "") + text
                elif name != "type":
                    blocks[-1][name] += text
    for i, text in inputs.items():
        blocks[i]["input"] = read_arguments(text)
    return cast(list[AnswerBlock], blocks)
