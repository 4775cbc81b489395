"""Falcon-H1 (TII, 2025): attention and Mamba 2 side by side in each layer, with constant factors everywhere."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.granite import GraniteModel
from rtp_llm.models_py.llama import LlamaAttention, LlamaForCausalLM
from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
from rtp_llm.srt.gguf.recurrent import MAMBA2_CHANGES, state_head_dim
from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.logits_processor import LogitsProcessor
from rtp_llm.srt.layers.mamba import Mamba2Mixer
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class FalconH1Attention(LlamaAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, quant_config, prefix)
        self.key_multiplier = config.key_multiplier

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotate(positions, q, k * self.key_multiplier)


class FalconH1Mixer(Mamba2Mixer):
    """Mamba 2, with a factor for each part of what ``in_proj`` gives."""

    multipliers: torch.Tensor

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            config.hidden_size,
            config.mamba_n_heads,
            config.mamba_d_head,
            config.mamba_n_groups,
            config.mamba_d_state,
            config.mamba_d_conv,
            layer_id,
            conv_bias=config.mamba_conv_bias,
            proj_bias=config.mamba_proj_bias,
            out_bias=config.projectors_bias,
            eps=config.rms_norm_eps,
            has_norm=config.mamba_rms_norm,
            gates_first=not config.mamba_norm_before_gate,
            dt_limit=config.time_step_limit,
            activation=config.hidden_act,
            quant_config=quant_config,
            prefix=prefix,
        )
        sizes = torch.tensor([shard.size for shard in self.in_proj.shards])
        multipliers = torch.tensor(config.ssm_multipliers, dtype=torch.get_default_dtype())
        self.register_buffer("multipliers", multipliers.repeat_interleave(sizes), persistent=False)
        self.in_multiplier = config.ssm_in_multiplier

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().project(hidden_states * self.in_multiplier) * self.multipliers


class FalconH1MLP(GatedMLP):
    """``down(act(gate(x) * a) * up(x)) * b`` with the factors of ``mlp_multipliers``."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        sizes = config.hidden_size, config.intermediate_size
        super().__init__(*sizes, config.hidden_act, quant_config, prefix, bias=config.mlp_bias)
        self.gate_act = get_act_fn(config.hidden_act)
        self.gate_multiplier, self.down_multiplier = config.mlp_multipliers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected, _ = self.gate_up_proj(x)
        gate, up = projected.chunk(2, dim=-1)
        output, _ = self.down_proj(self.gate_act(gate * self.gate_multiplier) * up)
        return output * self.down_multiplier


class FalconH1DecoderLayer(nn.Module):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = FalconH1Attention,
    ) -> None:
        super().__init__()
        self.self_attn = attention_type(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.mamba = FalconH1Mixer(config, layer_id, quant_config, add_prefix("mamba", prefix))
        self.feed_forward = FalconH1MLP(config, quant_config, add_prefix("feed_forward", prefix))
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.in_multiplier = config.attention_in_multiplier
        self.out_multiplier = config.attention_out_multiplier
        self.ssm_out_multiplier = config.ssm_out_multiplier

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        attended = self.self_attn(positions, hidden_states * self.in_multiplier, forward_batch)
        scanned = self.mamba(hidden_states, forward_batch)
        hidden_states = scanned * self.ssm_out_multiplier + attended * self.out_multiplier
        hidden_states, residual = self.pre_ff_layernorm(hidden_states, residual)
        return self.feed_forward(hidden_states), residual


_GGUF_CONFIG = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.inner_size": "mamba_d_ssm",
    "ssm.state_size": "mamba_d_state",
    "ssm.time_step_rank": "mamba_n_heads",
    "ssm.group_count": "mamba_n_groups",
}
_GGUF_PRESENCE = {
    "blk.0.ssm_norm.weight": "mamba_rms_norm",
    "blk.0.ssm_conv1d.bias": "mamba_conv_bias",
    "blk.0.ssm_in.bias": "mamba_proj_bias",
    "blk.0.ssm_out.bias": "projectors_bias",
    "blk.0.attn_q.bias": "attention_bias",
    "blk.0.ffn_gate.bias": "mlp_bias",
}


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    config["mamba_d_head"] = state_head_dim(metadata)


class FalconH1ForCausalLM(LlamaForCausalLM):
    rename = [(r"^model\.final_layernorm\.", "model.norm.")]
    attention_type = FalconH1Attention
    layer_type = FalconH1DecoderLayer
    base_model_type = GraniteModel  # embeddings times a factor
    gguf = GGUFForm(
        "falcon-h1",  # whose weights hold the factors
        config=_GGUF_CONFIG,
        defaults={"mamba_norm_before_gate": False},
        presence=_GGUF_PRESENCE,
        adapt=_from_gguf,
        changes=(*MAMBA2_CHANGES, *PERMUTED),
        names={"blk.{bid}.ssm_dt.bias": "model.layers.{bid}.mamba.dt_bias"},
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.logits_processor = LogitsProcessor(config, logit_scale=config.lm_head_multiplier)


EntryClass = FalconH1ForCausalLM
