"""A request as the scheduler sees it: numbers only. Host only, no torch."""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field

from rtp_llm.srt.cache.prefix_cache import Lock
from rtp_llm.srt.cache.spec import LengthScaling
from rtp_llm.srt.constrained.backend import Matcher
from rtp_llm.srt.messages import FinishReason, GenerateRequest
from rtp_llm.srt.plan import Admission, KnownTokens
from rtp_llm.srt.pooling import PooledOutputs
from rtp_llm.srt.request_spec import RequestSpec

# A request's tokens, from left to right:
#
#   [0, cached_len)             in the prefix cache's pages, held by `lock`
#   [cached_len, num_committed) computed, in pages of its own
#   [num_committed, num_computed)  being computed by steps in flight
#   [num_computed, num_tokens)  known, or certain to be known (`num_pending`), and still to be computed
#
# `ids` holds the known ones: the prompt, then what was generated. `keys` are their cache keys: the same list, except
# for requests with media, whose keys distinguish the placeholders of different images.


MIN_FORCED_TOKENS = 2


@dataclass(slots=True)
class HeldStates:
    """What a request holds of recurrent states, if the model has any, and where they are to be saved."""

    slot: int = 0  # where they are kept while it runs; 0: it does not run
    load: int = 0  # the slot that its first tokens begin from
    resumed_len: int = 0  # tokens whose states ``load`` has
    points: list[int] = field(default_factory=list)  # ascending; positions still to be computed, to be saved
    # (position, slot), ascending: saved, or being saved by steps in flight, and not the prefix cache's yet.
    saves: list[tuple[int, int]] = field(default_factory=list)
    common_len: int = 0  # while it waits: tokens that it has in common with a running request


