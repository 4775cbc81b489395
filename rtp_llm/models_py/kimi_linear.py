"""Kimi Linear (Moonshot AI, 2025): the delta rule with decays of channels, latent attention on some layers, experts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.deepseek_v2 import GGUF_CHANGES, GGUF_NAMES, DeepseekV2Attention
from rtp_llm.models_py.llama import LlamaDecoderLayer, LlamaForCausalLM
from rtp_llm.srt.distributed.parallel_state import divide, get_tp_group
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.gguf.recurrent import kinds_of_layers
from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.layers.delta_rule import GatedDeltaRule
from rtp_llm.srt.layers.gated_norm import GatedRMSNorm
from rtp_llm.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from rtp_llm.srt.layers.mamba import DecayParameter
from rtp_llm.srt.layers.moe import Routing, sigmoid_grouped_topk
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import NoPositions
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class KimiLatentAttention(DeepseekV2Attention):
    """Latent attention without positions."""

    def make_rope(self, config: "PretrainedConfig", is_interleaved: bool = True) -> nn.Module:
        return NoPositions()


class KimiDeltaAttention(DecayParameter):
    """A convolution, linear attention by the delta rule with a decay for each channel, and a gated norm of each head.

    Decays and gates of the norm are made by projections of low rank.
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.head_dim = head_dim = config.linear_head_dim
        total_heads, hidden_size = config.linear_num_heads, config.hidden_size
        size = total_heads * head_dim
        self.num_heads = divide(total_heads, get_tp_group().world_size, "number of heads of linear attention")

        def project(name: str, num_inputs: int, num_outputs: int, is_split: bool = True) -> nn.Module:
            kind = ColumnParallelLinear if is_split else ReplicatedLinear
            where = add_prefix(name, prefix)
            return kind(num_inputs, num_outputs, bias=False, quant_config=quant_config, prefix=where)

        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            head_dim,
            total_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.conv1d = CausalConv1d(
            [size] * 3,
            config.linear_conv_kernel_dim,
            layer_id,
            activation=config.hidden_act,
            prefix=add_prefix("conv1d", prefix),
        )
        self.f_a_proj = project("f_a_proj", hidden_size, head_dim, is_split=False)
        self.f_b_proj = project("f_b_proj", head_dim, size)
        self.g_a_proj = project("g_a_proj", hidden_size, head_dim, is_split=False)
        self.g_b_proj = project("g_b_proj", head_dim, size)
        self.b_proj = project("b_proj", hidden_size, total_heads)
        self.A = self.make_decays(self.num_heads)
        self.dt_bias = self.make_own(self.num_heads * head_dim)
        self.delta_rule = GatedDeltaRule(self.num_heads, self.num_heads, head_dim, head_dim, layer_id)
        self.o_norm = GatedRMSNorm(head_dim, config.rms_norm_eps, activation="sigmoid")
        self.o_proj = RowParallelLinear(
            size, hidden_size, bias=False, quant_config=quant_config, prefix=add_prefix("o_proj", prefix)
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        by_head = (self.num_heads, self.head_dim)
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = self.conv1d(qkv, forward_batch).chunk(3, dim=-1)
        decays, _ = self.f_b_proj(self.f_a_proj(hidden_states)[0])
        b, _ = self.b_proj(hidden_states)
        g, beta = self.delta_rule.gates(decays.unflatten(-1, by_head), b, self.A, self.dt_bias)
        attended = self.delta_rule(q, k, v, g, beta, forward_batch)
        gate, _ = self.g_b_proj(self.g_a_proj(hidden_states)[0])
        output, _ = self.o_proj(self.o_norm(attended, gate.unflatten(-1, by_head)).flatten(1))
        return output


class KimiSparseMoeBlock(SparseMoeBlock):
    """Experts chosen as in DeepSeek-V3, plus shared ones."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            config.hidden_act,
            renormalize=config.norm_topk_prob,
            expert_names=("w1", "w3", "w2"),
            gate_dtype=torch.float32,
            shared=("shared_experts", config.moe_intermediate_size * config.n_shared_experts),
            quant_config=quant_config,
            prefix=prefix,
        )
        self.groups = config.n_group, config.topk_group
        self.scaling_factor = config.routed_scaling_factor
        self.gate.e_score_correction_bias = make_parameter(
            torch.zeros(config.num_experts, dtype=torch.float32), default_weight_loader
        )

    def route(self, router_logits: torch.Tensor) -> Routing:
        bias = self.gate.get_parameter("e_score_correction_bias")
        return sigmoid_grouped_topk(
            router_logits, bias, self.top_k, *self.groups, self.renormalize, self.scaling_factor
        )


class KimiDecoderLayer(LlamaDecoderLayer):
    def make_mixer(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        attention_type: type[nn.Module],
    ) -> tuple[str, nn.Module]:
        is_full = config.layer_types[layer_id] == "full_attention"
        kind = attention_type if is_full else KimiDeltaAttention
        return "self_attn", kind(config, layer_id, quant_config, add_prefix("self_attn", prefix))

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        if config.mlp_layer_types[layer_id] == "sparse":
            return KimiSparseMoeBlock(config, quant_config, prefix)
        return super().make_mlp(config, layer_id, quant_config, prefix)


_GGUF_CONFIG = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "kda.head_dim": "linear_head_dim",
    "rope.dimension_count": "qk_rope_head_dim",
    "attention.value_length": "v_head_dim",
}


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Set sizes of heads, those in the cache aside, and kinds of layers; all layers have as many heads."""
    config.pop("head_dim", None)
    config["qk_nope_head_dim"] = metadata["kimi-linear.attention.key_length_mla"] - config["qk_rope_head_dim"]
    config["v_head_dim"] = metadata["kimi-linear.attention.value_length_mla"]
    config["linear_num_heads"] = config["num_key_value_heads"] = config["num_attention_heads"]
    config["layer_types"] = kinds_of_layers(metadata)
    num_dense = config.pop("first_k_dense_replace", 0)
    config["mlp_layer_types"] = [
        "dense" if layer < num_dense else "sparse" for layer in range(config["num_hidden_layers"])
    ]


class KimiLinearForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "conv1d": ["q_conv1d", "k_conv1d", "v_conv1d"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    rename = [(r"\.block_sparse_moe\.", ".mlp."), (r"\.self_attn\.forget_gate\.", ".self_attn.")]
    attention_type = KimiLatentAttention
    layer_type = KimiDecoderLayer
    gguf = GGUFForm(
        "kimi-linear",
        config=_GGUF_CONFIG,
        adapt=_from_gguf,
        changes=(*GGUF_CHANGES, (r"\.A_log$", "log_decay"), (r"\.[qkv]_conv1d\.weight$", "convolution")),
        names=GGUF_NAMES | {"blk.{bid}.ssm_dt.bias": "model.layers.{bid}.self_attn.dt_bias"},
    )


EntryClass = KimiLinearForCausalLM
