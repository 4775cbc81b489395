"""What one request asks for: described once, where it comes in, and carried whole to whoever reads a part of it.

    Prompt -> GenerateRequest -> scheduler.Request -> Admission -> the row of a worker
                      each with the same RequestSpec

Nothing of it changes while the request lives, be it retracted or taken up by another core. What does change stands
beside it: ids, what has been answered already, pages. An adapter's name and a grammar's text will stand in here, read
by the workers that load the one and make masks of the other.
"""

from dataclasses import dataclass, field

from rtp_llm.srt.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class LogprobSpec:
    """Which log-probabilities are wanted: of each generated token, and what these fields add."""

    logprob_start_len: int = -1  # also of prompt tokens after this position, in [0, prompt length]; -1: of none
    top_logprobs_num: int = 0  # alternatives per position, best first
    token_ids_logprob: tuple[int, ...] = ()  # ids wanted at every position
    return_text_in_logprobs: bool = False


@dataclass(frozen=True, slots=True, weakref_slot=True)
class MediaFile:
    """A file of encoded media. It lives as long as the object that ``MediaStore.put`` gave for it."""

    path: str


@dataclass(frozen=True, slots=True)
class PromptMedia:
    """A prompt's media, placed among its ids.

    ``content`` is what ``MultimodalInputs.encode`` made, or, for workers in other processes, the file that holds it:
    nobody but the workers reads it. ``cache_keys`` are the prompt as the prefix cache knows it, with ids made of the
    media's contents where these are. ``blocks`` are runs (first, last) of positions that hold media, neighbours joined:
    some models compute each in one step.
    """

    content: bytes | MediaFile = field(repr=False)
    cache_keys: list[int]
    blocks: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request, checked: every value is in range, and ``params.max_new_tokens`` is decided.

    Raises:
        ValueError: it is not.
    """

    params: SamplingParams  # a copy that nobody changes
    seed: int  # in [0, 2**64)
    logprobs: LogprobSpec | None = None
    media: PromptMedia | None = None
    cache_salt: str = ""  # requests share cached prefixes only with equal salts
    priority: int = 0  # the policy "priority" schedules lower numbers earlier; the others do not look at it
    eos_token_ids: tuple[int, ...] = ()  # end it unless ignore_eos

    def __post_init__(self) -> None:
        if self.params.max_new_tokens is None:
            raise ValueError("params.max_new_tokens is unset: it is decided before a request is described")

    @property
    def max_new_tokens(self) -> int:
        """Most tokens to generate."""
        assert self.params.max_new_tokens is not None  # checked
        return self.params.max_new_tokens

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end the request; banned while fewer than ``min_new_tokens`` are generated."""
        ends = () if self.params.ignore_eos else self.eos_token_ids
        return list(dict.fromkeys([*ends, *self.params.stop_token_ids]))
