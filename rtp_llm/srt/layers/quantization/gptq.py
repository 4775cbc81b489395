"""GPTQ checkpoints (Frantar et al., 2022) of 4 and 8 bits, as AutoGPTQ and GPTQModel write them.

Per layer: ``qweight`` [K * bits / 32, N] int32, consecutive inputs in a word, the first in its lowest bits; ``scales``
[groups, N]; ``qzeros`` [groups, N * bits / 32] int32, consecutive outputs in a word, each zero less one (but as it is
with ``checkpoint_format`` gptq_v2); ``g_idx`` [K], the group of each input, which differs from ``k // group_size`` with
``desc_act``.
"""

import re
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
from rtp_llm.srt.layers.quantization.grouped import (
    GroupFormat,
    bytes_of,
    grouped_method,
    name_in_checkpoint,
    unpack_words,
)
from rtp_llm.srt.layers.quantization.settings import REGEX, LayerRules, choice, flag, integer, number, strings

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
_IN_BLOCK = re.compile(r"(^|\.)(layers|h|blocks|block)\.\d+\.")


class GPTQConfig(QuantizationConfig):
    def __init__(self, model: QuantizedModel, group_format: GroupFormat, rules: LayerRules) -> None:
        self.model = model
        self.format = group_format
        self.rules = rules

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        settings = model.settings
        bits = choice(settings, "bits", (4, 8))
        if flag(settings, "is_marlin_format", False):
            raise QuantizationError(
                "quantization_config: is_marlin_format: true, a layout made for one kernel, is not supported; have "
                f"checkpoint_format {', '.join(CHECKPOINT_FORMATS)}"
            )
        stored = choice(settings, "checkpoint_format", CHECKPOINT_FORMATS, settings.get("format") or "gptq")
        choice(settings, "pack_dtype", ("int32",), "int32")
        if flag(settings, "lm_head", False):
            raise QuantizationError("quantization_config: lm_head: true, a quantized head, is not supported for GPTQ")
        group_size = integer(settings, "group_size", -1)
        return cls(model, gptq_format(bits, group_size, is_v2=stored == "gptq_v2"), _rules(model))

    def get_name(self) -> str:
        return "gptq"

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | ExpertsMethodBase | None:
        if not self.model.is_language(prefix) or isinstance(layer, VocabParallelEmbedding):
            return None
        if not _IN_BLOCK.search(prefix) or self.rules.leaves(name_in_checkpoint(layer, prefix)):
            return None
        return grouped_method(layer, self.format)

    def may_leave(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether it is a bias of zeros, which early versions of AutoGPTQ gave to layers without one."""
        return name.endswith(".bias") and not bool(tensor.any())


def gptq_format(bits: int, group_size: int, is_v2: bool) -> GroupFormat:
    """``group_size`` -1: all inputs."""

    def to_weight(words: torch.Tensor) -> torch.Tensor:
        return bytes_of(words).transpose(0, 1).flatten(1)

    def to_zeros(words: torch.Tensor) -> torch.Tensor:
        stored = unpack_words(words, bits).t()
        return stored if is_v2 else (stored + 1) & (2**bits - 1)

    return GroupFormat(
        bits,
        None if group_size == -1 else group_size,
        weight="qweight",
        to_weight=to_weight,
        scales="scales",
        to_scales=torch.t,
        zeros="qzeros",
        to_zeros=to_zeros,
        order="g_idx",
    )


def _rules(model: QuantizedModel) -> LayerRules:
    """Return the rules of the settings. ``dynamic`` of GPTQModel: ``-:regex`` leaves layers unquantized.

    Raises:
        QuantizationError: ``dynamic`` gives some layers other bits or group sizes.
    """
    left: list[str] = []
    dynamic = model.settings.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise QuantizationError(f"quantization_config: dynamic must be an object, not {dynamic!r}")
    for rule, own in dynamic.items():
        if rule.startswith("-:"):
            left.append(REGEX + rule[2:])
        else:
            _check_same(rule, own or {}, model)
    left += strings(model.settings, "modules_to_not_convert")
    return LayerRules(model, left, strings(model.settings, "modules_in_block_to_quantize"))


def _check_same(rule: str, own: Any, model: QuantizedModel) -> None:
    if not isinstance(own, Mapping):
        raise QuantizationError(f"quantization_config: dynamic must give layers {rule!r} an object, not {own!r}")
    for key in ("bits", "group_size"):
        if key in own and number(own[key]) != number(model.settings.get(key)):
            raise QuantizationError(
                f"quantization_config: dynamic gives layers {rule!r} a {key} of {own[key]}, where the others have "
                f"{model.settings.get(key)}; only one for all is supported"
            )
