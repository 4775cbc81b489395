"""The contract between the client side (HTTP or offline API) and the core. Plain data, no torch, no sockets."""

from dataclasses import dataclass, field
from typing import Literal

from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.request_spec import RequestSpec


@dataclass(slots=True)
class FinishReason:
    """Why a request ended: ``stop`` (an id or a string matched), ``length``, or ``abort`` (with a message)."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None  # the HTTP status of an abort

    def to_dict(self) -> dict:
        """The reference's shape: ``{"type": "stop", "matched": 2}``, ``{"type": "length", "length": 16}``."""
        if self.type == "stop":
            return {"type": "stop", "matched": self.matched}
        if self.type == "length":
            return {"type": "length", "length": self.length}
        return {"type": "abort", "message": self.message, "status_code": self.status_code}


@dataclass(slots=True)
class GenerateRequest:
    """One sequence to generate. ``n > 1`` is several requests with seeds ``seed + i``.

    ``output_ids`` and ``num_prompt_logprobs`` are what came before (a resubmission after the core died): the core goes
    on from there, with penalties, lengths and random positions counted from ``prompt_ids`` on.
    """

    rid: str
    prompt_ids: list[int]
    spec: RequestSpec
    output_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0


@dataclass(slots=True)
class AbortRequest:
    """End ``rid`` and free what it holds; every live request if ``rid`` is None."""

    rid: str | None


@dataclass(slots=True)
class FlushCache:
    call_id: str


@dataclass(slots=True)
class Shutdown:
    pass


@dataclass(slots=True)
class TokenOutput:
    """News of one request: new ids since the last news, and, once, how it ended.

    ``prompt_logprobs`` are those of prompt tokens ``logprob_start_len + 1 ...`` in order, possibly in several parts.
    """

    rid: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache when the request was first admitted
    prompt_tokens: int = 0  # of the prompt as the model sees it: media may have made it longer
    num_retractions: int = 0
    queue_time_s: float = 0.0  # from its arrival in the core until it was first admitted
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class FlushCacheDone:
    call_id: str
    success: bool
    message: str = ""


@dataclass(slots=True)
class Ping:
    """Asks for CoreStats: a core that does not answer in time is dead."""


@dataclass(slots=True)
class CoreStats:
    """How the core is doing: now, and in all since it started."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_tokens: int = 0  # of the cache group that is fullest: held by requests, not just cached
    max_total_tokens: int = 0
    num_held_tokens: int = 0  # of the first cache group: requests hold them,
    num_evictable_tokens: int = 0  # only the prefix cache does,
    num_free_tokens: int = 0  # or nobody: together max_total_tokens
    evicted_tokens: int = 0  # in all, from the prefix cache of any group
    recent_retractions: int = 0  # since the last report
    token_usage: float = 0.0  # num_used_tokens / max_total_tokens
    cache_hit_rate: float = 0.0  # of the prompt tokens admitted since the last report
    gen_throughput: float = 0.0  # tokens per second since the last report
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    retractions: int = 0


@dataclass(frozen=True, slots=True)
class CoreInfo:
    """What a core tells when it is ready."""

    max_total_tokens: int
    max_req_len: int
    max_running_requests: int
    chunked_prefill_size: int
    weight_bytes: int  # per rank, as is cache_bytes
    cache_bytes: int
    device: str


ToCore = GenerateRequest | AbortRequest | FlushCache | Ping | Shutdown
FromCore = TokenOutput | FlushCacheDone | CoreStats
