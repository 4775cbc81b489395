"""The description of a request: made once, where the request comes in, and passed on whole to all that read it.

    Prompt -> GenerateRequest -> scheduler.Request -> Admission -> the row of a worker
                      each with the same RequestSpec

It does not change while the request lives, also after a retraction or a core's death. Changing state is kept beside it:
ids, results sent so far, pages. An adapter's name will be added here, for the workers that load adapters.
"""

from dataclasses import dataclass, field
from typing import Literal

from rtp_llm.srt.pooling import PoolingSpec
from rtp_llm.srt.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class LogprobSpec:
    """The wanted log-probabilities: those of each generated token, and those that these fields add."""

    logprob_start_len: int = -1  # also of prompt tokens after this position, in [0, prompt length]; -1: of none
    top_logprobs_num: int = 0  # alternatives per position, best first
    token_ids_logprob: tuple[int, ...] = ()  # ids wanted at every position
    return_text_in_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What a generated text must match: as a whole, or the part of it that is ``@content`` in the grammar ``around``.

    ``text`` is, by ``kind``: a JSON schema; a regular expression; a grammar in GBNF or in Lark; a JSON list of texts of
    which one is generated; a structural tag in JSON (calls of functions within free text).
    """

    kind: Literal["json_schema", "regex", "grammar", "choice", "structural_tag"]
    text: str
    whitespace: str | None = None  # regular expression of the space between JSON tokens; None: the back end's usual
    around: str | None = None  # in Lark's form


@dataclass(frozen=True, slots=True)
class ThinkingSpec:
    """How a text's thinking is told, and what is to become of it.

    ``open`` and ``close`` are its tags; one of ``others`` ends it, too. It may be opened at the beginning, after white
    space, or with ``anywhere`` wherever its tag stands; with ``is_open`` the text begins with it, without the tag.
    After ``budget`` tokens of thinking, wherever they stand, ``end_ids`` come next.
    """

    open: str
    close: str
    others: tuple[str, ...]
    anywhere: bool
    is_open: bool
    budget: int
    end_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class MediaFile:
    """A file of encoded media. It lives as long as the object that ``MediaStore.put`` returned for it."""

    path: str


@dataclass(frozen=True, slots=True)
class PromptMedia:
    """A prompt's media, placed among its ids.

    ``content`` is the result of ``MultimodalInputs.encode``, or, for workers in other processes, a file with it; only
    workers read it. ``cache_keys`` are the prompt's ids with numbers made of the media's contents in place of their
    placeholders. ``blocks`` are runs (first, last) of positions of media, adjacent ones joined: some models compute
    each in one step.
    """

    content: bytes | MediaFile = field(repr=False)
    cache_keys: list[int]
    blocks: list[tuple[int, int]]

    def too_long_for(self, max_block: int) -> str | None:
        """Return why a block is too long for a model that computes each in one step of ``max_block`` tokens; None if
        none is, or if ``max_block`` is 0: the model computes media in pieces."""
        longest = max((last - first + 1 for first, last in self.blocks), default=0)
        if not 0 < max_block < longest:
            return None
        return (
            f"media side by side take {longest} tokens, but this model computes them in one step, of {max_block} at "
            "most (max_media_block): send fewer, or text between them"
        )


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """A checked request: every value is in range, and ``params.max_new_tokens`` is decided.

    Raises:
        ValueError: ``params.max_new_tokens`` is None, or not 0 where a pooled output is asked for.
    """

    params: SamplingParams  # a copy that is not changed
    seed: int  # in [0, 2**64)
    logprobs: LogprobSpec | None = None
    media: PromptMedia | None = None
    cache_salt: str = ""  # requests share cached prefixes only with equal salts
    priority: int = 0  # the policy "priority" schedules lower numbers earlier; other policies ignore it
    eos_token_ids: tuple[int, ...] = ()  # end the request unless ignore_eos
    grammar: GrammarSpec | None = None  # None: the text is free
    thinking: ThinkingSpec | None = None  # None: it is text like any other
    pooling: PoolingSpec | None = None  # a pooled output in place of tokens; then ``max_new_tokens`` is 0

    def __post_init__(self) -> None:
        if self.params.max_new_tokens is None:
            raise ValueError("params.max_new_tokens is unset: it is decided before a request is described")
        if self.pooling is not None and self.params.max_new_tokens:
            raise ValueError(f"a pooled output comes without tokens, not with {self.params.max_new_tokens}")

    @property
    def max_new_tokens(self) -> int:
        """Largest number of tokens to generate."""
        assert self.params.max_new_tokens is not None  # checked
        return self.params.max_new_tokens

    @property
    def needs_matcher(self) -> bool:
        """Whether what may come next depends on what came."""
        return self.grammar is not None or self.thinking is not None

    @property
    def needs_every_draw(self) -> bool:
        """Whether more is wanted of a generated token than its id: a log-probability, or its effect on later draws."""
        return self.logprobs is not None or self.params.depends_on_output

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end the request; banned while fewer than ``min_new_tokens`` are generated."""
        ends = () if self.params.ignore_eos else self.eos_token_ids
        return list(dict.fromkeys([*ends, *self.params.stop_token_ids]))
