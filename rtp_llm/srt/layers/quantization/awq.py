"""AWQ checkpoints (Lin et al., 2023) of 4 bits, as AutoAWQ writes them, version gemm.

Per layer: ``qweight`` [K, N / 8] int32; ``qzeros`` [groups, N / 8] int32; ``scales`` [groups, N]. A word holds eight
neighbouring outputs, in the order of ``ORDER`` from its lowest bits on.
"""

from typing import Self

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
from rtp_llm.srt.layers.quantization.grouped import GroupFormat, grouped_method, name_in_checkpoint, unpack_words
from rtp_llm.srt.layers.quantization.settings import LayerRules, choice, flag, integer, strings

VERSION_KEYS = ("version", "format", "checkpoint_format")  # of AutoAWQ, transformers and GPTQModel
DEFAULT_GROUP_SIZE = 128  # AutoAWQ's
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(ORDER.index(output) for output in range(8))


class AWQConfig(QuantizationConfig):
    def __init__(self, model: QuantizedModel, group_format: GroupFormat) -> None:
        self.model = model
        self.format = group_format
        self.rules = LayerRules(model, strings(model.settings, "modules_to_not_convert"))

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        settings = model.settings
        bits = choice(settings, "bits", (4,), 4)
        version = next((key for key in VERSION_KEYS if settings.get(key)), VERSION_KEYS[0])
        choice(settings, version, ("gemm",), "gemm")
        if str(settings.get("backend")).lower() == "llm-awq":
            raise QuantizationError("quantization_config: backend: llm-awq, which packs differently, is not supported")
        if not flag(settings, "zero_point", True):
            raise QuantizationError("quantization_config: zero_point: false is not supported for AWQ")
        group_size = integer(settings, "group_size", DEFAULT_GROUP_SIZE)
        return cls(model, awq_format(bits, group_size))

    def get_name(self) -> str:
        return "awq"

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | ExpertsMethodBase | None:
        if not self.model.is_language(prefix) or isinstance(layer, VocabParallelEmbedding):
            return None
        if self.rules.leaves(name_in_checkpoint(layer, prefix)):
            return None
        return grouped_method(layer, self.format)


def awq_format(bits: int, group_size: int) -> GroupFormat:
    def to_weight(words: torch.Tensor) -> torch.Tensor:
        columns = unpack_outputs(words).t()
        return columns[:, 0::2] | columns[:, 1::2] << 4

    return GroupFormat(
        bits,
        None if group_size == -1 else group_size,
        weight="qweight",
        to_weight=to_weight,
        scales="scales",
        to_scales=torch.t,
        zeros="qzeros",
        to_zeros=lambda words: unpack_outputs(words).t(),
    )


def unpack_outputs(words: torch.Tensor) -> torch.Tensor:
    """[rows, N / 8] int32 -> [rows, N] uint8, outputs in their order."""
    return unpack_words(words, 4).unflatten(1, (-1, 8))[..., _PLACES].flatten(1)
