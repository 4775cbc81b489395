"""Rotary position embeddings (RoFormer; Su et al., 2021).

Angles are computed from positions, so no position is too far. ``rope_scaling.py`` has the frequencies, and the ways of
stretching them over longer contexts.

A step's cosines and sines are computed once: the runner calls ``prepare_for_forward(forward_batch)`` on every module
with this method, and all layers that share the module read the result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from rtp_llm.srt.cache.spec import LengthScaling
from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.rope_scaling import (
    FREQUENCIES,
    RopeSpec,
    longrope_attention_factor,
    longrope_inv_freq,
    rope_kind,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their positions, with the same frequencies for all sequences.

    Attributes:
        length_scaling: how keys depend on the length of their sequence; None: not at all.
    """

    length_scaling: LengthScaling | None = None
    inv_freq: torch.Tensor

    def __init__(self, spec: RopeSpec, inv_freq: torch.Tensor, attention_factor: float = 1.0) -> None:
        """``inv_freq``: [rotary_dim / 2] float32, radians per position. ``attention_factor`` scales cosine and sine."""
        super().__init__()
        self.head_size = spec.head_size
        self.is_neox_style = spec.is_neox_style
        self.dtype = spec.dtype
        self.attention_factor = attention_factor
        self.register_buffer("inv_freq", inv_freq.to(torch.get_default_device()), persistent=False)
        self._step_positions: torch.Tensor | None = None
        self._step_cos_sin: torch.Tensor | None = None  # [2, a step's tokens or more, rotary_dim / 2]
        self._step: tuple[torch.Tensor, torch.Tensor] | None = None  # this step's cosines and sines, views of it
        self._rotate = pick("rotary_pair", spec.dtype)
        self.norm_and_rotate = pick("norm_rotary_pair", spec.dtype)

    def prepare_for_forward(self, forward_batch: ForwardBatch) -> None:
        """Compute this step's cosines and sines, which ``forward`` uses when given the batch's own positions."""
        positions = self._positions_of(forward_batch)
        cos_sin = self._cos_sin(positions, self._inv_freq_of(forward_batch))
        kept, num_tokens = self._step_cos_sin, positions.shape[-1]
        # Written in place, so that a recorded step finds the next step's values at the same address.
        if kept is None or kept.shape[1] < num_tokens or kept.device != cos_sin.device:
            with torch.inference_mode(False):  # so that later steps may write to it in any mode
                kept = self._step_cos_sin = torch.empty_like(cos_sin)
        kept[:, :num_tokens] = cos_sin
        self._step = kept[0, :num_tokens], kept[1, :num_tokens]
        self._step_positions = positions

    def step_tensors(self) -> list[torch.Tensor]:
        """Tensors that ``prepare_for_forward`` made."""
        return [] if self._step is None else list(self._step)

    def forward(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate q and k; the results have their shapes.

        Args:
            positions: [T] int64.
            q, k: [T, heads * head_size] or [T, heads, head_size]; their numbers of heads may differ. k None: there are
                only queries, as in a layer that reads another's cache.
        """
        cos, sin = self.cos_and_sin(positions, q.dtype)
        heads = self._heads(q)
        rotated_q, rotated_k = self._rotate(
            heads, heads[:, :1] if k is None else self._heads(k), cos, sin, self.is_neox_style
        )
        return rotated_q.view(q.shape), None if k is None else rotated_k.view(k.shape)

    def cos_and_sin(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [T, rotary_dim / 2] each, in ``dtype``."""
        cos, sin = self._cos_and_sin_at(positions)
        return (cos, sin) if cos.dtype is dtype else (cos.to(dtype), sin.to(dtype))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_size)) if x.dim() == 2 else x

    def _cos_and_sin_at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [T, rotary_dim / 2] each."""
        if positions is self._step_positions and self._step is not None:
            return self._step
        cos, sin = self._cos_sin(positions, self.inv_freq)
        return cos, sin

    def _cos_sin(self, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
        """[2, T, rotary_dim / 2] in ``dtype``; ``inv_freq`` is [rotary_dim / 2], or [T, rotary_dim / 2] per token."""
        angles = positions[:, None].float() * inv_freq
        return (torch.stack((angles.cos(), angles.sin())) * self.attention_factor).to(self.dtype)

    def _positions_of(self, forward_batch: ForwardBatch) -> torch.Tensor:
        return forward_batch.positions

    def _inv_freq_of(self, forward_batch: ForwardBatch) -> torch.Tensor:
        return self.inv_freq


class MRotaryEmbedding(RotaryEmbedding):
    """Three positions per token (time, height, width); each pair of components turns by one of them (Qwen2-VL, 2024).

    ``forward`` takes [3, T] positions (``forward_batch.mrope_positions`` if set), or [T] positions of text, which are
    rotated as without M-RoPE.
    """

    takes_mrope_positions = True
    axes: torch.Tensor

    def __init__(
        self,
        spec: RopeSpec,
        inv_freq: torch.Tensor,
        attention_factor: float,
        mrope_section: Sequence[int],
        mrope_interleaved: bool = False,
    ) -> None:
        """
        Args:
            mrope_section: numbers of pairs that turn by time, by height, by width.
            mrope_interleaved: pairs of the three take turns instead of following in three blocks (Qwen3-VL, 2025).

        Raises:
            ValueError: ``mrope_section`` is not three numbers, or, unless interleaved, does not sum to all pairs.
        """
        super().__init__(spec, inv_freq, attention_factor)
        self.mrope_section = tuple(mrope_section)
        axes = _mrope_axes(len(inv_freq), mrope_section, mrope_interleaved)
        self.register_buffer("axes", axes.to(torch.get_default_device()), persistent=False)

    def _positions_of(self, forward_batch: ForwardBatch) -> torch.Tensor:
        positions = forward_batch.mrope_positions
        return forward_batch.positions if positions is None else positions

    def _cos_sin(self, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
        if positions.dim() == 1:
            return super()._cos_sin(positions, inv_freq)
        angles = positions[self.axes].T.float() * inv_freq
        return (torch.stack((angles.cos(), angles.sin())) * self.attention_factor).to(self.dtype)


def _mrope_axes(num_pairs: int, section: Sequence[int], interleaved: bool) -> torch.Tensor:
    """[num_pairs] int64: 0, 1 or 2 for pairs that turn by time, height or width."""
    if len(section) != 3:
        raise ValueError(f"mrope_section must be three numbers (time, height, width), got {list(section)}")
    if not interleaved:
        if sum(section) != num_pairs:
            raise ValueError(
                f"mrope_section {list(section)} must sum to {num_pairs}, the pairs of components that are rotated"
            )
        return torch.arange(3, device="cpu").repeat_interleave(torch.tensor(section, device="cpu"))
    axes = torch.zeros(num_pairs, dtype=torch.int64, device="cpu")
    for axis in (1, 2):  # every third pair from ``axis`` on, as many as the section says; time takes all others
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


class LengthScaledRotaryEmbedding(RotaryEmbedding):
    """Rotation by frequencies that depend on the length of the sequence.

    As in transformers: all tokens of a prompt are rotated for the prompt's length, each later token for its own, so
    token t of a request has length ``max(prompt_len, t + 1)``, however the prompt was cut into chunks.
    """

    length_scaling: LengthScaling

    def _cos_and_sin_at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if positions is not self._step_positions or self._step is None:
            raise RuntimeError(
                f"{type(self).__name__} depends on sequence lengths: call prepare_for_forward(forward_batch) before "
                f"the model's forward, and rotate with that batch's positions"
            )
        return super()._cos_and_sin_at(positions)

    def _inv_freq_of(self, forward_batch: ForwardBatch) -> torch.Tensor:
        raise NotImplementedError


class DynamicNTKRotaryEmbedding(LengthScaledRotaryEmbedding):
    """A base that grows with the length, beyond the original one (dynamic NTK scaling; emozilla, 2023)."""

    def __init__(self, spec: RopeSpec) -> None:
        if spec.rotary_dim <= 2:
            raise ValueError(f"rope kind 'dynamic' needs more than 2 rotated components, got {spec.rotary_dim}")
        super().__init__(spec, spec.inv_freq)
        self.spec = spec
        self.factor = spec.needed("factor")
        self.length_scaling = LengthScaling(spec.max_position, per_length=True)

    def _inv_freq_of(self, forward_batch: ForwardBatch) -> torch.Tensor:
        # One length at a time, on the host: the last bit of vectorised powers depends on a token's place in the batch,
        # and positions multiply it. A prompt has one length, a decoding row another.
        lens, token_to_len = np.unique(rope_lens(forward_batch), return_inverse=True)
        table = torch.stack([self._inv_freq_for(num_tokens) for num_tokens in lens.tolist()] or [self.spec.inv_freq])
        device = self.inv_freq.device
        return table.to(device)[torch.from_numpy(token_to_len).to(device)]

    def _inv_freq_for(self, num_tokens: int) -> torch.Tensor:
        """[rotary_dim / 2] on the host, for a sequence of ``num_tokens``."""
        if num_tokens <= self.spec.max_position:
            return self.spec.inv_freq
        length = torch.tensor(num_tokens, dtype=torch.float32, device="cpu")
        stretch = self.factor * length / self.spec.max_position - (self.factor - 1)
        base = self.spec.base * stretch ** (self.spec.rotary_dim / (self.spec.rotary_dim - 2))
        return 1.0 / base**self.spec.exponents


class LongRopeRotaryEmbedding(LengthScaledRotaryEmbedding):
    """One set of frequencies up to the original length, another beyond (LongRoPE; Ding et al., 2024)."""

    long_inv_freq: torch.Tensor

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__(spec, longrope_inv_freq(spec, "short_factor"), longrope_attention_factor(spec))
        self.length_scaling = LengthScaling(spec.original_len, per_length=False)
        long_inv_freq = longrope_inv_freq(spec, "long_factor")
        self.register_buffer("long_inv_freq", long_inv_freq.to(torch.get_default_device()), persistent=False)

    def _inv_freq_of(self, forward_batch: ForwardBatch) -> torch.Tensor:
        is_long = torch.from_numpy(rope_lens(forward_batch) > self.length_scaling.original_len)
        return torch.where(is_long.to(self.inv_freq.device)[:, None], self.long_inv_freq, self.inv_freq)


_LENGTH_SCALED: dict[str, Callable[[RopeSpec], LengthScaledRotaryEmbedding]] = {
    "dynamic": DynamicNTKRotaryEmbedding,
    "longrope": LongRopeRotaryEmbedding,
}


def rope_lens(forward_batch: ForwardBatch) -> np.ndarray:
    """[T] int64: the sequence length that each token of the step is rotated for."""
    rows = zip(
        forward_batch.prompt_lens_cpu,
        forward_batch.extend_prefix_lens_cpu,
        forward_batch.extend_seq_lens_cpu,
        strict=True,
    )
    lens = [
        np.arange(prefix_len + 1, prefix_len + num_tokens + 1).clip(min=prompt_len)
        for prompt_len, prefix_len, num_tokens in rows
    ]
    return np.concatenate(lens) if lens else np.empty(0, dtype=np.int64)


_ropes_of_build: ContextVar[dict[str, RotaryEmbedding] | None] = ContextVar("_ropes_of_build", default=None)


@contextmanager
def share_ropes() -> Iterator[None]:
    """Share one module among equal ``get_rope`` calls within this context, so that its step is computed once.

    Use it for the build of one model only: the module has a step's state, which two models must not share.
    """
    token = _ropes_of_build.set({})
    try:
        yield
    finally:
        _ropes_of_build.reset(token)


def get_rope(
    head_size: int,
    rotary_dim: int | None = None,
    max_position: int = 2048,
    base: float = 10000.0,
    is_neox_style: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    partial_rotary_factor: float = 1.0,
    rope_parameters: dict[str, Any] | None = None,
    dual_chunk_attention_config: dict[str, Any] | None = None,
) -> RotaryEmbedding:
    """Return the rotary embedding of an attention layer, called as ``q, k = rotary_emb(positions, q, k)``.

    Args:
        rotary_dim: number of leading components of a head that are rotated (None: all), times
            ``partial_rotary_factor``.
        max_position: the configuration's ``max_position_embeddings``: the length from which ``dynamic`` stretches, and
            the default where a kind needs an original length or a factor and ``rope_scaling`` does not give it.
        is_neox_style: pairs are (i, i + half); False: (2i, 2i + 1).
        rope_scaling: the kind under ``rope_type`` or ``type``, and its parameters; None: the default kind. With
            ``mrope_section`` (and ``mrope_interleaved``), the result is an ``MRotaryEmbedding`` of that kind.
        dtype: of cosines and sines; None: torch's default.
        rope_parameters: a configuration's, in place of ``base``, ``rope_scaling`` and ``partial_rotary_factor``, which
            it has among its fields.

    Raises:
        ValueError: unknown kind, or a parameter is missing or does not fit; there is a ``dual_chunk_attention_config``.
    """
    if dual_chunk_attention_config is not None:
        raise ValueError("dual_chunk_attention_config is not supported: remove it from config.json to attend to all")
    if rope_parameters is not None:
        if rope_scaling is not None or base != 10000.0 or partial_rotary_factor != 1.0:
            raise ValueError("rope_parameters stand in place of base, rope_scaling and partial_rotary_factor")
        base, rope_scaling, partial_rotary_factor = split_rope_parameters(rope_parameters)
        if rope_parameters.get("rope_dim"):
            rotary_dim, partial_rotary_factor = rope_parameters["rope_dim"], 1.0
    spec = RopeSpec(
        head_size=head_size,
        rotary_dim=int((rotary_dim or head_size) * partial_rotary_factor),
        max_position=max_position,
        base=base,
        is_neox_style=is_neox_style,
        scaling=rope_scaling or {},
        dtype=dtype or torch.get_default_dtype(),
    )
    kinds = sorted({*FREQUENCIES, *_LENGTH_SCALED})
    if spec.kind not in kinds:
        raise ValueError(f"unknown rope kind {spec.kind!r}; have {kinds}")
    built = _ropes_of_build.get()
    if built is None:
        return _build(spec)
    key = repr(spec)
    if key not in built:
        built[key] = _build(spec)
    return built[key]


def _build(spec: RopeSpec) -> RotaryEmbedding:
    length_scaled = _LENGTH_SCALED.get(spec.kind)
    rope = length_scaled(spec) if length_scaled else RotaryEmbedding(spec, *FREQUENCIES[spec.kind](spec))
    section = spec.scaling.get("mrope_section")
    if section is None:
        return rope
    if rope.length_scaling is not None:
        raise ValueError(f"rope kind {spec.kind!r} depends on sequence lengths, which mrope_section does not go with")
    interleaved = bool(spec.scaling.get("mrope_interleaved"))
    return MRotaryEmbedding(spec, rope.inv_freq, rope.attention_factor, section, interleaved)


def split_rope_parameters(parameters: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None, float]:
    """``(base, rope_scaling or None, partial_rotary_factor)`` of one set of a configuration's ``rope_parameters``."""
    nested = sorted(key for key, value in parameters.items() if isinstance(value, dict))
    if nested:
        raise ValueError(f"rope_parameters differ by layer type: give the set of one of {nested}, not all of them")
    scaling = dict(parameters)
    base = scaling.pop("rope_theta", None) or 10000.0
    partial = scaling.pop("partial_rotary_factor", None) or 1.0
    is_plain = rope_kind(scaling) == "default" and "mrope_section" not in scaling
    return base, None if is_plain else scaling, partial


