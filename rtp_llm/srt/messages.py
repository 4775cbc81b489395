"""The messages between the client side (HTTP or offline API) and the core. Plain data, no torch, no sockets."""

from dataclasses import dataclass, field
from typing import Literal

from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.pooling import ONLY_TOKENS, PooledOutput, PooledOutputs
from rtp_llm.srt.request_spec import RequestSpec


@dataclass(slots=True)
class FinishReason:
    """The reason why a request ended: ``stop`` (an id or a string matched), ``length``, or ``abort`` (a message)."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None  # the HTTP status of an abort

    def to_dict(self) -> dict:
        """Return the JSON object of the native API, such as ``{"type": "stop", "matched": 2}``."""
        if self.type == "stop":
            return {"type": "stop", "matched": self.matched}
        if self.type == "length":
            return {"type": "length", "length": self.length}
        return {"type": "abort", "message": self.message, "status_code": self.status_code}


@dataclass(slots=True)
class GenerateRequest:
    """One sequence to generate, or, with ``spec.pooling``, to make a pooled output of. A call with ``n > 1`` is several
    requests with seeds ``seed + i``.

    ``output_ids`` and ``num_prompt_logprobs`` are the results so far of a request that is resubmitted after the core
    died: the core resumes after them, with penalties, lengths and random positions counted from ``prompt_ids`` on.
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
    """New results of one request: ids since the last output, and, once, why it ended.

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
    pooled: PooledOutput | None = None  # with the finish reason, if the request asks for one


@dataclass(slots=True)
class FlushCacheDone:
    call_id: str
    success: bool
    message: str = ""


@dataclass(slots=True)
class Ping:
    """Request CoreStats; a core that does not answer in time counts as dead."""


@dataclass(slots=True)
class CoreStats:
    """Figures of the core: the current state, and totals since it started."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_tokens: int = 0  # of the fullest cache group: held by requests, not only cached
    max_total_tokens: int = 0
    # Of the first cache group; the three sum to max_total_tokens.
    num_held_tokens: int = 0  # held by requests
    num_evictable_tokens: int = 0  # held only by the prefix cache
    num_free_tokens: int = 0
    evicted_tokens: int = 0  # total, from the prefix cache of any group
    recent_retractions: int = 0  # since the last report
    token_usage: float = 0.0  # num_used_tokens / max_total_tokens
    cache_hit_rate: float = 0.0  # of the prompt tokens admitted since the last report
    gen_throughput: float = 0.0  # tokens per second since the last report
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    retractions: int = 0
    num_grammar_queue: int = 0  # requests whose grammars are being compiled
    state_usage: float = 0.0  # slots for recurrent states that requests hold, as a part of all
    # Of experts that are divided over ranks: tokens that each has computed, all layers together, and in the layer where
    # it is largest, how many times the mean of the parts the busiest part has computed.
    expert_tokens: list[int] = field(default_factory=list)
    expert_imbalance: float = 0.0
    # Of each stage of a pipeline, the part of the time with requests, since the last report, in which it computed.
    stage_usage: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CoreInfo:
    """A core's report when it is ready."""

    max_total_tokens: int
    max_req_len: int
    max_running_requests: int
    chunked_prefill_size: int
    weight_bytes: int  # per rank, as is cache_bytes
    cache_bytes: int
    device: str
    state_bytes: int = 0  # of one request, per rank; 0: the model keeps no recurrent states
    outputs: PooledOutputs = ONLY_TOKENS  # besides tokens, or in their place
    free_bytes: int = 0  # that were free before it started: what it planned with
    kv_event_endpoint: str | None = None  # where events of the prefix cache are published, as the core resolved it
    kv_replay_endpoint: str | None = None


ToCore = GenerateRequest | AbortRequest | FlushCache | Ping | Shutdown
FromCore = TokenOutput | FlushCacheDone | CoreStats
