"""The events of an answer, as readers of texts tell what they find."""

import secrets
import string
from collections.abc import Callable
from functools import partial

from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning, merged

LETTERS = string.ascii_letters + string.digits


class AnswerWriter:
    """Makes events of texts and calls, without white space at the borders between them.

    Args:
        separates: thinking is told from content; otherwise it is content.
        new_id: makes the ids of calls that have none of their own.
        id_chars: without ``new_id``: the number of letters and digits of such ids; 0: any id will do.
    """

    def __init__(self, separates: bool, new_id: Callable[[], str] | None, id_chars: int = 0) -> None:
        self.num_calls = 0  # that have begun
        self._separates = separates
        self._new_id = new_id or partial(_random_id, id_chars)
        self._events: list[Event] = []
        self._is_open = False  # a call has begun and not ended
        self._space = ""  # white space that is part of a text only if more of it follows
        self._last_kind: Callable[[str], Event] = Content  # of what was said
        self._is_fresh = True  # nothing was said yet since the beginning, or since thinking or calls ended
        self._drops_space = False
        self._spans: list[tuple[int, int]] = []
        self._thinks_since: int | None = None

    @property
    def offset(self) -> int:
        """The number of characters of the answer that were read."""
        raise NotImplementedError

    @property
    def thinking_spans(self) -> list[tuple[int, int]]:
        """The parts ``[start, end)`` of the text so far that are thinking, tags included."""
        return self._spans if self._thinks_since is None else [*self._spans, (self._thinks_since, self.offset)]

    def take(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = merged(self._events), []
        return events

    def take_rest(self) -> list[Event]:
        """Return the last events: the text has ended."""
        if self._space:
            self._events.append(self._last_kind(self._space))
        self._space = ""
        return self.take()

    def begin(self, name: str, call_id: str = "") -> None:
        """Begin a call. Without an id of its own it gets one."""
        self.border()
        self._events.append(CallBegin(self.num_calls, name, call_id or self._new_id()))
        self.num_calls += 1
        self._is_open = True

    def arguments(self, text: str) -> None:
        """Add to the call's arguments."""
        if text:
            self._events.append(Arguments(self.num_calls - 1, text))

    def end(self) -> None:
        """End the call."""
        self._events.append(CallEnd(self.num_calls - 1))
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
        self._thinks_since = self.offset - num_back

    def end_thinking(self) -> None:
        self.border()
        self.end_span(self.offset)

    def end_span(self, end: int) -> None:
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


def _random_id(num_chars: int) -> str:
    if num_chars:
        return "".join(secrets.choice(LETTERS) for _ in range(num_chars))
    return f"call_{secrets.token_hex(12)}"
