"""The port of grammar compilers: from a description of a grammar to masks of the tokens that may come next."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self

from rtp_llm.srt.request_spec import GrammarSpec
from rtp_llm.srt.sampling_params import InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class GrammarError(InvalidRequest):
    """A grammar that cannot be compiled, or not be honoured wholly; the message says what is wrong with it."""


class Matcher(Protocol):
    """A compiled grammar and the tokens that it has taken. Used by one thread at a time."""

    def fork(self) -> Self:
        """Return a matcher of its own with the same tokens."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take the next token; return whether the grammar allows it. After False, ``error`` says more."""
        ...

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must come next, as a tokenizer writes their text; empty: there is a choice."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but the end of the text."""
        ...

    @property
    def error(self) -> str:
        """Why the matcher cannot go on: a token was not allowed, or a limit was reached. Empty: it can."""
        ...


class GrammarBackend(Protocol):
    """A compiler of grammars for one vocabulary."""

    def compile(self, spec: GrammarSpec, end_ids: Sequence[int]) -> Matcher:
        """Return a matcher that has taken no token yet.

        Args:
            end_ids: tokens that end a text; allowed where the grammar may end. None of them: the grammar alone ends it.

        Raises:
            GrammarError: see there.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to a text; of a special token, its name."""
        ...

    def fill(self, matchers: Sequence[Matcher], words: "npt.NDArray[np.int32]") -> None:
        """Write the masks of what may come next; after an error, all of it.

        Args:
            words: of ``plan.TokenMasks``, a row for each matcher.
        """
        ...
