"""GLM-4.5, 4.6 and 4.7 (Zhipu AI, 2025): partly rotated heads, and experts as in DeepSeek-V3."""

from typing import TYPE_CHECKING

from torch import nn

from rtp_llm.models_py.deepseek_v3 import DeepseekV3DecoderLayer
from rtp_llm.models_py.llama import LlamaForCausalLM, NormedHeadsAttention
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Glm4MoeAttention(NormedHeadsAttention):
    """Attention whose heads are normed with ``use_qk_norm`` only."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.attention_bias,
            o_bias=False,
            quant_config=quant_config,
            prefix=prefix,
        )
        if not config.use_qk_norm:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, is_partial=True)


class Glm4MoeForCausalLM(LlamaForCausalLM):
    attention_type = Glm4MoeAttention
    layer_type = DeepseekV3DecoderLayer
    gguf = GGUFForm(
        "glm4moe",
        config={"expert_count": "n_routed_experts"},
        defaults={"partial_rotary_factor": 1.0},
        presence={"blk.0.attn_q.bias": "attention_bias", "blk.0.attn_q_norm.weight": "use_qk_norm"},
    )


EntryClass = Glm4MoeForCausalLM
