"""A text that arrives in pieces, read by generators that yield whenever they need more of it.

A reader is written like one of a whole text; each ``yield`` waits for the next piece. What it reads does not depend on
where the pieces end.
"""

import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields where it waits for text
Emit = Callable[[str], None]

MAX_HELD_CHARS = 1 << 20  # of a text that may still turn out to be something else
SPACE = re.compile(r"\s*")
NAME = re.compile(r"[\w.:/@$-]*")  # the characters of a function's name, and of a call's id
MAX_NAME_CHARS = 256


class Malformed(Exception):
    """The text is not in the format."""


class Source:
    """The text so far. ``pos`` is where reading goes on; text before it is dropped, unless ``mark`` keeps it."""

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.ended = False
        self.is_cut = False  # it ended where it would have gone on
        self._mark: int | None = None
        self._num_dropped = 0

    @property
    def offset(self) -> int:
        """The position in all of the text that was fed."""
        return self._num_dropped + self.pos

    def feed(self, piece: str) -> None:
        start = self.pos if self._mark is None else self._mark
        self.text = self.text[start:] + piece
        self.pos -= start
        self._num_dropped += start
        if self._mark is not None:
            self._mark = 0

    def mark(self, num_back: int = 0) -> None:
        """Keep the text from ``num_back`` characters before the position on."""
        self._mark = self.pos - num_back

    def release(self) -> None:
        self._mark = None

    def rewind(self) -> None:
        """Go back to the mark, if there is one, and remove it."""
        self.pos = self.pos if self._mark is None else self._mark
        self._mark = None

    def has(self, num_chars: int = 1) -> Steps[bool]:
        """Return whether so many characters follow."""
        self._check_held()
        while len(self.text) - self.pos < num_chars and not self.ended:
            yield
        return len(self.text) - self.pos >= num_chars

    def space(self) -> Steps[str]:
        """Take white space."""
        taken = ""
        while True:
            match = SPACE.match(self.text, self.pos)
            assert match is not None  # it matches nothing, too
            taken += match[0]
            self.pos = match.end()
            if self.pos < len(self.text) or self.ended:
                return taken
            self._check_held()
            yield

    def name(self) -> Steps[str]:
        """Take a function's name."""
        taken = ""
        while True:
            match = NAME.match(self.text, self.pos)
            assert match is not None
            taken += match[0]
            self.pos = match.end()
            if len(taken) > MAX_NAME_CHARS:
                raise Malformed
            if self.pos < len(self.text) or self.ended:
                break
            yield
        if not taken:
            raise Malformed
        return taken

    def accept(self, *literals: str) -> Steps[str | None]:
        """Take one of the literals, the longest that is there; None: none is."""
        longest = max(map(len, literals), default=0)
        while True:
            rest = self.text[self.pos : self.pos + longest]
            if self.ended or not any(len(item) > len(rest) and item.startswith(rest) for item in literals):
                break
            yield
        found = max((item for item in literals if rest.startswith(item)), key=len, default=None)
        if found is not None:
            self.pos += len(found)
        return found

    def expect(self, *literals: str) -> Steps[str]:
        """Take one of the literals, or raise Malformed."""
        found = yield from self.accept(*literals)
        if found is None:
            raise Malformed
        return found

    def precedes(self, literals: tuple[str, ...]) -> Steps[bool]:
        """Return whether one of the literals, or the end of the text, follows after white space. Takes nothing."""
        while True:
            match = SPACE.match(self.text, self.pos)
            assert match is not None
            rest = self.text[match.end() :]
            if rest.startswith(literals):
                return True
            if self.ended:
                return not rest
            if not any(item.startswith(rest) for item in literals):
                return False
            yield

    def until(self, literals: tuple[str, ...], emit: Emit) -> Steps[str | None]:
        """Emit text up to one of the literals, and take this; None: the text ended before one came.

        Of several the one that begins first counts, then the longest. What may be the beginning of one is not emitted
        before it is certain.
        """
        pattern = _any_of(literals)
        while True:
            match = pattern.search(self.text, self.pos)
            certain = len(self.text) - (0 if self.ended else _num_begun(self.text, self.pos, literals))
            if match is not None and match.start() < certain:
                emit(self.text[self.pos : match.start()])
                self.pos = match.end()
                return match[0]
            emit(self.text[self.pos : certain])
            self.pos = certain
            if self.ended:
                return None
            self._check_held()
            yield

    def _check_held(self) -> None:
        if self._mark is not None and self.pos - self._mark > MAX_HELD_CHARS:
            raise Malformed


@lru_cache(maxsize=256)
def _any_of(literals: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(item) for item in sorted(literals, key=len, reverse=True)) or "(?!)")


def _num_begun(text: str, start: int, literals: Iterable[str]) -> int:
    """Return the length of the longest end of ``text[start:]`` with which a longer literal begins."""
    longest = max(map(len, literals), default=0) - 1
    for i in range(max(start, len(text) - longest), len(text)):
        rest = text[i:]
        if any(len(item) > len(rest) and item.startswith(rest) for item in literals):
            return len(rest)
    return 0
