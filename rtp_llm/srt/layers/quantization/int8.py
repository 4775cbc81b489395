"""Any checkpoint in 8 bits: a scale per output, and activations quantized per token at run time (W8A8).

Both sides are symmetric, so that a product is one of integers times two scales (LLM.int8(); Dettmers et al., 2022,
without its outliers in 16 bits).
"""

import torch

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.quantization.on_load import OnLoadConfig, quantize_int8


class Int8Config(OnLoadConfig):
    def get_name(self) -> str:
        return "int8"

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        return built_for().pack_int8(*quantize_int8(weight))
