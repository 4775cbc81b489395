"""Pooled outputs: what a request may ask for in place of tokens, what a model has of it, and results as bytes.

    PoolingSpec (a request's) -> PoolingTask (the model's) -> PooledOutput (the result)

Host only, no torch and no numpy.
"""

import math
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

# The names of outputs, with what they are. A model may have others.
TASKS = {
    "embed": "a vector for the whole input",
    "token_embed": "a vector for each token (late interaction; ColBERT: Khattab and Zaharia, 2020)",
    "sparse": "weights of the input's tokens (BGE-M3: Chen et al., 2024) or of all (SPLADE: Formal et al., 2021)",
    "classify": "the probability of each label",
    "token_classify": "the probability of each label, for each token",
    "score": "how well the second text of a pair fits the first",
    "reward": "how good an answer is, as a reward model's number or numbers",
}
MAX_POOLED_BYTES = 1 << 28  # of one result: its tokens times its width in float32


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """What one request asks for in place of tokens.

    ``dimensions``: of each vector, its first so many components (Matryoshka; Kusupati et al., 2022); None: all.
    ``normalize``: True: vectors of length one, probabilities; False: vectors of any length, numbers before softmax or
    sigmoid; None: as the checkpoint has it. ``pair_start``: the position at which the second text of a pair begins, for
    models with token types; None: there is no pair, or the model has no types. ``against``: vectors of another text's
    tokens: the result is one number, how well they fit those of this one (MaxSim). ``skip``: so many tokens at the
    beginning are not read: those of a text that was put before the input.
    """

    task: str
    dimensions: int | None = None
    normalize: bool | None = None
    pair_start: int | None = None
    against: "PooledOutput | None" = None
    skip: int = 0


@dataclass(frozen=True, slots=True)
class PoolingTask:
    """A pooled output that a model has.

    ``width``: components of a vector, or labels. ``per_token``: the result has a line for each token that is read,
    else it is one line. ``reads_prefix``: it depends on other tokens' hidden states than the last one's, so that no
    prefix is taken from the cache, which has none.
    """

    name: str
    width: int
    per_token: bool = False
    reads_prefix: bool = True

    def too_large(self, num_tokens: int) -> str | None:
        """Return why the result for so many tokens cannot be sent; None if it can."""
        num_bytes = 4 * self.width * (num_tokens if self.per_token else 1)
        if num_bytes <= MAX_POOLED_BYTES:
            return None
        return (
            f"the output {self.name!r} of {num_tokens} tokens would take {num_bytes >> 20} MiB, and at most "
            f"{MAX_POOLED_BYTES >> 20} MiB are sent: give a shorter input"
        )


@dataclass(frozen=True, slots=True)
class PooledOutputs:
    """The pooled outputs of a model. ``generates``: it makes tokens, too."""

    tasks: tuple[PoolingTask, ...] = ()
    generates: bool = True

    def find(self, name: str) -> PoolingTask | None:
        return next((task for task in self.tasks if task.name == name), None)

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def reads_prefix(self, spec: PoolingSpec | None) -> bool:
        """Whether a request's result depends on hidden states before the last token's."""
        task = None if spec is None else self.find(spec.task)
        return task is not None and task.reads_prefix

    def problem(self, spec: PoolingSpec | None, num_tokens: int = 0) -> str | None:
        """Return why the model cannot serve a request of ``num_tokens`` for tokens (``spec`` None) or for a pooled
        output; None: it can."""
        if spec is None:
            return None if self.generates else f"this model makes no text: its outputs are {', '.join(self.names)}"
        task = self.find(spec.task)
        if task is None:
            have = f"it has {', '.join(self.names)}" if self.tasks else "it has none of its kind (see --convert)"
            return f"this model has no output {spec.task!r}: {have}"
        if spec.dimensions is not None and not 0 < spec.dimensions <= task.width:
            return f"dimensions must be from 1 to {task.width}, the size of the model's vectors, not {spec.dimensions}"
        if spec.against is None:
            return task.too_large(num_tokens)
        if (
            not task.per_token
            or len(spec.against.shape) != 2
            or spec.against.shape[1] != (spec.dimensions or task.width)
        ):
            return f"the output {spec.task!r} cannot be compared with one of shape {spec.against.shape}"
        return None


ONLY_TOKENS = PooledOutputs()


@dataclass(slots=True)
class PooledOutput:
    """A result: ``data`` are the bytes of a float32 array of ``shape`` in C order, little endian.

    Raises:
        ValueError: data and shape do not fit.
    """

    data: bytes
    shape: list[int]

    def __post_init__(self) -> None:
        if any(size < 0 for size in self.shape) or 4 * math.prod(self.shape) != len(self.data):
            raise ValueError(f"{len(self.data)} bytes are no float32 array of shape {self.shape}")

    def numbers(self) -> "array[float]":
        """Return all numbers, one line after the other: an array of float32, which numpy takes as it is."""
        numbers = array("f", self.data)
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def lines(self) -> "list[array[float]]":
        """Return the numbers line by line; of a result of one line, that alone."""
        width, numbers = self.shape[-1], self.numbers()
        return [numbers[start : start + width] for start in range(0, len(numbers), width)] if width else []

    def value(self) -> "array[float] | list[array[float]]":
        """Return the line of a result of one line, else all lines."""
        return self.numbers() if len(self.shape) == 1 else self.lines()


def task_list(names: Sequence[str]) -> str:
    """Return names of tasks with what they are, for help texts."""
    return "; ".join(f"{name}: {TASKS[name]}" for name in names)
