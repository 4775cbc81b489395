"""BLOOM (BigScience, 2022): biases by distance instead of positions, a norm of the embeddings, biases everywhere."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.falcon import FalconForCausalLM, FalconModel
from rtp_llm.models_py.gpt_neox import QKVByHeadAttention
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.alibi import alibi_slopes
from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import NoPositions
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class BloomAttention(QKVByHeadAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, bias=True, quant_config=quant_config, prefix=prefix)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return NoPositions()

    def make_slopes(self, config: "PretrainedConfig") -> torch.Tensor:
        return alibi_slopes(self.query_key_value)


class BloomBlock(nn.Module):
    """With ``apply_residual_connection_post_layernorm``, blocks are added to what norms return, not to their inputs."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = BloomAttention(config, layer_id, quant_config, add_prefix("self_attention", prefix))
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = UngatedMLP(
            config.hidden_size,
            4 * config.hidden_size,
            "gelu_pytorch_tanh",
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
            names=("dense_h_to_4h", "dense_4h_to_h"),
        )
        self.adds_to_normed = config.apply_residual_connection_post_layernorm

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        residual = normed if self.adds_to_normed else hidden_states
        hidden_states = residual + self.self_attention(positions, normed, forward_batch)
        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.adds_to_normed else hidden_states
        return residual + self.mlp(normed)


class BloomModel(FalconModel):
    layer_type = BloomBlock

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.word_embeddings_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def embed(self, input_ids: torch.Tensor, input_embeds: torch.Tensor | None) -> torch.Tensor:
        return self.word_embeddings_layernorm(super().embed(input_ids, input_embeds))


class BloomForCausalLM(FalconForCausalLM):
    # Saved from the base model.
    rename = [(r"^(word_embeddings|word_embeddings_layernorm|h|ln_f)\.", r"transformer.\1.")]
    base_model_type = BloomModel
    gguf = GGUFForm(
        "bloom",
        config={"context_length": "seq_length", "attention.layer_norm_epsilon": "layer_norm_epsilon"},
        changes=[(r"\.query_key_value\.", "by_head")],
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        if config.slow_but_exact and config.pretraining_tp > 1:
            raise ValueError("slow_but_exact leaves biases out of sums over pretraining_tp parts: set it to false")
        super().__init__(config, quant_config, prefix)


EntryClass = BloomForCausalLM
