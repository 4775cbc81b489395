"""Nemotron-H and Nemotron 3 (NVIDIA, 2025): a layer is one block: Mamba 2, attention, experts or a feed-forward block.

Attention has no positions; experts and feed-forward blocks have no gates.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM, LlamaModel
from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
from rtp_llm.srt.gguf.recurrent import MAMBA2_CHANGES, by_layer, num_key_heads, state_head_dim
from rtp_llm.srt.layers.linear import ReplicatedLinear
from rtp_llm.srt.layers.mamba import Mamba2Mixer
from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.moe import FusedMoE, sigmoid_grouped_topk
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import NoPositions
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class NemotronHAttention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, qkv_bias=False, o_bias=False, quant_config=quant_config, prefix=prefix)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return NoPositions()


class NemotronHMoE(nn.Module):
    """Experts chosen as in DeepSeek-V3, between projections to a smaller size if there is one, plus a shared expert."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.config = config
        hidden_size, num_experts = config.hidden_size, config.n_routed_experts
        size = config.moe_latent_size or hidden_size
        self.gate = ReplicatedLinear(
            hidden_size, num_experts, bias=False, params_dtype=torch.float32, prefix=add_prefix("gate", prefix)
        )
        self.gate.e_score_correction_bias = make_parameter(
            torch.zeros(num_experts, dtype=torch.float32), default_weight_loader
        )
        self.experts = FusedMoE(
            num_experts,
            size,
            config.moe_intermediate_size,
            activation=config.mlp_hidden_act,
            gated=False,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )
        self.shared_experts = UngatedMLP(
            hidden_size,
            config.moe_shared_expert_intermediate_size,
            config.mlp_hidden_act,
            quant_config,
            add_prefix("shared_experts", prefix),
            bias=config.mlp_bias,
        )
        self.has_latent = config.moe_latent_size is not None
        if self.has_latent:
            self.fc1_latent_proj, self.fc2_latent_proj = (
                ReplicatedLinear(
                    *sizes, bias=config.mlp_bias, quant_config=quant_config, prefix=add_prefix(name, prefix)
                )
                for name, sizes in (("fc1_latent_proj", (hidden_size, size)), ("fc2_latent_proj", (size, hidden_size)))
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        config = self.config
        router_logits, _ = self.gate(hidden_states.float())
        topk_weights, topk_ids = sigmoid_grouped_topk(
            router_logits,
            self.gate.get_parameter("e_score_correction_bias"),
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            renormalize=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        x = self.fc1_latent_proj(hidden_states)[0] if self.has_latent else hidden_states
        x = self.experts(x, topk_weights, topk_ids)
        x = self.fc2_latent_proj(x)[0] if self.has_latent else x
        return x + self.shared_experts(hidden_states)


class NemotronHLayer(nn.Module):
    """A norm and one block, ``mixer``, which is added to the residual."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = NemotronHAttention,
    ) -> None:
        super().__init__()
        self.block_type = config.layers_block_type[layer_id]
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        mixer_prefix = add_prefix("mixer", prefix)
        self.mixer: nn.Module
        if self.block_type == "linear_attention":
            self.mixer = _mamba(config, layer_id, quant_config, mixer_prefix)
        elif self.block_type == "full_attention":
            self.mixer = attention_type(config, layer_id, quant_config, mixer_prefix)
        elif self.block_type == "moe":
            self.mixer = NemotronHMoE(config, quant_config, mixer_prefix)
        elif self.block_type == "mlp":
            sizes = config.hidden_size, config.intermediate_size
            self.mixer = UngatedMLP(*sizes, config.mlp_hidden_act, quant_config, mixer_prefix, bias=config.mlp_bias)
        else:
            raise ValueError(
                f"layers_block_type[{layer_id}] must be 'linear_attention', 'full_attention', 'moe' or 'mlp', not "
                f"{self.block_type!r}"
            )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.norm(hidden_states, residual)
        if self.block_type == "linear_attention":
            return self.mixer(hidden_states, forward_batch), residual
        if self.block_type == "full_attention":
            return self.mixer(positions, hidden_states, forward_batch), residual
        return self.mixer(hidden_states), residual


def _mamba(
    config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
) -> Mamba2Mixer:
    return Mamba2Mixer(
        config.hidden_size,
        config.mamba_num_heads,
        config.mamba_head_dim,
        config.n_groups,
        config.ssm_state_size,
        config.conv_kernel,
        layer_id,
        conv_bias=config.use_conv_bias,
        proj_bias=config.use_bias,
        eps=config.layer_norm_epsilon,
        dt_limit=(config.time_step_min, float("inf")),
        activation=config.mamba_hidden_act,
        quant_config=quant_config,
        prefix=prefix,
    )


class NemotronHModel(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)


_GGUF_CONFIG = {
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "ssm_state_size",
    "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "mamba_num_heads",
    "expert_count": "n_routed_experts",
    "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
    "moe_latent_size": "moe_latent_size",
}
_GGUF_NAMES = {"blk.{bid}.ssm_dt.bias": "backbone.layers.{bid}.mixer.dt_bias"}
_GGUF_EXPERTS = {
    f"blk.{{bid}}.ffn_{x}_exps.weight": f"backbone.layers.{{bid}}.mixer.experts.{{part}}.{x}_proj.weight"
    for x in ("up", "down")
}
_GGUF_PRESENCE = {
    "blk.{bid}.ssm_conv1d.bias": "use_conv_bias",
    "blk.{bid}.ssm_in.bias": "use_bias",
    "blk.{bid}.ffn_up.bias": "mlp_bias",
}
_GGUF_DEFAULTS = {"time_step_min": 0.0}  # the file says no bound, and llama.cpp has none


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Set the kinds of layers: attention has key heads, what is fed forward has a size, Mamba 2 has neither."""
    architecture, num_layers = metadata["general.architecture"], config["num_hidden_layers"]
    fed = "moe" if architecture == "nemotron_h_moe" else "mlp"
    heads, sizes = (by_layer(metadata, key) for key in ("attention.head_count_kv", "feed_forward_length"))
    kinds = [
        "full_attention" if of_heads else fed if size else "linear_attention"
        for of_heads, size in zip(heads, sizes, strict=True)
    ]
    config["layers_block_type"] = kinds[:num_layers]
    config["num_key_value_heads"] = num_key_heads(metadata)
    config["intermediate_size"] = max(sizes)
    config["mamba_head_dim"] = state_head_dim(metadata)


class NemotronHForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    rename = [
        (r"^backbone\.", "model."),
        (r"^model\.embeddings?\.", "model.embed_tokens."),
        (r"^model\.norm_f\.", "model.norm."),
    ]
    attention_type = NemotronHAttention
    layer_type = NemotronHLayer
    base_model_type = NemotronHModel
    gguf = (
        GGUFForm(
            "nemotron_h",
            config=_GGUF_CONFIG,
            defaults=_GGUF_DEFAULTS,
            presence=_GGUF_PRESENCE,
            adapt=_from_gguf,
            changes=(*MAMBA2_CHANGES, *PERMUTED),
            names=_GGUF_NAMES,
        ),
        GGUFForm(
            "nemotron_h_moe",
            config=_GGUF_CONFIG,
            defaults=_GGUF_DEFAULTS,
            presence=_GGUF_PRESENCE,
            adapt=_from_gguf,
            changes=(*MAMBA2_CHANGES, *PERMUTED),
            names=_GGUF_NAMES | _GGUF_EXPERTS,
        ),
    )


EntryClass = NemotronHForCausalLM
