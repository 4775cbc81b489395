"""Granite 4 (IBM, 2025): Granite MoE with Mamba 2, which keeps a state, on most layers, and perhaps without experts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.granite import GraniteAttention
from rtp_llm.models_py.granitemoe import (
    GGUF_MOE_CONFIG,
    GGUF_MOE_NAMES,
    GraniteMoeBlock,
    GraniteMoeDecoderLayer,
    GraniteMoeForCausalLM,
)
from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.recurrent import MAMBA2_CHANGES, kinds_of_layers, num_key_heads, state_head_dim
from rtp_llm.srt.layers.mamba import Mamba2Mixer
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import NoPositions
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class GraniteMoeHybridAttention(GraniteAttention):
    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        """Published checkpoints have no positions in attention: the other layers' states have an order."""
        return super().make_rope(config, layer_id) if config.position_embedding_type == "rope" else NoPositions()


class GraniteDenseBlock(nn.Module):
    """The feed-forward block of a model without experts, under the name of what would be the shared one."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.shared_mlp = GatedMLP(
            config.hidden_size,
            config.shared_intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("shared_mlp", prefix),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.shared_mlp(hidden_states)


class GraniteMoeHybridDecoderLayer(GraniteMoeDecoderLayer):
    """Attention or Mamba 2, then feed-forward: each after a norm, multiplied, and added to the residual."""

    mamba: nn.Module

    def make_mixer(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        attention_type: type[nn.Module],
    ) -> tuple[str, nn.Module]:
        kind = config.layer_types[layer_id]
        if kind == "linear_attention":
            return "mamba", mamba2_mixer(config, layer_id, quant_config, add_prefix("mamba", prefix))
        if kind != "full_attention":
            raise ValueError(f"layer_types[{layer_id}] must be 'linear_attention' or 'full_attention', not {kind!r}")
        return super().make_mixer(config, layer_id, quant_config, prefix, attention_type)

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        block_type = GraniteMoeBlock if config.num_local_experts else GraniteDenseBlock
        return block_type(config, quant_config, prefix)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        if self.mixer_name == "mamba":
            hidden_states = self.mamba(hidden_states, forward_batch)
        else:
            hidden_states = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states, residual = self.post_attention_layernorm(hidden_states * self.residual_multiplier, residual)
        return self.feed(hidden_states) * self.residual_multiplier, residual


def mamba2_mixer(
    config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
) -> Mamba2Mixer:
    """Return the mixer of a layer, by the names that Bamba (IBM, 2024) gave to its sizes."""
    return Mamba2Mixer(
        config.hidden_size,
        config.mamba_n_heads,
        config.mamba_d_head,
        config.mamba_n_groups,
        config.mamba_d_state,
        config.mamba_d_conv,
        layer_id,
        conv_bias=config.mamba_conv_bias,
        proj_bias=config.mamba_proj_bias,
        eps=config.rms_norm_eps,
        dt_limit=config.time_step_limit or (0.0, float("inf")),
        activation=config.hidden_act,
        quant_config=quant_config,
        prefix=prefix,
    )


_GGUF_CONFIG = GGUF_MOE_CONFIG | {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.time_step_rank": "mamba_n_heads",
    "ssm.group_count": "mamba_n_groups",
}
_GGUF_NAMES = GGUF_MOE_NAMES | {
    f"blk.{{bid}}.ffn_{x}": f"model.layers.{{bid}}.block_sparse_moe.shared_mlp.{x}_proj" for x in ("gate", "up", "down")
}
_GGUF_NAMES["blk.{bid}.ssm_dt.bias"] = "model.layers.{bid}.mamba.dt_bias"
_GGUF_PRESENCE = {
    "blk.{bid}.ssm_conv1d.bias": "mamba_conv_bias",
    "blk.{bid}.ssm_in.bias": "mamba_proj_bias",
    "blk.{bid}.attn_q.bias": "attention_bias",
}


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Set the kinds of layers, which a GGUF has as numbers of key heads, and the sizes of Mamba 2."""
    if metadata.get("granitehybrid.rope.scaling.finetuned"):
        raise GGUFError("`granitehybrid.rope.scaling.finetuned` is true: it is a Bamba, which has no model file here")
    config["layer_types"] = kinds_of_layers(metadata)
    config["num_key_value_heads"] = num_key_heads(metadata)
    config["mamba_d_head"] = state_head_dim(metadata)
    config["mamba_expand"] = config["mamba_n_heads"] * config["mamba_d_head"] // config["hidden_size"]
    config.setdefault("num_local_experts", 0)


class GraniteMoeHybridForCausalLM(GraniteMoeForCausalLM):
    attention_type = GraniteMoeHybridAttention
    layer_type = GraniteMoeHybridDecoderLayer
    gguf = GGUFForm(
        "granitehybrid",
        config=_GGUF_CONFIG,
        presence=_GGUF_PRESENCE,
        adapt=_from_gguf,
        changes=(*MAMBA2_CHANGES, *PERMUTED),
        names=_GGUF_NAMES,
    )


EntryClass = GraniteMoeHybridForCausalLM
