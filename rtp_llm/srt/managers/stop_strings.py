"""Search for stop strings in a text that comes in pieces, in time linear in the text."""

from collections.abc import Sequence
from typing import NamedTuple


class Match(NamedTuple):
    """A stop string at ``[start, end)`` of the pushed text."""

    start: int
    end: int
    string: str


class StopMatcher:
    """Takes a text piece by piece. After each piece it knows the first match, and how much of the text's end may be
    the beginning of a stop string. Do not use it after a match.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._patterns = [_Pattern(string) for string in dict.fromkeys(strings)]
        self._num_chars = 0

    @property
    def held_len(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        return max((pattern.num_matched for pattern in self._patterns), default=0)

    def skip(self, num_chars: int) -> None:
        """Skip characters in which no stop string may begin; none may have begun before them."""
        self._num_chars += num_chars

    def push(self, piece: str) -> Match | None:
        """Return the stop string that this piece completes: the one that begins first, then the longest."""
        matches = []
        for pattern in self._patterns:
            end = pattern.push(piece)
            if end is not None:
                stop = self._num_chars + end
                matches.append(Match(stop - len(pattern.string), stop, pattern.string))
        self._num_chars += len(piece)
        return min(matches, key=lambda match: (match.start, -match.end)) if matches else None


class _Pattern:
    """One string, by the algorithm of Knuth, Morris and Pratt (1977). The table of borders grows as far as it is
    needed: a long string of which nothing occurs costs nothing.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.num_matched = 0  # length of the longest end of the text that ``string`` begins with
        self._borders = [0]  # [i]: length of the longest proper end of string[:i + 1] that ``string`` begins with

    def push(self, piece: str) -> int | None:
        """Return how many characters of ``piece`` complete the string; None: it is not complete yet."""
        string, i = self.string, 0
        while i < len(piece):
            if self.num_matched == 0:
                i = piece.find(string[0], i)
                if i < 0:
                    return None
                self.num_matched = 1
            else:
                self._advance(piece[i])
            i += 1
            if self.num_matched == len(string):
                return i
        return None

    def _advance(self, character: str) -> None:
        length = self.num_matched
        while length and self.string[length] != character:
            length = self._border(length)
        self.num_matched = length + (self.string[length] == character)

    def _border(self, length: int) -> int:
        string, borders = self.string, self._borders
        while len(borders) < length:
            border = borders[-1]
            character = string[len(borders)]
            while border and string[border] != character:
                border = borders[border - 1]
            borders.append(border + (string[border] == character))
        return borders[length - 1]
