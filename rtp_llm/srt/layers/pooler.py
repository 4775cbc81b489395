"""From the hidden states of a request's tokens to its pooled output.

A model names its outputs in ``poolers``, {task: Pooler}. Of each request, the worker collects the hidden states (after
the last norm) of the tokens that the pooler reads, over all chunks of its prompt, and calls it once for many requests:

    Pooler("mean", finish="normalize")                              a sentence's embedding
    Pooler("cls", head=self.classifier, width=3, finish="softmax")  labels
    Pooler("all", ...)                                              a line for each token

It is not a module: layers in its head are the model's own, under their names in the checkpoint.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

Positions = npt.NDArray[np.int64]
Head = Callable[[torch.Tensor], torch.Tensor]


class Reduction(ABC):
    """Which hidden states an output reads, and how those of a request become its lines.

    Attributes:
        per_token: a request has a line for each token that is read, else one.
        reads_prefix: it reads other tokens than the last.
    """

    per_token = False
    reads_prefix = True

    def positions(self, ids: npt.NDArray[np.int64]) -> Positions:
        """Return the positions, ascending, of the tokens that are read of an input with these ids."""
        return np.arange(len(ids))

    @abstractmethod
    def reduce(self, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Make the lines of several requests.

        Args:
            states: [P, size] float32, of the tokens that are read, one request's after another's.
            counts: [N] int64, how many tokens are read of each request, at least one.

        Returns:
            [N, size], or [P, size] with ``per_token``.
        """


