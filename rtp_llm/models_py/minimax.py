"""MiniMax-Text-01 and M1 (MiniMax, 2025): experts, and lightning attention, which keeps a state, on most layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.models_py.olmoe import OlmoeHeadsNorm
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.gated_norm import SigmoidGate
from rtp_llm.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.linear_attention import LightningAttention
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import get_rope, get_rope_config
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


_FACTORS = {
    f"{name}_{factor}_factor": f"layernorm_{published}_{factor}"
    for name, published in (("full_attn", "full_attention"), ("linear_attn", "linear_attention"), ("mlp", "mlp"))
    for factor in ("alpha", "beta")
}


@dataclass
class MiniMaxText01Config:
    """What published checkpoints call otherwise than transformers' MiniMaxConfig, whose names are known as well.

    Args:
        attn_type_list: for each layer, 1: attention; 0: lightning attention. Else ``layer_types``.
        rotary_dim: features of a head that are rotated; None: all.
    """

    attn_type_list: list[int] | None = None
    layer_types: list[str] | None = None
    head_dim: int | None = None
    rotary_dim: int | None = None
    sliding_window: int | None = None
    full_attn_alpha_factor: float = 1.0
    full_attn_beta_factor: float = 1.0
    linear_attn_alpha_factor: float = 1.0
    linear_attn_beta_factor: float = 1.0
    mlp_alpha_factor: float = 1.0
    mlp_beta_factor: float = 1.0
    layernorm_full_attention_alpha: float | None = None
    layernorm_full_attention_beta: float | None = None
    layernorm_linear_attention_alpha: float | None = None
    layernorm_linear_attention_beta: float | None = None
    layernorm_mlp_alpha: float | None = None
    layernorm_mlp_beta: float | None = None

    def __post_init__(self) -> None:
        if self.attn_type_list is not None:
            self.layer_types = ["full_attention" if kind else "linear_attention" for kind in self.attn_type_list]
        if self.layer_types is None:
            raise ValueError("it has neither `attn_type_list` nor `layer_types`: which layers attend is not said")
        for name, published in _FACTORS.items():
            if (value := getattr(self, published)) is not None:
                setattr(self, name, value)


class MiniMaxAttention(GroupedQueryAttention):
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
            qkv_bias=False,
            o_bias=False,
            sliding_window=config.sliding_window,
            quant_config=quant_config,
            prefix=prefix,
        )

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        """Rotate the first ``rotary_dim`` features of a head, where the configuration names so many."""
        base, scaling, _ = get_rope_config(config)
        rotary_dim = getattr(config, "rotary_dim", None) or self.head_dim
        return get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            base=base,
            rope_scaling=scaling,
            partial_rotary_factor=rotary_dim / self.head_dim,
        )


class MiniMaxLightningAttention(nn.Module):
    """Linear attention whose heads forget at a constant rate, the slower the deeper the layer; then a gate."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        size = config.num_attention_heads * self.head_dim
        self.qkv_by_head = ColumnParallelLinear(
            config.hidden_size,
            3 * size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.output_gate = ColumnParallelLinear(
            config.hidden_size, size, bias=False, quant_config=quant_config, prefix=add_prefix("output_gate", prefix)
        )
        self.out_proj = RowParallelLinear(
            size, config.hidden_size, bias=False, quant_config=quant_config, prefix=add_prefix("out_proj", prefix)
        )
        self.act_fn = get_act_fn(config.hidden_act)
        (shard,) = self.output_gate.shards
        self.gate_output = SigmoidGate()
        self.norm = OlmoeHeadsNorm(shard, self.output_gate.tp_group, 1e-6)
        first, num_heads = shard.part * shard.size // self.head_dim, shard.size // self.head_dim
        slopes = lightning_slopes(config.num_attention_heads, layer_id, config.num_hidden_layers)
        self.attn = LightningAttention(num_heads, self.head_dim, slopes[first : first + num_heads], layer_id)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, _ = self.qkv_by_head(hidden_states)
        q, k, v = self.act_fn(qkv).unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)
        output = self.norm(self.attn(q, k, v, forward_batch).flatten(1))
        gate, _ = self.output_gate(hidden_states)
        output, _ = self.out_proj(self.gate_output(output, gate))
        return output


def lightning_slopes(num_heads: int, layer_id: int, num_layers: int) -> torch.Tensor:
    """[num_heads]: how fast each head forgets: a geometric row from head to head, times a factor of the layer."""
    base = 2.0 ** -(8.0 / num_heads)
    factor = 1 - layer_id / (num_layers - 1 + 1e-5) + 1e-5
    return base ** torch.arange(1, num_heads + 1, dtype=torch.float32) * factor


class MiniMaxDecoderLayer(nn.Module):
    """Attention and experts after a norm each; normed inputs, not the inputs themselves, are added to their outputs."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = MiniMaxAttention,
    ) -> None:
        super().__init__()
        require(config, "postnorm", (True,))
        require(config, "shared_intermediate_size", (0,))
        kind = config.layer_types[layer_id]
        if kind not in ("linear_attention", "full_attention"):
            raise ValueError(f"layer_types[{layer_id}] must be 'linear_attention' or 'full_attention', not {kind!r}")
        mixer_type = MiniMaxLightningAttention if kind == "linear_attention" else attention_type
        self.self_attn = mixer_type(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.block_sparse_moe = SparseMoeBlock(
            config.num_local_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            expert_names=("w1", "w3", "w2"),
            quant_config=quant_config,
            prefix=add_prefix("block_sparse_moe", prefix),
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        name = "linear_attn" if kind == "linear_attention" else "full_attn"
        self.attn_alpha = getattr(config, f"{name}_alpha_factor")
        self.attn_beta = getattr(config, f"{name}_beta_factor")
        self.mlp_alpha, self.mlp_beta = config.mlp_alpha_factor, config.mlp_beta_factor

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None]:
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(positions, normed, forward_batch)
        normed = self.post_attention_layernorm(normed * self.attn_alpha + attended * self.attn_beta)
        return normed * self.mlp_alpha + self.block_sparse_moe(normed) * self.mlp_beta, None


class MiniMaxForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    rename = [
        (r"\.mlp\.", ".block_sparse_moe."),  # the name in transformers 5, which may be saved
        (r"\.qkv_proj\.", ".qkv_by_head."),  # of lightning attention; attention's is in three parts
    ]
    ignore = [r"\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$"]  # computed here
    attention_type = MiniMaxAttention
    layer_type = MiniMaxDecoderLayer


class MiniMaxText01ForCausalLM(MiniMaxForCausalLM):
    config_class = MiniMaxText01Config


class MiniMaxM1ForCausalLM(MiniMaxText01ForCausalLM):
    pass


EntryClass = [MiniMaxForCausalLM, MiniMaxText01ForCausalLM, MiniMaxM1ForCausalLM]
