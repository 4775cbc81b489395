"""Where readers tell what they find of a call."""

import json
from typing import Protocol

from rtp_llm.srt.parser.schemas import ToolSchemas
from rtp_llm.srt.parser.source import Emit, Source


class CallSink(Protocol):
    """Takes a call as it is read."""

    schemas: ToolSchemas
    only_known: bool  # begin() raises Malformed for functions that are no tools

    def begin(self, name: str, call_id: str = "") -> None: ...
    def arguments(self, text: str) -> None: ...
    def end(self) -> None: ...


class ArgumentsObject:
    """The object of a call's arguments, written member by member."""

    def __init__(self, sink: CallSink) -> None:
        self._sink = sink
        self._opening = "{"

    def key(self, key: str) -> None:
        self._sink.arguments(f"{self._opening}{json.dumps(key, ensure_ascii=False)}: ")
        self._opening = ", "

    def end(self) -> None:
        self._sink.arguments("{}" if self._opening == "{" else "}")
        self._sink.end()

    def give_up(self, source: Source) -> None:
        """End the object before what is no argument: the source's mark, or its position.

        If the text has ended there, the call was cut: it stays open, with what there is.
        """
        is_cut = source.pos >= len(source.text)
        source.rewind()
        if not is_cut:
            self.end()
            return
        self._sink.arguments(source.text[source.pos :])
        source.pos = len(source.text)


def escaped(emit: Emit) -> Emit:
    """Return what emits text as a part of a JSON string."""
    return lambda text: emit(json.dumps(text, ensure_ascii=False)[1:-1])
