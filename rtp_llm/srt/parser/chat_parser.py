"""From the text of an answer to its events, as the text comes.

The events together do not depend on how the text was cut into pieces. Nothing of the text is lost: what is not in the
model's format is content, as it stands. Only the tags themselves, and white space between content, thinking and calls,
belong to none of them.
"""

from collections.abc import Callable

from rtp_llm.srt.parser.answer_writer import AnswerWriter
from rtp_llm.srt.parser.bodies import read_call
from rtp_llm.srt.parser.channels import read_messages
from rtp_llm.srt.parser.events import Event, merged
from rtp_llm.srt.parser.formats import Calls, Format, Thinking
from rtp_llm.srt.parser.schemas import ToolSchemas
from rtp_llm.srt.parser.source import Malformed, Source, Steps


class ChatParser(AnswerWriter):
    """Reads one answer.

    Args:
        form: the model's format.
        schemas: the request's tools; None: calls are not looked for, and are text.
        thinks: the answer begins with thinking, without its opening tag (``begins_thinking``).
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
        super().__init__(separates, new_id, form.calls.id_chars if form.calls else 0)
        self.schemas = schemas or ToolSchemas()
        self.only_known = False
        self._channels = form.channels
        self._hidden = form.hidden
        self._calls = None if schemas is None else form.calls
        self._thinking = form.thinking if separates else None
        self._thinks = thinks
        self._takes_calls = schemas is not None
        self._source = Source()
        self._steps = self._read()
        self._is_done = False

    def feed(self, piece: str) -> list[Event]:
        """Take the next piece of the text; return what is certain now."""
        self._source.feed(piece)
        return self._advance()

    def finish(self, is_cut: bool = False) -> list[Event]:
        """Return the rest: the text has ended. ``is_cut``: where it would have gone on, at the most tokens."""
        self._source.ended, self._source.is_cut = True, is_cut
        return merged([*self._advance(), *self.take_rest()])

    @property
    def offset(self) -> int:
        return self._source.offset

    def _advance(self) -> list[Event]:
        if not self._is_done:
            self._is_done = next(self._steps, self) is self
        return self.take()

    def begin(self, name: str, call_id: str = "") -> None:
        if self.only_known and name not in self.schemas:
            raise Malformed
        self._source.release()
        super().begin(name, call_id)

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
                self.end_span(end)
                return
            self.reasoning(found)
        self.end_thinking()

    def _call_section(self, calls: Calls, opening: str) -> Steps[bool]:
        """Read calls after their ``opening``; return False if none is there, and only the opening was read."""
        num_before = self.num_calls
        self.only_known = opening in calls.bare
        self._source.mark(len(opening))
        if self.only_known:
            self._source.pos -= len(opening)
        try:
            yield from self._read_calls(calls, opening)
        except Malformed:
            self._source.rewind()
            if self.num_calls == num_before:
                self._source.pos += len(opening)
        self._source.release()
        return self.num_calls > num_before

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
        num_before = self.num_calls
        try:
            yield from read_call(self._source, self, calls.body, calls.ends)
        except Malformed:
            if self.num_calls == num_before:
                raise
            if self._is_open:
                found = yield from self._source.until(calls.ends, self.arguments)
                if found is not None:
                    self._source.pos -= len(found)
                    self.end()
