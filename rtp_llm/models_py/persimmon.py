"""Persimmon (Adept, 2023): layer norms of blocks and of heads, partly rotated heads, squared ReLU and no gate."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.gpt_neox import QKVByHeadAttention
from rtp_llm.models_py.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PersimmonAttention(QKVByHeadAttention):
    """With ``qk_layernorm``, query heads and key heads are normed, each by itself with the same weights."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, bias=True, quant_config=quant_config, prefix=prefix)
        self.has_norms = config.qk_layernorm
        if self.has_norms:
            self.q_layernorm = LayerNorm(self.head_dim, eps=config.layer_norm_eps)
            self.k_layernorm = LayerNorm(self.head_dim, eps=config.layer_norm_eps)

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.has_norms:
            q = self.q_layernorm(q.unflatten(-1, (-1, self.head_dim)))
            k = self.k_layernorm(k.unflatten(-1, (-1, self.head_dim)))
        return super().prepare_queries_and_keys(positions, q, k)


class PersimmonDecoderLayer(LlamaDecoderLayer):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        names = ("dense_h_to_4h", "dense_4h_to_h")
        sizes = config.hidden_size, config.intermediate_size
        return UngatedMLP(*sizes, config.hidden_act, quant_config, prefix, names=names)


class PersimmonModel(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class PersimmonForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {}
    rename = [(r"^model\.final_layernorm\.", "model.norm.")]
    attention_type = PersimmonAttention
    layer_type = PersimmonDecoderLayer
    base_model_type = PersimmonModel


EntryClass = PersimmonForCausalLM
