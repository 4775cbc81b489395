"""Thinking that ends after so many tokens at the latest."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

from rtp_llm.srt.constrained.backend import GrammarBackend, Matcher
from rtp_llm.srt.request_spec import ThinkingSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TokenBytes = Callable[[int], bytes]
FRESH, THINKING, CONTENT = "fresh", "thinking", "content"
MAX_CHARACTER_BYTES = 4


class ThinkingWatch:
    """Follows an answer's tokens: where it thinks, and how much it has thought.

    Args:
        token_bytes: what a token adds to a text.
    """

    def __init__(self, spec: ThinkingSpec, token_bytes: TokenBytes) -> None:
        self.spec = spec
        self.state = THINKING if spec.is_open else FRESH  # fresh: nothing but space has come since its beginning
        self.num_tokens = 0  # of thinking
        self._token_bytes = token_bytes
        self._held = b""  # the end of the text, with which a tag may begin
        self._ends = tuple(tag.encode() for tag in (spec.close, *spec.others))
        self._open = spec.open.encode()

    def fork(self) -> Self:
        copy = type(self)(self.spec, self._token_bytes)
        copy.state, copy.num_tokens, copy._held = self.state, self.num_tokens, self._held
        return copy

    @property
    def is_spent(self) -> bool:
        """Whether the thinking must end now: not within a character."""
        return self.state == THINKING and self.num_tokens >= self.spec.budget and not _is_cut(self._held)

    def push(self, token_id: int) -> None:
        self.num_tokens += self.state == THINKING
        text = self._held + self._token_bytes(token_id)
        state = None
        while state != self.state:  # one token may hold several tags
            state = self.state
            text = self._read(text)
        self._held = text

    def _read(self, text: bytes) -> bytes:
        """Go on to the next state, if the text leads there; return what is still to be looked at."""
        if self.state == THINKING:
            found = [(place, tag) for tag in self._ends if (place := text.find(tag)) >= 0]
            if not found:
                return text[-max(map(len, (*self._ends, b" " * MAX_CHARACTER_BYTES))) :]
            place, tag = min(found)
            self.state = FRESH if tag == self._ends[0] else CONTENT
            return text[place + len(tag) :]
        if self.spec.anywhere:
            place = text.find(self._open)
            if place < 0:
                return text[-len(self._open) :]
            self.state = THINKING
            return text[place + len(self._open) :]
        if self.state == FRESH and (begun := text.lstrip()):
            if begun.startswith(self._open):
                self.state = THINKING
                return begun[len(self._open) :]
            if not self._open.startswith(begun):
                self.state = CONTENT
        return text if self.state == FRESH else b""


class ThinkingMatcher:
    """See Matcher. Keeps the budget of thinking in a text that ``inner`` binds; None: that is free.

    Args:
        forces_tokens: ``forced_tokens`` says which need no draw.
    """

    def __init__(self, watch: ThinkingWatch, inner: Matcher | None, forces_tokens: bool = False) -> None:
        self.inner = inner
        self._watch = watch
        self._forces_tokens = forces_tokens
        self._forced: Sequence[int] = ()  # of the end of thinking, what is still to come
        self._error = ""
        self._check_budget()

    @property
    def forced(self) -> int | None:
        """The only token that may come next; None: the budget demands none."""
        return self._forced[0] if self._forced else None

    def fork(self) -> Self:
        copy = type(self)(self._watch.fork(), None if self.inner is None else self.inner.fork(), self._forces_tokens)
        copy._error, copy._forced = self._error, self._forced
        return copy

    def accept(self, token_id: int) -> bool:
        if self._forced:
            if token_id != self._forced[0]:
                self._error = "the thinking has come to its budget, and must end"
                return False
            self._forced = self._forced[1:]
        self._watch.push(token_id)
        if not self._forced:
            self._check_budget()
        return self.inner is None or self.inner.accept(token_id)

    def forced_tokens(self) -> list[int]:
        if self._forced:
            return list(self._forced) if self._forces_tokens else []
        return [] if self.inner is None else self.inner.forced_tokens()

    @property
    def is_complete(self) -> bool:
        return not self._forced and self.inner is not None and self.inner.is_complete

    @property
    def error(self) -> str:
        return self._error or ("" if self.inner is None else self.inner.error)

    def _check_budget(self) -> None:
        if self._watch.is_spent:
            self._forced = self._watch.spec.end_ids


def fill_masks(backend: GrammarBackend, matchers: Sequence[Matcher], words: "npt.NDArray[np.int32]") -> None:
    """Do as ``GrammarBackend.fill`` for its own matchers and for those of thinking around them."""
    bound: list[tuple[int, Matcher]] = []
    for row, matcher in enumerate(matchers):
        if not isinstance(matcher, ThinkingMatcher):
            bound.append((row, matcher))
        elif matcher.forced is not None:
            word, bit = divmod(matcher.forced, 32)
            words[row] = 0
            words.view("uint32")[row, word] = 1 << bit
        elif matcher.inner is not None:
            bound.append((row, matcher.inner))
        else:
            words[row] = -1
    if len(bound) == len(matchers):
        backend.fill([matcher for _, matcher in bound], words)
    elif bound:
        rows = [row for row, _ in bound]
        masks = words[rows]
        backend.fill([matcher for _, matcher in bound], masks)
        words[rows] = masks


def _is_cut(text: bytes) -> bool:
    """Return whether a text ends within a character of UTF-8."""
    for back in range(1, min(MAX_CHARACTER_BYTES, len(text)) + 1):
        byte = text[-back]
        if byte < 0x80:
            return False
        if byte >= 0xC0:
            return back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
    return False
