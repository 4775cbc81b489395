"""Checkpoints of the compressed-tensors library (llm-compressor): integers of 4 and 8 bits, and fp8.

``pack-quantized``: ``weight_packed`` [N, K * bits / 32] int32, consecutive inputs in a word, the first in its lowest
bits; ``weight_scale`` [N, groups]; with zero points ``weight_zero_point`` [N * bits / 32, groups], consecutive outputs
in a word; ``weight_g_idx`` [K], the group of each input, with ``actorder: group``. Integers have an offset of
``2 ** (bits - 1)``, zero points too. ``int-quantized``: ``weight`` [N, K] int8, ``weight_scale`` [N, groups] and
``weight_zero_point`` int8. Products use integers, with activations quantized per token, where the configuration asks
for it and there is one scale per output. ``float-quantized``: ``weight`` [N, K] in float8_e4m3fn and ``weight_scale``
of the tensor, of outputs, groups or blocks (see ``scaled_weights.py``).
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.quantization.base import (
    ExpertsMethodBase,
    QuantizationConfig,
    QuantizationError,
    QuantizedModel,
    QuantizeMethodBase,
)
from rtp_llm.srt.layers.quantization.fp4 import DIVISOR, Fp4Format, fp4_method, with_one_scale
from rtp_llm.srt.layers.quantization.grouped import (
    GroupFormat,
    bytes_of,
    grouped_method,
    name_in_checkpoint,
    unpack_words,
)
from rtp_llm.srt.layers.quantization.scaled_weights import (
    ScaleFormat,
    dequantized_rest,
    fp8_method,
    in_one_spelling,
    is_not_needed,
    last_parts,
)
from rtp_llm.srt.layers.quantization.settings import (
    REGEX,
    LayerRules,
    block_size,
    choice,
    flag,
    integer,
    layer_name,
    matches,
    number,
    strings,
)
from rtp_llm.srt.layers.quantization.spellings import is_stored_dense
from rtp_llm.srt.layers.weights import Weights

NAME = "compressed-tensors"
PACKED, PLAIN = "pack-quantized", ("int-quantized", "naive-quantized")
FLOATS = ("float-quantized", "naive-quantized", "mxfp8-quantized")
FOUR_BIT_FLOATS = {"nvfp4-pack-quantized": Fp4Format(16, DIVISOR), "mxfp4-pack-quantized": Fp4Format(32)}
Stored = GroupFormat | ScaleFormat | Fp4Format
ORDERS = {"weight": False, "static": False, "group": True, "dynamic": True, "true": True, "false": False}
"""Values of ``actorder`` -> whether a group's inputs need not be neighbours; False ones only order the calibration."""


