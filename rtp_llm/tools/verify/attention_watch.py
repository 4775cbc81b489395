"""Attention that a model computes by code of its own, recorded by the form of its operations: scaled dot-product
attention, or a product, a softmax and another product."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# (queries, keys, values [1, heads, tokens, head_dim], mask or None, factor of the scores, output like the queries)
Recorded = Callable[[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None, float, torch.Tensor], None]
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
_SOFTMAXES = (torch.softmax, F.softmax, torch.Tensor.softmax)


class AttentionWatch(TorchFunctionMode):
    """Calls ``recorded`` for each attention within the context."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self._recorded = recorded
        self._product: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # (q, transposed k, q @ k)
        self._softmax: tuple[torch.Tensor, torch.Tensor] | None = None  # (scores, probabilities)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self._add_fused(output, *args, **(kwargs or {}))
        elif func in _PRODUCTS and len(args) > 1:
            self._add_product(args[0], args[1], output)
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
        if self._softmax is None or first.shape != self._softmax[1].shape:
            self._product = (first, second, output)
            return
        scores, self._softmax = self._softmax[0], None
        if self._product is None or self._product[2].shape != scores.shape:
            return
        q, k, raw = self._product
        visible = (scores > -1e4) & (raw.abs() > 1e-6)
        factor = float((scores[visible] / raw[visible]).median()) if bool(visible.any()) else 1.0
        mask = (scores.float() - factor * raw.float()).where(scores > -1e4, torch.tensor(float("-inf")))
        states = tuple(_with_batch(x) for x in (q, k.transpose(-1, -2), second))
        mask = mask.where(mask.abs() > 1e-4, torch.zeros(())) if mask.dim() == 4 else mask[None]
        self._recorded((states[0], states[1], states[2]), mask, factor, _with_batch(output))


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