def set_default_rope_theta(config: "PretrainedConfig", default_theta: float) -> None:
    """Give a configuration's ``rope_parameters`` this base if they have none. The configuration is changed."""
    parameters = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
    config.rope_parameters = {"rope_theta": default_theta, **parameters}


def get_rope_config(
    config: "PretrainedConfig", layer_type: str | None = None
) -> tuple[float, dict[str, Any] | None, float]:
    """``(base, rope_scaling or None, partial_rotary_factor)`` of a configuration, for ``get_rope``.

    Reads ``rope_parameters`` (transformers 5) or ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``.

    Args:
        layer_type: which set to take if ``rope_parameters`` has one for each type of ``config.layer_types``
            (``"full_attention"``, ``"sliding_attention"``); not used if all layers share one.

    Raises:
        ValueError: there are sets by layer type, and none for ``layer_type``.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = sorted(key for key, value in parameters.items() if isinstance(value, dict))
    if nested:
        if layer_type not in nested:
            raise ValueError(
                f"rope_parameters differ by layer type: the model must pick one of {nested} per layer, not {layer_type}"
            )
        parameters = parameters[layer_type]
    scaling = dict(parameters)
    base = scaling.pop("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0
    partial = scaling.pop("partial_rotary_factor", None) or getattr(config, "partial_rotary_factor", None) or 1.0
    if rope_kind(scaling) == "default" and "mrope_section" not in scaling:
        return base, None, partial
    if rope_kind(scaling) in ("llama3", "yarn", "longrope"):
        # A configuration's own field wins over the scaling's, as in transformers (Phi-3 keeps it there).
        original_len = getattr(config, "original_max_position_embeddings", None)
        if original_len is not None:
            scaling["original_max_position_embeddings"] = original_len
    return base, scaling, partial


class NoPositions(nn.Module):
    """Stands where a rotation would, in a layer whose queries and keys have no positions (NoPE)."""

    def forward(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return q, k


def rope_of_layer(
    config: "PretrainedConfig",
    head_size: int,
    layer_id: int,
    is_neox_style: bool = True,
    dtype: torch.dtype | None = None,
    is_partial: bool = False,
) -> RotaryEmbedding:
    """Return the rotation that a configuration describes for a layer, of its layer type where it has these.

    Args:
        is_neox_style, dtype: as in ``get_rope``.
        is_partial: whether ``partial_rotary_factor`` is heeded; else whole heads are rotated.
    """
    layer_types = getattr(config, "layer_types", None)
    base, rope_scaling, partial_rotary_factor = get_rope_config(config, layer_types[layer_id] if layer_types else None)
    return get_rope(
        head_size,
        max_position=config.max_position_embeddings,
        base=base,
        is_neox_style=is_neox_style,
        rope_scaling=rope_scaling,
        dtype=dtype,
        partial_rotary_factor=partial_rotary_factor if is_partial else 1.0,
    )
