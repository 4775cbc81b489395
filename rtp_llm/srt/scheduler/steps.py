"""The scheduler's records of steps: the budget of the one being planned, those in flight, totals of all."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rtp_llm.srt.constrained.backend import Matcher
from rtp_llm.srt.plan import KnownTokens, PageWrite, StepPlan
from rtp_llm.srt.scheduler.request import Request


@dataclass(slots=True)
class SchedulerStats:
    """Totals since the start, in tokens and requests."""

    computed_tokens: int = 0
    prompt_tokens: int = 0  # of requests when first admitted
    cached_tokens: int = 0  # of prompt_tokens: found in the prefix cache
    generated_tokens: int = 0
    finished_requests: int = 0
    retractions: int = 0
    shared_tokens: int = 0  # that attention did not read again for another request of the step


@dataclass(slots=True)
class StepInFlight:
    plan: StepPlan
    requests: list[Request]

    def masked_rows(self) -> list[int]:
        """Return the rows whose next token a grammar restricts."""
        pairs = zip(self.requests, self.plan.work, strict=True)
        return [work.row for request, work in pairs if work.sample and request.matcher is not None]

    def matchers(self) -> list[Matcher]:
        """Return the matchers of these rows."""
        pairs = zip(self.requests, self.plan.work, strict=True)
        return [request.matcher for request, work in pairs if work.sample and request.matcher is not None]


@dataclass(slots=True)
class Budget:
    """Prompt tokens that a step may still compute."""

    tokens: int
    cut: bool  # prompts may be cut
    untouched: bool = True

    def share_of(self, uncomputed: int, room: int) -> int:
        """Number of its ``uncomputed`` tokens that a request computes in this step."""
        if uncomputed == 1:
            return min(1, room)
        if self.cut:
            return max(0, min(uncomputed, self.tokens, room))
        fits = uncomputed <= room and (uncomputed <= self.tokens or self.untouched)
        return uncomputed if fits else 0

    @property
    def is_spent(self) -> bool:
        return self.tokens <= 0

    def spend(self, num_tokens: int) -> None:
        if num_tokens > 1:
            self.tokens -= num_tokens
            self.untouched = False


@dataclass(slots=True)
class PendingPlan:
    """Releases and page writes that the next plan must carry besides its work."""

    releases: list[int] = field(default_factory=list)
    page_writes: list[PageWrite] = field(default_factory=list)
    known_tokens: list[KnownTokens] = field(default_factory=list)

    def leave_out(self, row: int) -> None:
        """Forget what was to be written of a row that is given back."""
        self.page_writes = [write for write in self.page_writes if write.row != row]
        self.known_tokens = [known for known in self.known_tokens if known.row != row]
        self.releases.append(row)


def decoding_share(running: Sequence[Request], num_stages: int) -> list[Request]:
    """Return the requests whose next token a step computes: all; in a pipeline of stages, where a row waits until its
    last token is known, an equal share, so that each stage has rows."""
    decoding = [request for request in running if request.is_decoding]
    if num_stages == 1:
        return decoding
    share = -(-len(decoding) // num_stages)
    return [request for request in decoding if not request.num_pending][:share]
