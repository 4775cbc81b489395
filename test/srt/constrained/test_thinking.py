"""Thinking with a budget: how it is followed token by token, and what may come when the budget is spent."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rtp_llm.srt.constrained.backend import Matcher
from rtp_llm.srt.constrained.thinking import CONTENT, FRESH, THINKING, ThinkingMatcher, ThinkingWatch, fill_masks
from rtp_llm.srt.request_spec import GrammarSpec, ThinkingSpec

WORDS: list[str | bytes] = ["<think>", "</think>", "<call>", "a", " \n", "</th", "ink>b"]
WORDS += [b"\xc3", b"\xa9"]
BYTES = [word if isinstance(word, bytes) else word.encode() for word in WORDS]
OPEN, CLOSE, CALL, A, SPACE, HALF, REST, FIRST, SECOND = range(9)
SPEC = ThinkingSpec("<think>", "</think>", ("<call>",), False, True, 9, (SPACE, CLOSE))


def watched(ids: Sequence[int], **changes: object) -> ThinkingWatch:
    watch = ThinkingWatch(replace(SPEC, **changes), BYTES.__getitem__)  # type: ignore[arg-type]
    for token_id in ids:
        watch.push(token_id)
    return watch


@pytest.mark.parametrize(
    ("ids", "is_open", "anywhere", "state", "num_tokens"),
    [
        ([A, A], True, False, THINKING, 2),
        ([A, CLOSE], True, False, FRESH, 2),
        ([A, CLOSE, A, OPEN, A], True, False, CONTENT, 2),
        ([A, CLOSE, SPACE, OPEN, A], True, False, THINKING, 3),
        ([A, CALL, OPEN], True, False, CONTENT, 2),
        ([A, HALF, REST], True, False, CONTENT, 3),
        ([A, HALF, A, REST], True, False, THINKING, 4),
        ([SPACE, OPEN, A], False, False, THINKING, 1),
        ([A, OPEN, A], False, False, CONTENT, 0),
        ([A, OPEN, A], False, True, THINKING, 1),
        ([A, OPEN, A, CLOSE, A, OPEN, A], False, True, THINKING, 3),
        ([], False, True, FRESH, 0),
    ],
)
def test_where_an_answer_thinks(ids: list[int], is_open: bool, anywhere: bool, state: str, num_tokens: int) -> None:
    watch = watched(ids, is_open=is_open, anywhere=anywhere)
    assert (watch.state, watch.num_tokens) == (state, num_tokens)


def test_the_budget_is_spent_at_the_end_of_a_character() -> None:
    assert not watched([A], budget=2).is_spent and watched([A, A], budget=2).is_spent
    assert not watched([A, FIRST], budget=2).is_spent and watched([A, FIRST, SECOND], budget=2).is_spent
    assert watched([], budget=0).is_spent and not watched([], budget=0, is_open=False).is_spent


class OneWord:
    """A grammar of one word."""

    def __init__(self, word: int, count: int = 0) -> None:
        self.word, self.count, self.error = word, count, ""

    def fork(self) -> "OneWord":
        return OneWord(self.word, self.count)

    def accept(self, token_id: int) -> bool:
        self.count += 1
        self.error = "" if token_id == self.word else "another word"
        return not self.error

    def forced_tokens(self) -> list[int]:
        return [] if self.is_complete else [self.word]

    @property
    def is_complete(self) -> bool:
        return self.count > 0


class OneWordBackend:
    def compile(self, spec: GrammarSpec, end_ids: Sequence[int]) -> Matcher:
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        return BYTES[token_id]

    def fill(self, matchers: Sequence[Matcher], words: "np.ndarray[tuple[int, ...], np.dtype[np.int32]]") -> None:
        for row, matcher in enumerate(matchers):
            assert isinstance(matcher, OneWord)
            words[row] = 1 << matcher.word


def allowed(*matchers: Matcher) -> list[list[int]]:
    words = np.zeros((len(matchers), 1), dtype=np.int32)
    fill_masks(OneWordBackend(), matchers, words)
    return [[i for i in range(32) if int(row[0]) >> i & 1] for row in words]


def test_the_end_is_forced() -> None:
    every = list(range(32))
    matcher = ThinkingMatcher(watched([], budget=2), None, forces_tokens=True)
    assert matcher.accept(A) and allowed(matcher) == [every] and not matcher.forced_tokens()
    assert matcher.accept(A) and matcher.forced_tokens() == [SPACE, CLOSE]
    assert allowed(matcher, OneWord(A)) == [[SPACE], [A]]
    copy = matcher.fork()
    assert not copy.accept(A) and "budget" in copy.error
    assert matcher.accept(SPACE) and matcher.accept(CLOSE) and not matcher.error
    assert allowed(matcher, OneWord(A), OneWord(OPEN)) == [every, [A], [OPEN]] and not matcher.is_complete
    drawn = ThinkingMatcher(watched([], budget=0), None)
    assert drawn.forced_tokens() == [] and allowed(drawn) == [[SPACE]]


def test_a_grammar_of_all_of_the_text() -> None:
    matcher = ThinkingMatcher(watched([], budget=5), OneWord(A))
    assert allowed(matcher) == [[A]] and matcher.accept(A) and matcher.is_complete
    assert not matcher.accept(SPACE) and matcher.error == "another word"
    ends = ThinkingMatcher(watched([], budget=0), OneWord(SPACE))
    assert allowed(ends) == [[SPACE]] and ends.accept(SPACE) and not ends.is_complete  # its end is still to come
    assert not ends.accept(CLOSE) and ends.error == "another word"
