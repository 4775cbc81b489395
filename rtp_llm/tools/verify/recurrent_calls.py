"""What layers with a state compute, in one form: convolutions of the last tokens' inputs, and recurrences (scans).

A scan reads a matrix S for each head by queries, and writes keys and values to it: ``S = exp(decay) S + share k vᵀ``,
the result ``Sᵀ q``. By the delta rule v is corrected by what S already has for k. In Mamba 2 C are the queries, B the
keys, x the values, and the step sizes both the shares and, times A, the decays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from rtp_llm.srt.layers.activation import get_act_fn

# Parts of a module that has a convolution or a scan, [tokens, features] each.
TO_CONVOLVE, CONVOLVED = "convolution's input", "convolution's output"
SCAN_QUERIES, SCAN_KEYS, SCAN_VALUES = "scan's queries", "scan's keys", "scan's values"
SHARES = "gate: how much of a token's value is written"
STEPS = "gate: step sizes"
DECAYS = "gate: logarithms of decays"
SCANNED = "scan's output"
SCAN_INPUTS = (SCAN_QUERIES, SCAN_KEYS, SCAN_VALUES, SHARES, STEPS, DECAYS)

L2_EPS = 1e-6


@dataclass(frozen=True)
class ConvolutionCall:
    """A convolution. ``weight``: [kernel_size, channels], a token's own factor last; ``bias``: [channels]."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str | None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> "ConvolutionCall":
        return cls(_host(weight), None if bias is None else _host(bias), activation)

    @property
    def kernel_size(self) -> int:
        return len(self.weight)


@dataclass(frozen=True)
class ScanCall:
    """A scan. Value head h reads key head ``h // (num_heads // num_k_heads)``.

    Args:
        kind: by the delta rule, or as in Mamba 2.
        normalizes: queries and keys are divided by their lengths.
        skip: [num_heads], D: so much of the values is added to the result; None: nothing.
        raw_steps, step_bias: [tokens, num_heads] and [num_heads]: what step sizes are made of; None: nothing is known.
        step_limit: their bounds.
    """

    kind: Literal["delta rule", "state-space dual"]
    num_heads: int
    num_k_heads: int
    normalizes: bool = False
    skip: torch.Tensor | None = None
    raw_steps: torch.Tensor | None = None
    step_bias: torch.Tensor | None = None
    step_limit: tuple[float, float] = (0.0, float("inf"))


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def delta_rule_parts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the parts of a delta rule's inputs, in the order in which they are compared."""
    return {SCAN_QUERIES: q, SCAN_KEYS: k, SCAN_VALUES: v, SHARES: beta, DECAYS: g}


def dual_parts(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, steps: torch.Tensor, a: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the same of Mamba 2's scan. ``steps``: [..., heads]; ``a``: [heads], negative."""
    return {SCAN_QUERIES: c, SCAN_KEYS: b, SCAN_VALUES: x, STEPS: steps, DECAYS: steps * a.float()}


def step_sizes(
    dt: torch.Tensor, bias: torch.Tensor | None, limit: tuple[float, float], has_softplus: bool = True
) -> torch.Tensor:
    total = dt.float() if bias is None else dt.float() + bias.float()
    return (F.softplus(total) if has_softplus else total).clamp(*limit)


def dual_call(
    x: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor | None,
    dt: torch.Tensor,
    dt_bias: torch.Tensor | None,
    limit: Sequence[float],
) -> ScanCall:
    """Describe Mamba 2's scan.

    Args:
        x: [..., heads, head_dim]; b: [..., groups, state_size]; dt: [..., heads].
    """
    num_heads = x.shape[-2]
    return ScanCall(
        "state-space dual",
        num_heads,
        b.shape[-2],
        skip=None if d is None else _host(d),
        raw_steps=_host(dt.reshape(-1, num_heads)),
        step_bias=None if dt_bias is None else _host(dt_bias),
        step_limit=(float(limit[0]), float(limit[1])),
    )


def convolve(x: torch.Tensor, call: ConvolutionCall, **changes: Any) -> torch.Tensor:
    """[tokens, channels] -> the same, from the state of no tokens. ``changes``: of the call's fields."""
    weight, bias = changes.get("weight", call.weight), changes.get("bias", call.bias)
    activation = changes.get("activation", call.activation)
    seen = torch.cat([x.new_zeros(len(weight) - 1, x.shape[1]), x])
    y = sum((seen[i : i + len(x)] * weight[i] for i in range(len(weight))), torch.zeros_like(x))
    y = y if bias is None else y + bias
    return y if activation is None else get_act_fn(activation)(y)
