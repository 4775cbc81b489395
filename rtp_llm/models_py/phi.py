"""Phi (Gunasekar et al., 2023; Phi-2): biases everywhere, partly rotated heads, and blocks side by side."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM, LlamaModel
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class PhiAttention(GroupedQueryAttention):
    """With ``qk_layernorm``, query heads and key heads are normed, each by itself with the same weights."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, qkv_bias=True, o_bias=True, quant_config=quant_config, prefix=prefix)
        self.has_norms = config.qk_layernorm
        if self.has_norms:
            self.q_layernorm = LayerNorm(self.head_dim, eps=config.layer_norm_eps)
            self.k_layernorm = LayerNorm(self.head_dim, eps=config.layer_norm_eps)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, is_partial=True)

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.has_norms:
            q = self.q_layernorm(q.unflatten(-1, (-1, self.head_dim)))
            k = self.k_layernorm(k.unflatten(-1, (-1, self.head_dim)))
        return self.rotary_emb(positions, q, k)


class PhiDecoderLayer(nn.Module):
    """Attention and feed-forward of one norm's output, added to the residual, which is returned separately."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = PhiAttention,
    ) -> None:
        super().__init__()
        self.self_attn = attention_type(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.mlp = UngatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
            names=("fc1", "fc2"),
        )
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.input_layernorm(hidden_states, residual)
        return self.self_attn(positions, normed, forward_batch) + self.mlp(normed), residual


class PhiModel(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class PhiForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    rename = [(r"\.self_attn\.dense\.", ".self_attn.o_proj."), (r"^model\.final_layernorm\.", "model.norm.")]
    attention_type = PhiAttention
    layer_type = PhiDecoderLayer
    base_model_type = PhiModel
    gguf = GGUFForm("phi2", defaults={"partial_rotary_factor": 1.0})

    def has_head_bias(self, config: "PretrainedConfig") -> bool:
        return True


EntryClass = PhiForCausalLM
