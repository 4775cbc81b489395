"""OLMoE (Muennighoff et al., 2024): Llama with experts on every layer, and norms over all heads at once."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM
from rtp_llm.models_py.olmo2 import Olmo2HeadsNorm
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class OlmoeHeadsNorm(Olmo2HeadsNorm):
    """The norm of OLMo 2 over all heads, but rounded before it is multiplied by its weight."""

    def weigh(self, normed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.weight * normed.to(dtype)


class OlmoeAttention(GroupedQueryAttention):
    """Attention whose queries and keys are normed, and clipped to ``[-clip_qkv, clip_qkv]`` with the values."""

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
            o_bias=config.attention_bias,
            quant_config=quant_config,
            prefix=prefix,
        )
        self.clip = config.clip_qkv
        q_shard, k_shard, _ = self.qkv_proj.shards
        self.q_norm = OlmoeHeadsNorm(q_shard, self.qkv_proj.tp_group, config.rms_norm_eps)
        self.k_norm = OlmoeHeadsNorm(k_shard, self.qkv_proj.tp_group, config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        q, k = self.rotate(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v, forward_batch))
        return output


class OlmoeDecoderLayer(LlamaDecoderLayer):
    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        return SparseMoeBlock(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            renormalize=config.norm_topk_prob,
            quant_config=quant_config,
            prefix=prefix,
        )


class OlmoeForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    attention_type = OlmoeAttention
    layer_type = OlmoeDecoderLayer
    gguf = GGUFForm("olmoe")


EntryClass = OlmoeForCausalLM
