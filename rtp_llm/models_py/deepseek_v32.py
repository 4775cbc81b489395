"""DeepSeek-V3.2 (DeepSeek-AI, 2025), in contexts of up to ``index_topk`` tokens: DeepSeek-V3 with a list of layers.

In longer ones an indexer chooses the ``index_topk`` tokens that each token sees; up to there it would choose all of
them. So it is left out, and longer contexts are refused.
"""

from typing import TYPE_CHECKING

from torch import nn

from rtp_llm.models_py.deepseek_v2 import DeepseekV2Attention
from rtp_llm.models_py.glm4_moe_lite import Glm4MoeLiteForCausalLM
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class DeepseekV32ForCausalLM(Glm4MoeLiteForCausalLM):
    attention_type: type[nn.Module] = DeepseekV2Attention  # which rotates neighbouring pairs
    ignore = [r"\.self_attn\.indexer\."]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.max_positions = config.index_topk


EntryClass = DeepseekV32ForCausalLM