@dataclass(slots=True, eq=False)
class Request:
    rid: str
    order: int  # of arrival
    ids: list[int]
    keys: list[int]
    prompt_len: int
    spec: RequestSpec
    max_new_tokens: int  # copied from spec, as are stop_ids: read for each row and step
    stop_ids: list[int]
    namespace: Hashable  # of the prefix cache
    logprob_from: int | None = None  # position whose logits give the next prompt logprob still wanted
    matcher: Matcher | None = None  # of its grammar; it has taken the generated tokens
    # Whether its result depends on the last token's hidden state alone. Else its prompt is computed from the beginning
    # and nothing of it is taken from the prefix cache, which keeps keys and values and no hidden states.
    reuses_prefix: bool = True
    atomic_spans: list[tuple[int, int]] = field(default_factory=list)

    row: int = -1
    pages: list[list[int]] = field(default_factory=list)  # per cache group, its page table; 0: freed, out of reach
    first_page: list[int] = field(default_factory=list)  # per cache group, pages before this are out of reach
    lock: Lock = field(default_factory=lambda: Lock(0))
    states: HeldStates = field(default_factory=HeldStates)
    prefill_len: int = 0  # len(ids) when it was last admitted
    num_sent: int = 0  # ids that the workers know by themselves, beside the one drawn last
    num_computed: int = 0
    num_committed: int = 0
    num_pending: int = 0  # tokens that steps in flight are drawing
    in_flight: int = 0  # steps in flight that name it
    finished: bool = False
    is_broken: bool = False  # a step failed for it: its computed tokens must not be shared

    cached_tokens: int | None = None  # of the prompt, found in the cache when first admitted
    arrived_at: float = field(default_factory=time.monotonic)
    queue_time_s: float = 0.0  # until it was first admitted
    num_retractions: int = 0
    overtaken: int = 0  # how many later arrivals were admitted while it waited

    @classmethod
    def from_message(
        cls,
        message: GenerateRequest,
        order: int,
        length_scaling: LengthScaling | None = None,
        computes_blocks: bool = False,
        outputs: PooledOutputs | None = None,
    ) -> "Request":
        """Make a request of a message.

        Args:
            computes_blocks: the model computes each block of media in one step.
            outputs: that the model has; None: none but tokens.
        """
        spec, prompt_len = message.spec, len(message.prompt_ids)
        logprob_start_len = -1 if spec.logprobs is None else spec.logprobs.logprob_start_len
        key_class = 0 if length_scaling is None else length_scaling.key_class(prompt_len)
        ids = [*message.prompt_ids, *message.output_ids]
        request = cls(
            rid=message.rid,
            order=order,
            ids=ids,
            keys=ids if spec.media is None else [*spec.media.cache_keys, *message.output_ids],
            prompt_len=prompt_len,
            spec=spec,
            max_new_tokens=spec.max_new_tokens,
            stop_ids=spec.stop_ids,
            namespace=(spec.cache_salt, key_class),
            logprob_from=None if logprob_start_len < 0 else logprob_start_len,
            atomic_spans=spec.media.blocks if spec.media is not None and computes_blocks else [],
            reuses_prefix=outputs is None or not outputs.reads_prefix(spec.pooling),
        )
        request.take_prompt_logprobs(message.num_prompt_logprobs)
        return request

    @property
    def num_tokens(self) -> int:
        return len(self.ids) + self.num_pending

    @property
    def uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only its last token is left to compute, and draws in flight cannot have ended it before."""
        num_tokens = len(self.ids) + self.num_pending  # no calls of properties: this runs for each row and step
        if num_tokens - self.num_computed != 1:
            return False
        return num_tokens - self.prompt_len < self.max_new_tokens or self.num_computed < self.prompt_len

    @property
    def num_generated(self) -> int:
        return len(self.ids) - self.prompt_len

    @property
    def remaining_new_tokens(self) -> int:
        """Tokens that may still be drawn, beyond those in flight."""
        return self.max_new_tokens - self.num_generated - self.num_pending

    @property
    def cached_len(self) -> int:
        return self.lock.num_tokens

    @property
    def match_limit(self) -> int:
        """Tokens that the prefix cache may supply: logits of the last one, and for prompt logprobs, are computed."""
        if not self.reuses_prefix:
            return 0
        limit = len(self.ids) - 1
        return limit if self.logprob_from is None else min(limit, self.logprob_from)

    @property
    def insertable_len(self) -> int:
        """Leading tokens that are computed, known, and usable by other requests."""
        return 0 if self.is_broken else min(self.num_committed, len(self.ids))

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens that other requests may wait for are not in the prefix cache yet."""
        return self.cached_len < self.prefill_len

    @property
    def is_complete(self) -> bool:
        """Whether its grammar allows nothing more."""
        return self.matcher is not None and self.matcher.is_complete

    def append(self, token_id: int) -> None:
        self.ids.append(token_id)
        if self.keys is not self.ids:
            self.keys.append(token_id)

    def span_around(self, position: int) -> tuple[int, int] | None:
        """Return the atomic span that a cut before ``position`` would split, if any."""
        return next((span for span in self.atomic_spans if span[0] < position <= span[1]), None)

    def uncut(self, num_tokens: int, room: int) -> int:
        """Return ``num_tokens``, or the nearest number of next tokens that splits no atomic span; 0 if it exceeds
        ``room``."""
        span = self.span_around(self.num_computed + num_tokens) if num_tokens else None
        if span is None:
            return num_tokens
        first, last = span
        if first > self.num_computed:
            return first - self.num_computed
        whole = last + 1 - self.num_computed
        return whole if whole <= room else 0

    def take_prompt_logprobs(self, count: int) -> None:
        """Count ``count`` prompt logprobs as arrived; the last token's logits give none."""
        if self.logprob_from is not None:
            self.logprob_from += count
            if self.logprob_from >= self.prompt_len - 1:
                self.logprob_from = None

    def admission(self) -> Admission:
        return Admission(
            row=self.row,
            rid=self.rid,
            prompt_ids=self.ids[: self.prompt_len],
            output_ids=self.ids[self.prompt_len :],
            spec=self.spec,
            logprob_from=self.logprob_from,
            state_slot=self.states.slot,
        )

    def take(self, token_id: int) -> FinishReason | None:
        """Add a generated token; return why it ends the request, None if it does not."""
        self.append(token_id)
        reason = self.finish_reason_after(token_id)
        if self.matcher is None or (reason is not None and reason.type == "stop"):
            return reason
        if not self.matcher.accept(token_id):
            message = f"the grammar cannot be followed any further: {self.matcher.error}"
            return FinishReason("abort", message=message, status_code=400)
        return FinishReason("stop") if self.is_complete else reason

    def take_all(self, token_ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """Add drawn tokens, and those that follow without a draw; return what was added, and why it ends the request,
        None if it does not."""
        if self.matcher is None and len(token_ids) == 1:  # this runs for each row and step
            self.append(token_ids[0])
            return token_ids, self.finish_reason_after(token_ids[0])
        taken: list[int] = []
        while token_ids:
            for token_id in token_ids:
                taken.append(token_id)
                reason = self.take(token_id)
                if reason is not None:
                    return taken, reason
            token_ids = self.forced_tokens()
        return taken, None

    def to_send(self) -> KnownTokens:
        """Return the ids that the workers do not know yet."""
        known = KnownTokens(self.row, self.num_sent, self.ids[self.num_sent :])
        self.num_sent = len(self.ids)
        return known

    def forced_tokens(self) -> list[int]:
        """Return tokens that come next without a draw, if there are enough to be worth a step of several tokens."""
        if self.matcher is None or self.spec.needs_every_draw:
            return []
        forced = self.matcher.forced_tokens()
        return forced if len(forced) >= MIN_FORCED_TOKENS else []

    def ended_before(self) -> FinishReason | None:
        """Return why tokens that it came with, of a core that died, end it already; None if they do not."""
        reason = self.finish_reason_after(self.ids[-1]) if self.num_generated else None
        return FinishReason("stop") if reason is None and self.is_complete else reason

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Return why ``token_id``, just appended to ``ids``, ends the request; None if it does not."""
        num_generated = self.num_generated
        if token_id in self.stop_ids and num_generated > self.spec.params.min_new_tokens:
            return FinishReason("stop", matched=token_id)
        if num_generated >= self.max_new_tokens:
            return FinishReason("length", length=num_generated)
        return None
