"""Frequencies of rotary positions, and the ways of stretching them over longer contexts.

They equal those of Hugging Face's ``ROPE_INIT_FUNCTIONS``, in float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Frequencies = tuple[torch.Tensor, float]  # [rotary_dim / 2] float32, radians per position; a factor of cosine and sine


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """The arguments of ``get_rope``."""

    head_size: int
    rotary_dim: int
    max_position: int
    base: float
    is_neox_style: bool
    scaling: dict[str, Any]  # empty: the default kind
    dtype: torch.dtype  # of cosines and sines

    def __post_init__(self) -> None:
        num_rotated = self.rotary_dim + self.rotary_dim % 2  # pairs: an odd number is rounded up
        if not 0 < num_rotated <= self.head_size:
            raise ValueError(f"cannot rotate {self.rotary_dim} components of heads of size {self.head_size}")

    @property
    def kind(self) -> str:
        return rope_kind(self.scaling)

    @property
    def original_len(self) -> int:
        """The length that frequencies were trained for."""
        return self.scaling.get("original_max_position_embeddings") or self.max_position

    def needed(self, name: str) -> Any:
        if self.scaling.get(name) is None:
            raise ValueError(f"rope kind {self.kind!r} needs {name!r} in rope_scaling; it has {sorted(self.scaling)}")
        return self.scaling[name]

    @property
    def exponents(self) -> torch.Tensor:
        """[rotary_dim / 2]: ``2i / rotary_dim``."""
        # On the CPU always: other devices' powers differ in the last bit, and positions multiply that.
        return torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim

    @property
    def inv_freq(self) -> torch.Tensor:
        """[rotary_dim / 2] float32, radians per position, unscaled."""
        return 1.0 / self.base**self.exponents


_OF_DEEPSEEK = ("deepseek_yarn", "deepseek_llama_scaling")  # set by model files written for vLLM
_OTHER_NAMES = {
    "su": "longrope",  # in the first checkpoints of Phi-3
    "mrope": "default",  # in those of Qwen2-VL: M-RoPE is not a kind, it goes with any kind
    **dict.fromkeys(_OF_DEEPSEEK, "yarn"),
}


def rope_kind(scaling: dict[str, Any]) -> str:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return _OTHER_NAMES.get(kind, kind)


def _default(spec: RopeSpec) -> Frequencies:
    return spec.inv_freq, 1.0


def _linear(spec: RopeSpec) -> Frequencies:
    """Position interpolation (Chen et al., 2023; kaiokendev, 2023)."""
    return spec.inv_freq / spec.needed("factor"), 1.0


def _llama3(spec: RopeSpec) -> Frequencies:
    """Divide long wavelengths' frequencies, keep those of short ones, interpolate between (Llama 3.1, 2024)."""
    inv_freq, factor = spec.inv_freq, spec.needed("factor")
    low, high = spec.needed("low_freq_factor"), spec.needed("high_freq_factor")
    wavelengths = 2 * math.pi / inv_freq
    keep = (spec.original_len / wavelengths - low) / (high - low)
    between = (1 - keep) * inv_freq / factor + keep * inv_freq
    is_long = wavelengths > spec.original_len / low
    is_short = wavelengths < spec.original_len / high
    return torch.where(is_long, inv_freq / factor, torch.where(is_short, inv_freq, between)), 1.0


def _yarn(spec: RopeSpec) -> Frequencies:
    """YaRN (Peng et al., 2023): interpolate the frequencies that turn few times within the original length."""
    factor = spec.scaling.get("factor") or spec.max_position / spec.original_len
    frequencies = spec.base**spec.exponents
    keep = 1 - _yarn_ramp(spec)
    inv_freq = 1.0 / (factor * frequencies) * (1 - keep) + 1.0 / frequencies * keep
    return inv_freq, _yarn_attention_factor(factor, spec.scaling)


def _yarn_ramp(spec: RopeSpec) -> torch.Tensor:
    """[rotary_dim / 2] from 0 to 1: 0 for pairs that turn more than beta_fast times, 1 for less than beta_slow."""

    def pair_that_turns(num_turns: float) -> float:
        return spec.rotary_dim * math.log(spec.original_len / (num_turns * 2 * math.pi)) / (2 * math.log(spec.base))

    low = pair_that_turns(spec.scaling.get("beta_fast") or 32)
    high = pair_that_turns(spec.scaling.get("beta_slow") or 1)
    if spec.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    pairs = torch.arange(len(spec.exponents), dtype=torch.float32, device="cpu")
    return ((pairs - low) / (high - low)).clamp(0, 1)


def _yarn_attention_factor(factor: float, scaling: dict[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("rope_type") in _OF_DEEPSEEK:  # each of the two has a default of its own there
        mscale, of_all = scaling.get("mscale", 1.0), scaling.get("mscale_all_dim", 0.0)
        return yarn_get_mscale(factor, mscale) / yarn_get_mscale(factor, of_all)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return yarn_get_mscale(factor, scaling["mscale"]) / yarn_get_mscale(factor, scaling["mscale_all_dim"])
    return yarn_get_mscale(factor)


def yarn_get_mscale(scale: float, mscale: float = 1.0) -> float:
    """Return YaRN's factor of queries and keys for a context ``scale`` times the original one.

    DeepSeek's models also multiply scores by ``yarn_get_mscale(factor, mscale_all_dim) ** 2``.
    """
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def longrope_inv_freq(spec: RopeSpec, name: str) -> torch.Tensor:
    """[rotary_dim / 2] float32 by LongRoPE (Ding et al., 2024); ``name``: of the factors."""
    factors = torch.tensor(spec.needed(name), dtype=torch.float32, device="cpu")
    if factors.shape != spec.exponents.shape:
        raise ValueError(f"rope kind 'longrope' needs {len(spec.exponents)} numbers in {name!r}, got {len(factors)}")
    return 1.0 / (factors * spec.base**spec.exponents)


def longrope_attention_factor(spec: RopeSpec) -> float:
    if spec.scaling.get("attention_factor") is not None:
        return spec.scaling["attention_factor"]
    factor = spec.scaling.get("factor") or spec.max_position / spec.original_len
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(spec.original_len))


def _proportional(spec: RopeSpec) -> Frequencies:
    """The frequencies of whole heads, of which only the first are kept; other pairs do not turn (Gemma 4, 2026)."""
    num_pairs = spec.rotary_dim // 2
    exponents = torch.arange(0, 2 * num_pairs, 2, dtype=torch.float32, device="cpu") / spec.head_size
    inv_freq = torch.zeros(spec.head_size // 2, dtype=torch.float32, device="cpu")
    inv_freq[:num_pairs] = 1.0 / spec.base**exponents
    return inv_freq / (spec.scaling.get("factor") or 1.0), 1.0


FREQUENCIES: dict[str, Callable[[RopeSpec], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "proportional": _proportional,
    "yarn": _yarn,
}
"""Kinds whose frequencies are the same for all lengths."""
