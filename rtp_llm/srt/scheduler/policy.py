"""The order in which waiting requests are tried. Host only, no torch."""

from bisect import insort
from collections.abc import Callable, Iterator

from rtp_llm.srt.scheduler.request import Request

POLICIES = ("fcfs", "lpm", "priority")

# Longest-prefix matching looks at every waiting request; with more than these it would cost more than it gains.
LPM_QUEUE_LIMIT = 128
# A request that so many later ones have overtaken goes first, whatever the policy.
OVERTAKEN_LIMIT = 64


class WaitingQueue:
    """Requests that hold nothing, in the order in which they are tried.

    ``fcfs``: by arrival. ``lpm``: longest cached prefix first, without starvation. ``priority``: lowest number first,
    then by arrival; a request waits for as long as others come before it, without a bound.
    """

    def __init__(self, policy: str, matched_len: Callable[[Request], int]) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown schedule policy {policy!r}; have {list(POLICIES)}")
        self._policy = policy
        self._matched_len = matched_len
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Add a request; a retracted one gets its old place back."""
        insort(self._requests, request, key=self.place)

    def place(self, request: Request) -> tuple[int, int]:
        """Return the key that requests are sorted by; of the running ones, the last is retracted first."""
        return request.spec.priority if self._policy == "priority" else 0, request.order

    def remove(self, request: Request) -> None:
        self._requests.remove(request)

    def admitted(self, request: Request) -> None:
        """Take a request out, and count it for those that it overtook, unless the policy is ``priority``."""
        self.remove(request)
        if self._policy == "priority":
            return
        for other in self._requests:
            if other.order > request.order:
                break
            other.overtaken += 1

    def candidates(self) -> list[Request]:
        if self._policy != "lpm" or len(self._requests) > LPM_QUEUE_LIMIT:
            return list(self._requests)
        overdue = [r for r in self._requests if r.overtaken >= OVERTAKEN_LIMIT]
        others = [r for r in self._requests if r.overtaken < OVERTAKEN_LIMIT]
        return overdue + sorted(others, key=self._matched_len, reverse=True)
