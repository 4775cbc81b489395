"""Attention that a model computes by code of its own, recorded by the form of its operations: scaled dot-product
attention, or a product (with something added, maybe), a softmax and another product."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# (queries, keys, values [1, heads, tokens, head_dim], mask or None, factor of the scores, output like the queries)
Recorded = Callable[[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None, float, torch.Tensor], None]
HIDDEN = -1e4  # what is added to the score of a hidden key, at most
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
_ADDED_PRODUCTS = (torch.baddbmm, torch.Tensor.baddbmm)
_SOFTMAXES = (torch.softmax, F.softmax, torch.Tensor.softmax)
_TIMES = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.__imul__)
_DIVIDED = (torch.div, torch.Tensor.div, torch.Tensor.__truediv__, torch.Tensor.__itruediv__)


@dataclass(frozen=True)
class _Product:
    """Scores as far as they are computed. ``factor``: of the product of ``q`` and ``transposed_k`` in ``scores``; None:
    it has not been multiplied by a number."""

    q: torch.Tensor
    transposed_k: torch.Tensor
    scores: torch.Tensor
    factor: float | None = None

    def split(self, scores: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return the factor of the product in what the softmax is given, and what is added, like ``scores``."""
        raw = (self.q.float() @ self.transposed_k.float()).view(scores.shape)
        visible = (scores > HIDDEN) & (raw.abs() > 1e-6)
        factor = self.factor
        if factor is None:
            factor = float((scores[visible] / raw[visible]).median()) if bool(visible.any()) else 1.0
            if bool(((scores - factor * raw)[visible].abs() > 1e-3).any()):
                factor = 1.0  # something is added
        added = (scores.float() - factor * raw).where(scores > HIDDEN, torch.tensor(float("-inf")))
        return factor, added.where(added.abs() > 1e-4, torch.zeros(()))


class AttentionWatch(TorchFunctionMode):
    """Calls ``recorded`` for each attention within the context."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self._recorded = recorded
        self._product: _Product | None = None
        self._softmax: tuple[torch.Tensor, torch.Tensor] | None = None  # (scores, probabilities)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self._add_fused(output, *args, **(kwargs or {}))
        elif func in _PRODUCTS and len(args) > 1:
            self._add_product(args[0], args[1], output)
        elif func in _ADDED_PRODUCTS:
            self._add_sum(output, *args, **(kwargs or {}))
        elif func in _TIMES or func in _DIVIDED:
            self._multiply(args, output, is_division=func in _DIVIDED)
        elif func in _SOFTMAXES and isinstance(args[0], torch.Tensor) and args[0].dim() >= 3:
            self._softmax = (args[0], output)
        return output

    def _add_fused(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.dim() == 4 and len(query) == 1:
            self._recorded((query, key, value), attn_mask, query.shape[-1] ** -0.5 if scale is None else scale, output)

    def _add_product(self, first: Any, second: Any, output: torch.Tensor) -> None:
        if not isinstance(first, torch.Tensor) or first.dim() < 3:
            return
        if self._softmax is None or not _is_view(first, self._softmax[1]):
            self._product = _Product(first, second, output)
            return
        scores, self._softmax = self._softmax[0], None
        if self._product is None or self._product.scores.numel() != scores.numel():
            return
        factor, added = self._product.split(scores)
        states = tuple(_with_batch(x) for x in (self._product.q, self._product.transposed_k.transpose(-1, -2), second))
        self._recorded((states[0], states[1], states[2]), _with_batch(added), factor, _with_batch(output))

    def _add_sum(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        batch1: torch.Tensor,
        batch2: torch.Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
    ) -> None:
        self._product = _Product(batch1, batch2, output, float(alpha))

    def _multiply(self, args: tuple[Any, ...], output: torch.Tensor, is_division: bool) -> None:
        """Follow scores that are multiplied by a number."""
        product = self._product
        if product is None or len(args) < 2 or args[0] is not product.scores or not isinstance(args[1], int | float):
            return
        factor = (1.0 if product.factor is None else product.factor) * (1 / args[1] if is_division else args[1])
        self._product = replace(product, scores=output, factor=factor)


def _is_view(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether the shapes differ in the leading dimensions only."""
    return x.shape[-2:] == other.shape[-2:] and x.numel() == other.numel()


def _with_batch(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 4 else x[None]


def without_repeats(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[1, repeated heads, tokens, head_dim] -> [1, num_heads, ...], if each is repeated for neighbouring queries, or in
    turns; else ``x``."""
    if x.shape[1] == num_heads or x.shape[1] % num_heads:
        return x
    repeats = x.shape[1] // num_heads
    grouped = x.unflatten(1, (num_heads, repeats))
    if torch.equal(grouped, grouped[:, :, :1].expand_as(grouped)):
        return grouped[:, :, 0]
    return x
