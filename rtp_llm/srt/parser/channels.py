"""Reader of messages with headers (``formats.Channels``)."""

import re
from collections.abc import Callable
from typing import Protocol

from rtp_llm.srt.parser.call_sink import CallSink
from rtp_llm.srt.parser.formats import Channels
from rtp_llm.srt.parser.json_text import json_value
from rtp_llm.srt.parser.source import Malformed, Source, Steps

MAX_HEADER_CHARS = 512
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
WITHOUT_START = (" to=", "to=")  # the prompt has begun the header


class MessageSink(CallSink, Protocol):
    """Takes calls and texts."""

    def content(self, text: str) -> None: ...
    def reasoning(self, text: str) -> None: ...
    def border(self) -> None: ...
    def begin_thinking(self, num_back: int) -> None: ...
    def end_thinking(self) -> None: ...


def read_messages(source: Source, sink: MessageSink, form: Channels, takes_calls: bool) -> Steps[None]:
    """Read messages to the end of the text. Text without a header is content."""
    openings: tuple[str, ...] = (form.start, form.channel, *WITHOUT_START)
    while (yield from source.has()):
        opening = yield from source.accept(*openings)
        header = None if opening is None else (yield from _header(source, form, opening))
        if header is not None:
            yield from _message(source, sink, form, header, takes_calls)
        else:
            sink.content(opening or "")
            yield from _to_end(source, sink.content, (form.start, form.channel, *form.ends), form)
        openings = (form.start, form.channel)


def _header(source: Source, form: Channels, opening: str) -> Steps[str | None]:
    """Take a header up to its last tag, and return it without; None, and nothing is taken: there is none."""
    parts = [opening]

    def keep(text: str) -> None:
        parts.append(text)
        if sum(map(len, parts)) > MAX_HEADER_CHARS:
            raise Malformed

    source.mark()
    try:
        found = yield from source.until((form.message,), keep)
    except Malformed:
        found = None
    if found is None:
        source.rewind()
        return None
    source.release()
    return "".join(parts)


def _message(source: Source, sink: MessageSink, form: Channels, header: str, takes_calls: bool) -> Steps[None]:
    channel = re.search(re.escape(form.channel) + r"\s*(\w+)", header)
    recipient = RECIPIENT.search(header)
    ends = (*form.ends, form.start)
    if recipient is not None and recipient[1].startswith(form.function) and takes_calls:
        yield from _call(source, sink, recipient[1].removeprefix(form.function), ends)
        yield from _to_end(source, sink.content, ends, form)
    elif channel is not None and channel[1] in form.thinking and recipient is None:
        sink.border()
        sink.begin_thinking(len(header) + len(form.message))
        yield from _to_end(source, sink.reasoning, ends, form)
        sink.end_thinking()
    else:
        sink.border()
        if recipient is not None:  # no function of ours: the reader shall see whom it was for
            sink.content(header + form.message)
        yield from _to_end(source, sink.content, ends, form)
    sink.border()


def _to_end(source: Source, emit: Callable[[str], None], ends: tuple[str, ...], form: Channels) -> Steps[None]:
    """Emit text up to one of the ends; one with which a header begins is left there."""
    found = yield from source.until(ends, emit)
    if found in (form.start, form.channel):
        source.pos -= len(found)


def _call(source: Source, sink: MessageSink, name: str, ends: tuple[str, ...]) -> Steps[None]:
    """Read a call's arguments. What is not JSON is passed on as it stands."""
    sink.begin(name)
    yield from source.space()
    if not (yield from source.has()):
        return
    if source.text[source.pos] == "{":
        try:
            yield from json_value(source, sink.arguments)
        except Malformed:  # what came before is passed on already, as it stood
            yield from _rest(source, sink, ends)
        else:
            sink.end()
        return
    if (yield from source.precedes(ends)):
        sink.arguments("{}")
    yield from _rest(source, sink, ends)


def _rest(source: Source, sink: MessageSink, ends: tuple[str, ...]) -> Steps[None]:
    """Pass on a call's arguments up to its end, if that comes."""
    found = yield from source.until(ends, sink.arguments)
    if found is not None:
        source.pos -= len(found)
        sink.end()
