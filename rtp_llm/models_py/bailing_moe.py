"""Ling and Ring (Ant Group, 2025): Llama by other names, with routed and shared experts; 2.0 as in DeepSeek-V3."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import LlamaDecoderLayer, LlamaForCausalLM, NormedHeadsAttention
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
from rtp_llm.srt.layers.moe import Routing, sigmoid_grouped_topk
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class BailingAttention(NormedHeadsAttention):
    """Attention whose heads are normed with ``use_qk_norm`` only."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        require(config, "use_bias", (False,))
        require(config, "use_sliding_window", (False,))
        super().__init__(
            config, layer_id, qkv_bias=config.use_qkv_bias, o_bias=False, quant_config=quant_config, prefix=prefix
        )
        if not getattr(config, "use_qk_norm", False):
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, is_partial=True)


class BailingSparseMoeBlock(SparseMoeBlock):
    """Experts by the largest of a softmax, plus shared ones for all tokens."""

    def __init__(
        self,
        config: "PretrainedConfig",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        gate_dtype: torch.dtype | None = None,
    ) -> None:
        self.check_routing(config)
        shared_size = getattr(config, "moe_shared_expert_intermediate_size", None) or config.moe_intermediate_size
        super().__init__(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            config.hidden_act,
            renormalize=config.norm_topk_prob,
            gate_dtype=gate_dtype,
            shared=("shared_experts", shared_size * config.num_shared_experts),
            quant_config=quant_config,
            prefix=prefix,
        )

    def check_routing(self, config: "PretrainedConfig") -> None:
        """Raise ValueError for a routing that this class does not compute."""
        require(config, "score_function", ("softmax", None))
        require(config, "moe_router_enable_expert_bias", (False,))
        require(config, "n_group", (None, 1))
        require(config, "routed_scaling_factor", (1.0, None))


class BailingV2SparseMoeBlock(BailingSparseMoeBlock):
    """The same by sigmoid scores plus a correction, from the best groups of experts, as in DeepSeek-V3."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix, gate_dtype=torch.float32)
        self.num_groups, self.num_top_groups = config.n_group, config.topk_group
        self.routed_scaling_factor = config.routed_scaling_factor
        self.gate.expert_bias = make_parameter(
            torch.empty(config.num_experts, dtype=torch.float32), default_weight_loader
        )

    def check_routing(self, config: "PretrainedConfig") -> None:
        require(config, "score_function", ("sigmoid",))
        require(config, "moe_router_enable_expert_bias", (True,))

    def route(self, router_logits: torch.Tensor) -> Routing:
        return sigmoid_grouped_topk(
            router_logits,
            self.gate.get_parameter("expert_bias"),
            self.top_k,
            self.num_groups,
            self.num_top_groups,
            renormalize=self.renormalize,
            routed_scaling_factor=self.routed_scaling_factor,
        )


class BailingDecoderLayer(LlamaDecoderLayer):
    """A layer: the first ``first_k_dense_replace`` are dense."""

    moe_type: type[nn.Module] = BailingSparseMoeBlock

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        if layer_id >= config.first_k_dense_replace:
            return self.moe_type(config, quant_config, prefix)
        return super().make_mlp(config, layer_id, quant_config, prefix)


class BailingV2DecoderLayer(BailingDecoderLayer):
    moe_type = BailingV2SparseMoeBlock


class BailingMoeForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    rename = [
        (r"^model\.word_embeddings\.", "model.embed_tokens."),
        (r"\.attention\.query_key_value\.", ".self_attn.qkv_proj."),
        (r"\.attention\.dense\.", ".self_attn.o_proj."),
        (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
        (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    ]
    attention_type = BailingAttention
    layer_type: type[nn.Module] = BailingDecoderLayer
    gguf = GGUFForm(
        "bailingmoe",
        config={"expert_shared_count": "num_shared_experts"},
        defaults={"model_type": "bailing_moe", "hidden_act": "silu", "use_qkv_bias": False, "norm_topk_prob": False},
        changes=PERMUTED,
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        require(config, "norm_head", (False,))  # a head whose columns are normed
        require(config, "norm_softmax", (False,))
        require(config, "multi_gate", (False,))
        require(config, "use_rmsnorm", (True,))
        super().__init__(config, quant_config, prefix)


class BailingMoeV2ForCausalLM(BailingMoeForCausalLM):
    layer_type = BailingV2DecoderLayer
    gguf = GGUFForm(
        "bailingmoe2",
        config={"expert_shared_count": "num_shared_experts"},
        defaults={
            "model_type": "bailing_moe",
            "hidden_act": "silu",
            "score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
        },
        presence={"blk.0.attn_qkv.bias": "use_qkv_bias", "blk.0.attn_q_norm.weight": "use_qk_norm"},
        names={"blk.{bid}.exp_probs_b.bias": "model.layers.{bid}.mlp.gate.expert_bias"},
    )


EntryClass = [BailingMoeForCausalLM, BailingMoeV2ForCausalLM]
