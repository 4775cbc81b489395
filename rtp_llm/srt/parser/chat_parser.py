"""From the text of an answer to its events, as the text comes.

The events together do not depend on how the text was cut into pieces. Nothing of the text is lost: what is not in the
model's format is content, as it stands. Only the tags themselves, and white space between content, thinking and calls,
belong to none of them.
"""

import secrets
import string
from collections.abc import Callable
from functools import partial

from rtp_llm.srt.parser.bodies import read_call
from rtp_llm.srt.parser.channels import read_messages
from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning, merged
from rtp_llm.srt.parser.formats import Calls, Format, Thinking
from rtp_llm.srt.parser.schemas import ToolSchemas
from rtp_llm.srt.parser.source import Malformed, Source, Steps

LETTERS = string.ascii_letters + string.digits


class ChatParser:
    """Reads one answer.

    Args:
        form: the model's format.
        schemas: the request's tools; None: calls are not looked for, and are text.
        thinks: the prompt has opened the thinking.
        separates: thinking is told from content; otherwise it is content, with its tags.
        new_id: makes the ids of calls that have none of their own.
    """

    def __init__(
        self,
        form: Format,
        schemas: ToolSchemas | None = None,
        thinks: bool = False,
        separates: bool = True,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self.schemas = schemas or ToolSchemas()
        self.only_known = False
        self._channels = form.channels
        self._hidden = form.hidden
        self._calls = None if schemas is None else form.calls
        self._thinking = form.thinking if separates else None
        self._thinks = self._thinking is not None and (thinks or self._thinking.is_implied)
        self._takes_calls = schemas is not None
        self._separates = separates
        self._new_id = new_id or partial(_random_id, self._calls.id_chars if self._calls else 0)
        self._source = Source()
        self._events: list[Event] = []
        self._num_calls = 0
        self._is_open = False  # a call has begun and not ended
        self._space = ""  # white space that is part of a text only if more of it follows
        self._last_kind: Callable[[str], Event] = Content  # of what was said
        self._is_fresh = True  # nothing was said yet since the beginning, or since thinking or calls ended
        self._drops_space = False
        self._spans: list[tuple[int, int]] = []
        self._thinks_since: int | None = None
        self._steps = self._read()
        self._is_done = False

    def feed(self, piece: str) -> list[Event]:
        """Take the next piece of the text; return what is certain now."""
        self._source.feed(piece)
        return self._advance()

    def finish(self, is_cut: bool = False) -> list[Event]:
        """Return the rest: the text has ended. ``is_cut``: where it would have gone on, at the most tokens."""
        self._source.ended, self._source.is_cut = True, is_cut
        events = self._advance()
        if self._space:
            events = merged([*events, self._last_kind(self._space)])
        self._space = ""
        return events

    @property
    def num_calls(self) -> int:
        """The number of calls that have begun."""
        return self._num_calls

    @property
    def thinking_spans(self) -> list[tuple[int, int]]:
        """The parts ``[start, end)`` of the text so far that are thinking, tags included."""
        if self._thinks_since is None:
            return self._spans
        return [*self._spans, (self._thinks_since, self._source.offset)]

    def _advance(self) -> list[Event]:
        if not self._is_done:
            self._is_done = next(self._steps, self) is self
        events, self._events = merged(self._events), []
        return events

    # Where readers tell what they find (bodies.CallSink, channels.MessageSink)

    def begin(self, name: str, call_id: str = "") -> None:
        if self.only_known and name not in self.schemas:
            raise Malformed
        self._source.release()
        self.border()
        self._events.append(CallBegin(self._num_calls, name, call_id or self._new_id()))
        self._num_calls += 1
        self._is_open = True

    def arguments(self, text: str) -> None:
        if text:
            self._events.append(Arguments(self._num_calls - 1, text))

    def end(self) -> None:
        self._events.append(CallEnd(self._num_calls - 1))
        self._is_open = False

    def content(self, text: str) -> None:
        self._say(Content, text)

    def reasoning(self, text: str) -> None:
        self._say(Reasoning if self._separates else Content, text)

    def border(self) -> None:
        """End a text: white space around is not part of it."""
        self._space, self._drops_space, self._is_fresh = "", True, True

    def begin_thinking(self, num_back: int) -> None:
        """``num_back``: length of the opening tag, which was read."""
        self.border()
        self._thinks_since = self._source.offset - num_back

    def end_thinking(self) -> None:
        self.border()
        self._end_span(self._source.offset)

    def _end_span(self, end: int) -> None:
        if self._thinks_since is not None:
            self._spans.append((self._thinks_since, end))
        self._thinks_since = None

    def _say(self, kind: Callable[[str], Event], text: str) -> None:
        if self._drops_space:
            text = text.lstrip()
        if not text:
            return
        self._drops_space = False
        text = self._space + text
        body = text.rstrip()
        self._space = text[len(body) :]
        self._last_kind = kind
        if body:
            self._is_fresh = False
            self._events.append(kind(body))

    # The reading

    def _read(self) -> Steps[None]:
        if self._channels is not None:
            yield from read_messages(self._source, self, self._channels, self._takes_calls)
            return
        if self._thinks and self._thinking is not None:
            self.begin_thinking(0)
            yield from self._source.space()
            yield from self._source.accept(self._thinking.open)  # once more than the prompt's
            yield from self._think(self._thinking)
        while (yield from self._source.has()):
            yield from self._answer()

    def _answer(self) -> Steps[None]:
        """Read content up to what ends it, and then this."""
        thinking, calls = self._thinking, self._calls
        triggers = (*self._hidden, *(calls.triggers if calls else ()))
        triggers += (thinking.open,) if thinking and thinking.anywhere else ()
        opening = None
        if self._is_fresh:
            self.content((yield from self._source.space()))
            bare = (*(calls.bare if calls else ()), *((thinking.open,) if thinking else ()))
            opening = yield from self._source.accept(*triggers, *bare)
            self._is_fresh = False
        if opening is None:
            opening = yield from self._source.until(triggers, self.content)
        if opening is None:
            return
        if thinking is not None and opening == thinking.open:
            self.begin_thinking(len(opening))
            yield from self._think(thinking)
        elif opening in self._hidden:
            self._drops_space = self._is_fresh = True
        elif calls is not None and not (yield from self._call_section(calls, opening)):
            self.content(opening)

    def _think(self, thinking: Thinking) -> Steps[None]:
        calls = self._calls if thinking.ends_at_call else None
        stops = (thinking.close, *(calls.triggers if calls else ()))
        while True:
            found = yield from self._source.until(stops, self.reasoning)
            if calls is None or found is None or found == thinking.close:
                break
            end = self._source.offset - len(found)
            if (yield from self._call_section(calls, found)):
                self._end_span(end)
                return
            self.reasoning(found)
        self.end_thinking()

    def _call_section(self, calls: Calls, opening: str) -> Steps[bool]:
        """Read calls after their ``opening``; return False if none is there, and only the opening was read."""
        num_before = self._num_calls
        self.only_known = opening in calls.bare
        self._source.mark(len(opening))
        if self.only_known:
            self._source.pos -= len(opening)
        try:
            yield from self._read_calls(calls, opening)
        except Malformed:
            self._source.rewind()
            if self._num_calls == num_before:
                self._source.pos += len(opening)
        self._source.release()
        return self._num_calls > num_before

    def _read_calls(self, calls: Calls, opening: str) -> Steps[None]:
        source, wraps = self._source, calls.wrapped_in
        in_section = opening == calls.section[0]
        opened = opening if opening in wraps else ""
        yield from source.space()
        in_list = calls.is_list and (yield from source.accept("[")) is not None
        while True:
            yield from source.space()
            if wraps and not (opened or in_list or self.only_known):
                opened = yield from source.expect(*wraps)
            yield from self._read_call(calls)
            yield from self._pass(wraps.get(opened, ""))
            opened = ""
            source.mark()
            yield from source.space()
            if in_list:
                if (yield from source.expect(",", "]")) == ",":
                    continue
                in_list = False
                yield from self._pass(calls.section[1])
                return
            if calls.separator and (yield from source.accept(calls.separator)):
                continue
            if not in_section or not (yield from source.has()):
                return
            if calls.section[1] and (yield from source.accept(calls.section[1])):
                return

    def _pass(self, closing: str) -> Steps[None]:
        """Take a closing tag, if it is there."""
        if closing and (yield from self._source.precedes((closing,))):
            yield from self._source.space()
            yield from self._source.accept(closing)

    def _read_call(self, calls: Calls) -> Steps[None]:
        """Read one call. One that has begun ends where its text is malformed; arguments in JSON go on to its tag."""
        num_before = self._num_calls
        try:
            yield from read_call(self._source, self, calls.body, calls.ends)
        except Malformed:
            if self._num_calls == num_before:
                raise
            if self._is_open:
                found = yield from self._source.until(calls.ends, self.arguments)
                if found is not None:
                    self._source.pos -= len(found)
                    self.end()


def _random_id(num_chars: int) -> str:
    if num_chars:
        return "".join(secrets.choice(LETTERS) for _ in range(num_chars))
    return f"call_{secrets.token_hex(12)}"
