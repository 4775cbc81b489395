"""DeepSeek-V2 (DeepSeek-AI, 2024): multi-head latent attention, and routed and shared experts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.llama import LlamaDecoderLayer, LlamaForCausalLM
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.distributed.parallel_state import divide, get_tp_group
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from rtp_llm.srt.layers.mla import apply_by_head
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.moe import FusedMoE, Routing, softmax_grouped_topk, softmax_topk
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rope_scaling import yarn_get_mscale
from rtp_llm.srt.layers.rotary import get_rope, get_rope_config
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class DeepseekV2Attention(nn.Module):
    """Multi-head latent attention.

    Each token has one latent c [kv_lora_rank] and one rotated key r [qk_rope_head_dim] for all heads; a head's key is
    ``(W_UK c, r)`` and its value ``W_UV c``. Only c and r are cached. Keys and values are never made: W_UK is applied
    to the query instead, since ``q . W_UK c = (W_UK^T q) . c``, and W_UV to the weighted sum of the latents.
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        self.num_heads = divide(num_heads, get_tp_group().world_size, "number of attention heads")
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent_dim, self.v_head_dim = config.kv_lora_rank, config.v_head_dim
        self.qk_head_dim = self.nope_dim + self.rope_dim
        self._make_query_projections(config, quant_config, prefix)
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            hidden_size,
            self.latent_dim + self.rope_dim,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=add_prefix("kv_a_proj_with_mqa", prefix),
        )
        self.kv_a_layernorm = RMSNorm(self.latent_dim, eps=1e-6)  # whatever config.rms_norm_eps says
        self.kv_b_proj = ColumnParallelLinear(
            self.latent_dim,
            num_heads * (self.nope_dim + self.v_head_dim),
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("kv_b_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            num_heads * self.v_head_dim,
            hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )
        self.rotary_emb = self.make_rope(config)
        self.attn = RadixAttention(
            self.num_heads,
            self.latent_dim + self.rope_dim,
            self.qk_head_dim**-0.5 * score_factor(config),
            num_kv_heads=1,
            layer_id=layer_id,
            v_head_dim=self.latent_dim,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
            latent=True,
        )

    def _make_query_projections(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        """Make one projection, or two of low rank with a norm between them."""
        self.q_lora_rank = config.q_lora_rank
        q_size = config.num_attention_heads * self.qk_head_dim
        if self.q_lora_rank is None:
            self.q_proj = ColumnParallelLinear(
                config.hidden_size, q_size, bias=False, quant_config=quant_config, prefix=add_prefix("q_proj", prefix)
            )
            return
        self.q_a_proj = ReplicatedLinear(
            config.hidden_size,
            self.q_lora_rank,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=add_prefix("q_a_proj", prefix),
        )
        self.q_a_layernorm = RMSNorm(self.q_lora_rank, eps=1e-6)
        self.q_b_proj = ColumnParallelLinear(
            self.q_lora_rank, q_size, bias=False, quant_config=quant_config, prefix=add_prefix("q_b_proj", prefix)
        )

    def make_rope(self, config: "PretrainedConfig", is_interleaved: bool = True) -> nn.Module:
        rope_theta, rope_scaling, _ = get_rope_config(config)
        return get_rope(
            self.rope_dim,
            max_position=config.max_position_embeddings,
            base=rope_theta,
            is_neox_style=not is_interleaved,
            rope_scaling=rope_scaling,
        )

    def finish_load(self) -> None:
        """Split kv_b_proj into w_uk [heads, qk_nope_head_dim, kv_lora_rank], w_uv [heads, kv_lora_rank, v_head_dim]."""
        by_head = self.kv_b_proj.dequantized_weight().unflatten(0, (self.num_heads, self.nope_dim + self.v_head_dim))
        self.w_uk, w_uv = by_head.split([self.nope_dim, self.v_head_dim], dim=1)
        self.w_uv = w_uv.transpose(1, 2)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        q_nope, q_rope = self._queries(hidden_states).split([self.nope_dim, self.rope_dim], dim=-1)
        latent_and_key, _ = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_rope = latent_and_key[:, None].split([self.latent_dim, self.rope_dim], dim=-1)
        q_rope, k_rope = self.rotary_emb(positions, q_rope, k_rope)
        q = torch.cat((apply_by_head(q_nope, self.w_uk), q_rope), dim=-1)
        k = torch.cat((self.kv_a_layernorm(latent), k_rope), dim=-1)
        attended = self.attn(q, k, None, forward_batch).unflatten(-1, (self.num_heads, self.latent_dim))
        output, _ = self.o_proj(apply_by_head(attended, self.w_uv).flatten(1))
        return output

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, heads, qk_head_dim]."""
        if self.q_lora_rank is None:
            q, _ = self.q_proj(hidden_states)
        else:
            low_rank, _ = self.q_a_proj(hidden_states)
            q, _ = self.q_b_proj(self.q_a_layernorm(low_rank))
        return q.unflatten(-1, (self.num_heads, self.qk_head_dim))


def score_factor(config: "PretrainedConfig") -> float:
    """Return the factor of scores for a stretched context, besides YaRN's factors of queries and keys."""
    _, rope_scaling, _ = get_rope_config(config)
    if not rope_scaling or not rope_scaling.get("mscale_all_dim"):
        return 1.0
    return yarn_get_mscale(rope_scaling["factor"], rope_scaling["mscale_all_dim"]) ** 2


class DeepseekV2MoE(nn.Module):
    """Routed experts, and shared ones for every token."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.check_routing(config)
        self.topk_method = getattr(config, "topk_method", None)
        self.top_k = config.num_experts_per_tok
        self.num_groups = config.n_group
        self.num_top_groups = config.topk_group
        self.routed_scaling_factor = config.routed_scaling_factor
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.n_routed_experts,
            bias=False,
            params_dtype=torch.float32,
            prefix=add_prefix("gate", prefix),
        )
        self.experts = FusedMoE(
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            activation=config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )
        self.shared_experts = GatedMLP(
            config.hidden_size,
            config.moe_intermediate_size * config.n_shared_experts,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("shared_experts", prefix),
            bias=getattr(config, "mlp_bias", False),
        )

    def check_routing(self, config: "PretrainedConfig") -> None:
        """Raise ValueError for a routing that this class does not compute."""
        require(config, "topk_method", ("greedy", "group_limited_greedy"))
        require(config, "scoring_func", ("softmax",))
        require(config, "norm_topk_prob", (False,))  # implementations differ in whether such weights are scaled
        if config.topk_method == "group_limited_greedy":
            check_groups(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states.float())
        topk_weights, topk_ids = self.route(router_logits)
        return self.experts(hidden_states, topk_weights, topk_ids) + self.shared_experts(hidden_states)

    def route(self, router_logits: torch.Tensor) -> Routing:
        """[T, n_routed_experts] float32 -> weights and ids of experts, [T, num_experts_per_tok] each."""
        if self.topk_method == "group_limited_greedy":
            return softmax_grouped_topk(
                router_logits,
                self.top_k,
                self.num_groups,
                self.num_top_groups,
                routed_scaling_factor=self.routed_scaling_factor,
            )
        topk_weights, topk_ids = softmax_topk(router_logits, self.top_k, renormalize=False)
        return topk_weights * self.routed_scaling_factor, topk_ids


def check_groups(config: "PretrainedConfig") -> None:
    """Raise ValueError if experts cannot be grouped as the configuration says."""
    num_experts, num_groups, num_top = config.n_routed_experts, config.n_group, config.topk_group
    if not num_groups or not num_top or num_experts % num_groups or num_top > num_groups:
        raise ValueError(
            f"n_group={num_groups} must divide n_routed_experts={num_experts}, and topk_group={num_top} must be from 1 "
            "to n_group"
        )


class DeepseekV2DecoderLayer(LlamaDecoderLayer):
    """A layer. The first ones are dense; of the others, every ``moe_layer_freq``-th (counted from 0) has experts."""

    moe_type: type[nn.Module] = DeepseekV2MoE

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        if layer_id >= config.first_k_dense_replace and layer_id % getattr(config, "moe_layer_freq", 1) == 0:
            return self.moe_type(config, quant_config, prefix)
        return super().make_mlp(config, layer_id, quant_config, prefix)


GGUF_CONFIG = {
    "expert_count": "n_routed_experts",
    "rope.dimension_count": "qk_rope_head_dim",
    "attention.value_length": "v_head_dim",
}
GGUF_CHANGES = [(r"\.kv_b_proj\.weight$", "latent")]
GGUF_NAMES = {
    "blk.{bid}.attn_k_b": "model.layers.{bid}.self_attn.kv_b_proj",
    "blk.{bid}.attn_v_b": "model.layers.{bid}.self_attn.kv_b_proj",
}


def add_gguf_sizes(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Set the sizes of heads, which a GGUF of 2025 and later has beside those of the cache, and YaRN's factors."""
    del config["head_dim"]
    size = metadata.get("deepseek2.attention.key_length_mla", metadata["deepseek2.attention.key_length"])
    config["qk_nope_head_dim"] = size - metadata["deepseek2.rope.dimension_count"]
    config["v_head_dim"] = metadata.get("deepseek2.attention.value_length_mla", config["v_head_dim"])
    config["num_key_value_heads"] = config["num_attention_heads"]
    if "deepseek2.rope.scaling.yarn_log_multiplier" in metadata:
        scale = round(10 * metadata["deepseek2.rope.scaling.yarn_log_multiplier"], 6)
        config["rope_scaling"] |= {"mscale": scale, "mscale_all_dim": scale}


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    add_gguf_sizes(metadata, config)
    config["topk_method"] = "group_limited_greedy" if config.get("n_group", 1) > 1 else "greedy"


class DeepseekV2ForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    attention_type: type[nn.Module] = DeepseekV2Attention
    layer_type: type[nn.Module] = DeepseekV2DecoderLayer
    gguf = GGUFForm(
        "deepseek2",
        config=GGUF_CONFIG,
        defaults={"q_lora_rank": None},
        adapt=_from_gguf,
        changes=GGUF_CHANGES,
        names=GGUF_NAMES,
    )


EntryClass = DeepseekV2ForCausalLM