class First(Reduction):
    """The first token's state, [CLS] in BERT."""

    def positions(self, ids: npt.NDArray[np.int64]) -> Positions:
        return np.zeros(1, dtype=np.int64)

    def reduce(self, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return states if len(counts) == len(states) else states[counts.cumsum(0) - counts]


class Last(Reduction):
    """The last token's state: a decoder's summary of all."""

    reads_prefix = False

    def positions(self, ids: npt.NDArray[np.int64]) -> Positions:
        return np.array([len(ids) - 1])

    def reduce(self, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return states if len(counts) == len(states) else states[counts.cumsum(0) - 1]


class Mean(Reduction):
    def reduce(self, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return _sums(states, counts) / counts[:, None]


class MeanSqrt(Reduction):
    """The sum over the root of the number of tokens."""

    def reduce(self, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return _sums(states, counts) / counts[:, None].sqrt()


class WeightedMean(Reduction):
    """The mean in which the token at position p counts p + 1 times (SGPT: Muennighoff, 2022)."""

    def reduce(self, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(states), device=states.device) - starts.repeat_interleave(counts)
        return _sums(states * (places + 1)[:, None], counts) / (counts * (counts + 1) / 2)[:, None]


class Max(Reduction):
    """The largest number of each component."""

    def reduce(self, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return torch.segment_reduce(states, "max", lengths=counts, axis=0)


class EachToken(Reduction):
    per_token = True

    def reduce(self, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return states


class Steps(EachToken):
    """The states of the tokens with one id, which ends each step of an answer (process reward models)."""

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id

    def positions(self, ids: npt.NDArray[np.int64]) -> Positions:
        return np.flatnonzero(ids == self.token_id)


class SideBySide(Reduction):
    """Several reductions of all tokens, concatenated."""

    def __init__(self, reductions: Sequence[Reduction]) -> None:
        self.reductions = reductions

    def reduce(self, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return torch.cat([each.reduce(states, counts) for each in self.reductions], dim=-1)


class Behind(Reduction):
    """Another reduction, of the states behind layers on each: [P, size] to [P, another size], in float32."""

    def __init__(self, layers: Head, reduction: Reduction) -> None:
        self.layers, self.reduction = layers, reduction
        self.per_token, self.reads_prefix = reduction.per_token, reduction.reads_prefix

    def positions(self, ids: npt.NDArray[np.int64]) -> Positions:
        return self.reduction.positions(ids)

    def reduce(self, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return self.reduction.reduce(self.layers(states), counts)


REDUCTIONS: Mapping[str, type[Reduction]] = {
    "cls": First,
    "last": Last,
    "mean": Mean,
    "mean_sqrt": MeanSqrt,
    "weighted_mean": WeightedMean,
    "max": Max,
    "all": EachToken,
}
FINISHES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normalize": lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12),
    "softmax": lambda x: x.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "tanh": torch.tanh,
}


class Pooler:
    """One pooled output of a model.

    Args:
        reduction: a name in REDUCTIONS, or a Reduction.
        width: components of a line, after the head.
        head: [N, size] to [N, width], in the dtype of its parameters; None: there is none.
        finish: a name in FINISHES, the last step; None: there is none. A request may leave it out.
        is_finished: whether a request that does not say gets it.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(
        self,
        reduction: str | Reduction,
        width: int,
        head: Head | None = None,
        finish: str | None = None,
        is_finished: bool = True,
    ) -> None:
        for name, known in ((reduction, REDUCTIONS), (finish, FINISHES)):
            if isinstance(name, str) and name not in known:
                raise ValueError(f"unknown pooling {name!r}; have {list(known)}")
        self.reduction = REDUCTIONS[reduction]() if isinstance(reduction, str) else reduction
        self.width = width
        self.head = head
        self.finish = None if finish is None else FINISHES[finish]
        self.is_finished = is_finished
        self._head_dtype = _dtype_of(head)

    @property
    def per_token(self) -> bool:
        return self.reduction.per_token

    @property
    def reads_prefix(self) -> bool:
        return self.reduction.reads_prefix

    def positions(self, ids: npt.NDArray[np.int64]) -> Positions:
        """See Reduction.positions."""
        return self.reduction.positions(ids)

    def __call__(
        self,
        states: torch.Tensor,
        counts: torch.Tensor,
        dimensions: int | None = None,
        normalize: bool | None = None,
    ) -> torch.Tensor:
        """Return the lines of several requests that ask for the same, float32.

        Args:
            states, counts: see Reduction.reduce; of any dtype.
            dimensions, normalize: see PoolingSpec.
        """
        lines = self.reduction.reduce(states.float(), counts)
        if self.head is not None:
            lines = self.head(lines.to(self._head_dtype)).float()
        if dimensions is not None:
            lines = lines[:, :dimensions]
        if self.finish is not None and (self.is_finished if normalize is None else normalize):
            lines = self.finish(lines)
        return lines


def classifiers(config: Any, reduction: str, head: Head) -> dict[str, Pooler]:
    """Return the outputs of a model that classifies sequences, as its configuration has them: ``classify``, and
    ``score`` if it has one label, as cross-encoders do.

    Probabilities are a softmax over labels, or a sigmoid of each where there is one, or ``problem_type`` is
    ``multi_label_classification``; of a ``regression`` the numbers are given as they are. What sentence-transformers
    has written there about a cross-encoder's last function comes first.
    """
    pooler = Pooler(reduction, config.num_labels, head, _last_function(config))
    return {"classify": pooler, "score": pooler} if config.num_labels == 1 else {"classify": pooler}


def _last_function(config: Any) -> str | None:
    """Raise ValueError for a function of sentence-transformers' that is not known here."""
    settings = getattr(config, "sentence_transformers", None) or {}
    named = settings.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    if named is not None:
        return last_function(str(named))
    problem = getattr(config, "problem_type", None)
    if problem == "regression":
        return None
    return "sigmoid" if config.num_labels == 1 or problem == "multi_label_classification" else "softmax"


def last_function(named: str) -> str | None:
    """Return the name among FINISHES of a class of torch.nn; None of the identity. Raise ValueError for another."""
    known = {"Identity": None, "Sigmoid": "sigmoid", "Softmax": "softmax", "ReLU": "relu", "Tanh": "tanh"}
    name = named.rpartition(".")[2]
    if name not in known:
        raise ValueError(f"the last function must be one of {list(known)}, not {named!r}")
    return known[name]


def token_classifiers(config: Any, head: Head) -> dict[str, Pooler]:
    """Return the outputs of a model that classifies tokens."""
    return {"token_classify": Pooler("all", config.num_labels, head, "softmax")}


def embedders(reduction: str | Reduction, width: int) -> dict[str, Pooler]:
    """Return the outputs of a model that embeds: a vector of the input, and one of each token, of length one."""
    return {
        "embed": Pooler(reduction, width, finish="normalize"),
        "token_embed": Pooler("all", width, finish="normalize"),
    }


def _sums(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[P, size] -> [N, size]: the sum of each request's lines, whoever else is in the batch."""
    lines = torch.arange(len(states), device=states.device)
    return F.embedding_bag(lines, states, counts.cumsum(0) - counts, mode="sum")


def _dtype_of(head: Head | None) -> torch.dtype:
    parameters = head.parameters() if isinstance(head, nn.Module) else iter(())
    return next((parameter.dtype for parameter in parameters), torch.float32)
