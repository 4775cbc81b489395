"""Hunyuan dense (Tencent, 2025): Llama with heads normed after their rotation, and a rotary base times a power."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import get_rope, get_rope_config, rope_kind

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class HunYuanV1Attention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        require(config, "use_cla", (False,))  # layers that read the keys of the one before
        require(config, "use_qk_norm", (True,))
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            quant_config=quant_config,
            prefix=prefix,
        )
        self.query_layernorm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        """What the configuration calls ``dynamic`` with an ``alpha`` is a longer base for all lengths."""
        base, rope_scaling, _ = get_rope_config(config)
        if rope_scaling is not None and rope_kind(rope_scaling) == "dynamic" and rope_scaling.get("alpha"):
            base *= rope_scaling["alpha"] ** (self.head_dim / (self.head_dim - 2))
            rope_scaling = None
        return get_rope(
            self.head_dim, max_position=config.max_position_embeddings, base=base, rope_scaling=rope_scaling
        )

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self.rotate(positions, q.unflatten(-1, (-1, self.head_dim)), k.unflatten(-1, (-1, self.head_dim)))
        return self.query_layernorm(q), self.key_layernorm(k)


class HunYuanDenseV1ForCausalLM(LlamaForCausalLM):
    attention_type: type[nn.Module] = HunYuanV1Attention
    gguf = GGUFForm("hunyuan-dense", presence={"blk.0.attn_q.bias": "attention_bias"})


EntryClass = HunYuanDenseV1ForCausalLM
