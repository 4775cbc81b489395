"""Sums over ranks that wait for a norm, so that a device computes both in one launch.

A layer ends in a sum over the ranks, and the next one begins with a norm of that sum and the residual. The layer hands
on an ``Unsummed``, which any other operation finds summed: whoever knows nothing of it computes as ever.
"""

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch.utils._pytree import tree_map


@dataclass(frozen=True, slots=True)
class NormOfSum:
    """A norm of ``x + residual``. ``kernel``: the reference's name of it, without ``add_``."""

    kernel: str
    weight: torch.Tensor
    eps: float


class SumsLater(Protocol):
    """What sums a tensor of all ranks, alone or within a norm."""

    def all_reduce(self, x: torch.Tensor) -> bool:
        """Sum in place; True for all tensors that are handed on unsummed."""

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: NormOfSum
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (the norm of the sum and the residual, these two added), or None if this norm is not computed."""


class Unsummed(torch.Tensor):
    """This rank's summand, in the place of the sum over all ranks. Every rank uses it in the same way."""

    _sum: torch.Tensor | None
    _summand: torch.Tensor
    _shared: SumsLater

    @classmethod
    def of(cls, x: torch.Tensor, shared: SumsLater) -> Self:
        made = torch.Tensor._make_subclass(cls, x)
        made._summand, made._shared, made._sum = x, shared, None
        return made

    def summed(self) -> torch.Tensor:
        """Return the sum, which is computed once."""
        if self._sum is None:
            taken = self._shared.all_reduce(self._summand)
            assert taken, "only what is summed here is handed on unsummed"
            self._sum = self._summand
        return self._sum

    def add_norm(self, residual: torch.Tensor, norm: NormOfSum) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See ``SumsLater.add_norm``; None if the sum is there already, too."""
        return None if self._sum is not None else self._shared.add_norm(self._summand, plain(residual), norm)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map(plain, args), tree_map(plain, kwargs or {})
        return func(*args, **kwargs)


def plain(x: Any) -> Any:
    """Return the sum of what is unsummed, and anything else as it is."""
    return x.summed() if isinstance(x, Unsummed) else x