class CompressedTensorsConfig(QuantizationConfig):
    """``targets``: names of layers or classes -> how their weights are stored."""

    def __init__(self, model: QuantizedModel, targets: Mapping[str, Stored]) -> None:
        self.model = model
        self.targets = targets
        self.rules = LayerRules(model, strings(model.settings, "ignore"))
        self.kept: set[str] = set()  # last parts of the names of layers that multiply fp8
        self.dequantizes_rest = any(isinstance(stored, ScaleFormat) for stored in targets.values())

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        settings = model.settings
        _check_rest(settings)
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise QuantizationError(f"quantization_config of {NAME} must have `config_groups`, an object")
        targets: dict[str, Stored] = {}
        for name, group in groups.items():
            where = f"config_groups.{name}"
            if not isinstance(group, Mapping):
                raise QuantizationError(f"quantization_config: {where} must be an object, not {group!r}")
            stored = stored_format(group, group.get("format") or settings.get("format"), where)
            targets |= dict.fromkeys(map(layer_name, strings(group, "targets") or ["Linear"]), stored)
        return cls(model, dict(sorted(targets.items(), key=lambda item: item[0].startswith(REGEX))))

    def get_name(self) -> str:
        return NAME

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | ExpertsMethodBase | None:
        if isinstance(layer, VocabParallelEmbedding) or self.rules.leaves(name_in_checkpoint(layer, prefix)):
            return None
        stored = self._format_of(name_in_checkpoint(layer, prefix))
        if stored is None:
            return None
        if isinstance(stored, Fp4Format):
            return fp4_method(layer, stored)
        if isinstance(stored, GroupFormat):
            return grouped_method(layer, stored)
        self.kept.update(last_parts(layer, self.model.sources(prefix)))
        return fp8_method(layer, stored)

    def _format_of(self, prefix: str) -> Stored | None:
        """Return the format of the first target that names the layer (names before expressions), or else its class."""
        sources = self.model.sources(prefix)
        found = [next((stored for name, stored in self.targets.items() if matches(name, s)), None) for s in sources]
        if any(stored is not found[0] for stored in found):
            raise ValueError(f"{prefix}: {', '.join(sources)} are computed as one, but not quantized alike")
        return found[0] or self.targets.get("Linear")

    def translate(self, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> Weights:
        of_four = next((stored for stored in self.targets.values() if isinstance(stored, Fp4Format)), None)
        of_eight = next((stored for stored in self.targets.values() if isinstance(stored, ScaleFormat)), None)
        if of_four is not None and len({*self.targets.values()}) > 1:
            raise QuantizationError(
                "quantization_config: config_groups: floats of 4 bits beside others are not supported"
            )
        if of_four is not None:
            return with_one_scale(weights, of_four)
        return weights if of_eight is None else dequantized_rest(in_one_spelling(weights), of_eight, self.kept, dtype)

    def may_leave(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether it is a shape, which the configuration gives as well, or a scale of activations or of a cache."""
        return is_not_needed(name, tensor)


def stored_format(group: Mapping[str, Any], stored: str | None, where: str) -> Stored:
    """Return how the weights of a config group are stored.

    Raises:
        QuantizationError: in an unsupported way, which the message names.
    """
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise QuantizationError(f"quantization_config: {where} must have `weights`, an object")
    if str(weights.get("type") or "int").lower() == "int":
        return group_format(group, weights, stored, where)
    if str(weights.get("type")).lower() == "float" and number(weights.get("num_bits")) == 8:
        return float_format(group, weights, stored, where)
    name = str(stored).lower().replace("_", "-")
    if str(weights.get("type")).lower() == "float" and number(weights.get("num_bits")) == 4 and name in FOUR_BIT_FLOATS:
        _check_output(group, where)
        return FOUR_BIT_FLOATS[name]
    raise QuantizationError(
        f"quantization_config: {where}: weights of type {weights.get('type')!r} with {weights.get('num_bits')} bits "
        f"({stored}) are not supported; have int of 4 and 8 bits, float of 8, and float of 4 as "
        f"{', '.join(FOUR_BIT_FLOATS)}"
    )


def float_format(group: Mapping[str, Any], weights: Mapping[str, Any], stored: str | None, where: str) -> ScaleFormat:
    """Return how weights in float8_e4m3fn are scaled. Activations' scales are not needed: see ``scaled_weights.py``."""
    if stored and str(stored).lower().replace("_", "-") not in FLOATS:
        raise QuantizationError(
            f"quantization_config: {where}: format {stored!r} is not supported for floats; have {', '.join(FLOATS)}"
        )
    if not flag(weights, "symmetric", True):
        raise QuantizationError(f"quantization_config: {where}: floats with zero points are not supported")
    _check_output(group, where)
    inputs = group.get("input_activations") or {}
    if str(inputs.get("type") or "float").lower() != "float" or number(inputs.get("num_bits") or 8) != 8:
        raise QuantizationError(
            f"quantization_config: {where}: input_activations of weights in fp8 must be floats of 8 bits, not "
            f"{dict(inputs)}"
        )
    strategy = choice(weights, "strategy", ("tensor", "channel", "group", "block"), "tensor")
    if strategy == "group":
        return ScaleFormat((1, integer(weights, "group_size")), bool(inputs))
    block = block_size(weights, "block_structure") if strategy == "block" else None
    if strategy == "block" and block is None:
        raise QuantizationError(f"quantization_config: {where}: strategy block needs a block_structure")
    return ScaleFormat(block, bool(inputs))


def group_format(group: Mapping[str, Any], weights: Mapping[str, Any], stored: str | None, where: str) -> GroupFormat:
    """Return how integers are stored.

    Raises:
        QuantizationError: in an unsupported way, which the message names.
    """
    given, stored = stored, str(stored).lower().replace("_", "-")
    if stored not in (PACKED, *PLAIN):
        raise QuantizationError(
            f"quantization_config: {where}: format {given!r} is not supported; have {PACKED}, {', '.join(PLAIN)}"
        )
    bits = choice(weights, "num_bits", (4, 8) if stored == PACKED else (8,))
    group_size = None if weights.get("group_size") is None else integer(weights, "group_size")
    default = {None: None, -1: "channel"}.get(group_size, "group")
    strategy = choice(weights, "strategy", ("group", "channel"), default)
    if strategy == "group" and group_size in (None, -1):
        raise QuantizationError(f"quantization_config: {where}: group_size must be positive, not {group_size!r}")
    _check_activations(group, bits, strategy, where)
    is_packed = stored == PACKED
    return GroupFormat(
        bits,
        group_size if strategy == "group" else None,
        weight="weight_packed" if is_packed else "weight",
        to_weight=(lambda words: bytes_of(words).flatten(1)) if is_packed else _with_offset,
        scales="weight_scale",
        to_scales=_two_dimensional,
        zeros=None if flag(weights, "symmetric", True) else "weight_zero_point",
        to_zeros=(lambda words: _unpack_zeros(words, bits)) if is_packed else _with_offset,
        order="weight_g_idx" if ORDERS[choice(weights, "actorder", tuple(ORDERS), "false")] else None,
    )


def _check_rest(settings: Mapping[str, Any]) -> None:
    """Raise QuantizationError for settings that change more than the weights of linear layers."""
    asks_for = {
        "sparsity_config": not is_stored_dense(settings.get("sparsity_config") or {}),
        "transform_config": bool(_without_empty(settings.get("transform_config"))),
        "kv_cache_scheme": not _is_float_cache(settings.get("kv_cache_scheme")),
        "moe_sparsity_config": bool(settings.get("moe_sparsity_config")),
    }
    for key, is_asked in asks_for.items():
        if is_asked:
            raise QuantizationError(f"quantization_config: {key} is not supported for {NAME}, got {settings[key]!r}")


def _is_float_cache(scheme: Any) -> bool:
    """Whether a ``kv_cache_scheme`` asks for no cache in 8 bits, or for one in fp8, whose scales then are not needed:
    ``--kv-cache-dtype`` says how the cache is stored."""
    return not scheme or (isinstance(scheme, Mapping) and str(scheme.get("type")).lower() == "float")


def _without_empty(config: Any) -> Any:
    """Return a ``transform_config`` without empty entries, such as an empty ``config_groups``."""
    return {key: value for key, value in config.items() if value} if isinstance(config, Mapping) else config


def _check_output(group: Mapping[str, Any], where: str) -> None:
    if group.get("output_activations"):
        raise QuantizationError(f"quantization_config: {where}: output_activations are not supported")


def _check_activations(group: Mapping[str, Any], bits: int, strategy: str, where: str) -> None:
    _check_output(group, where)
    inputs = group.get("input_activations")
    if not inputs:
        return
    words = {key: str(inputs.get(key) or default).lower() for key, default in (("type", "int"), ("strategy", None))}
    is_usual = number(inputs.get("num_bits", 8)) == 8 and words == {"type": "int", "strategy": "token"}
    is_dynamic = str(inputs.get("dynamic")).lower() in ("true", "1")
    if not is_usual or not is_dynamic or not flag(inputs, "symmetric", True):
        raise QuantizationError(
            f"quantization_config: {where}: input_activations must be symmetric integers of 8 bits, per token and "
            f"dynamic, not {dict(inputs)}"
        )
    if bits != 8 or strategy != "channel":
        raise QuantizationError(
            f"quantization_config: {where}: input_activations are supported with weights of 8 bits per channel only"
        )


def _with_offset(values: torch.Tensor) -> torch.Tensor:
    """int8 in [-128, 127] -> uint8 in [0, 255]."""
    if values.dtype != torch.int8:
        raise ValueError(f"expected dtype torch.int8, got {values.dtype}")
    return _two_dimensional(values).contiguous().view(torch.uint8) ^ 128


def _unpack_zeros(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[N * bits / 32, groups] int32 -> [N, groups] uint8."""
    return unpack_words(words.t(), bits).t()


def _two_dimensional(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, None] if tensor.dim() == 1 else tensor
