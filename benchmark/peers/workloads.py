"""The offline workloads W1 to W4: what is asked, and which figures come of the times. Standard library only."""

import random
from dataclasses import dataclass

from benchmark.peers.protocol import Timing, Work


@dataclass(frozen=True)
class Figure:
    """A figure's name and unit, and whether a smaller one is better."""

    name: str
    unit: str
    smaller_is_better: bool = False

    def ratio(self, ours: float, theirs: float) -> float:
        """Above 1: ours is better."""
        return theirs / ours if self.smaller_is_better else ours / theirs


@dataclass(frozen=True)
class Workload:
    """Requests that are there at once: each has ``shared_len`` common and ``own_len`` own tokens."""

    name: str
    title: str
    num_requests: int
    shared_len: int
    own_len: int
    output_len: int
    figures: tuple[Figure, ...]

    def work(self, vocab_size: int, seed: int, output_len: int | None = None) -> Work:
        """The same prompts for the same seed; other seeds share no prefix. ``output_len`` replaces the workload's."""
        draw = random.Random(f"{self.name} {seed}")
        shared = [draw.randrange(vocab_size) for _ in range(self.shared_len)]
        prompts = [shared + [draw.randrange(vocab_size) for _ in range(self.own_len)] for _ in range(self.num_requests)]
        return Work(self.name, prompts, self.shared_len, output_len or self.output_len)

    def measure(self, timing: Timing) -> dict[str, float]:
        """The workload's figures, by name."""
        after_first_s = timing.total_s - timing.first_token_s
        every = {
            PREFILL.name: self.own_len / timing.first_token_s,
            DECODE.name: (timing.output_tokens - 1) / after_first_s if after_first_s > 0 else float("nan"),
            FIRST_TOKEN.name: timing.first_token_s,
            OUTPUT.name: timing.output_tokens / timing.total_s,
        }
        return {figure.name: every[figure.name] for figure in self.figures}


DECODE = Figure("decode", "tok/s")
PREFILL = Figure("prefill", "tok/s")
FIRST_TOKEN = Figure("first token", "s", smaller_is_better=True)
OUTPUT = Figure("output", "tok/s")

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "one stream, 128 in, 128 out", 1, 0, 128, 128, (DECODE, PREFILL)),
        Workload("W2", "2,048 in, 16 out", 1, 0, 2048, 16, (FIRST_TOKEN,)),
        Workload("W3", "16 at once, 128 in, 128 out each", 16, 0, 128, 128, (OUTPUT,)),
        Workload("W4", "32 at once, 1,024 shared and 32 own in, 32 out each", 32, 1024, 32, 32, (OUTPUT,)),
    )
}
MOST_TOKENS_SHARED = 8192  # room in a cache that shares prefixes: W3 fills half of it
