"""Phi-3.5-MoE (Microsoft, 2024): Mixtral with layer norms, two experts found one after the other, and LongRoPE."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from rtp_llm.models_py.phi3 import use_window_from_gguf
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.moe import Routing
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import get_rope, get_rope_config
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PhimoeAttention(GroupedQueryAttention):
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
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            sliding_window=config.sliding_window,
            quant_config=quant_config,
            prefix=prefix,
        )

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        """``short_mscale`` and ``long_mscale`` stand in place of LongRoPE's own factor of cosine and sine.

        Beyond the original context the long frequencies are taken, as Microsoft's code does. Transformers 5 means to,
        but keeps the short ones.
        """
        base, rope_scaling, _ = get_rope_config(config)
        if rope_scaling is not None:
            kind, factor = rope_scaling.get("rope_type") or rope_scaling.get("type"), rope_scaling.get("short_mscale")
            if kind not in ("longrope", "su") or factor is None or factor != rope_scaling.get("long_mscale"):
                raise ValueError(
                    "rope_parameters must be of kind 'default', or 'longrope' with equal short_mscale and long_mscale, "
                    f"not {rope_scaling}"
                )
            rope_scaling = rope_scaling | {"attention_factor": factor}
        return get_rope(
            self.head_dim, max_position=config.max_position_embeddings, base=base, rope_scaling=rope_scaling
        )


class PhimoeSparseMoeBlock(SparseMoeBlock):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        require(config, "num_experts_per_tok", (2,))
        super().__init__(
            config.num_local_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            expert_names=("w1", "w3", "w2"),
            quant_config=quant_config,
            prefix=prefix,
        )
        self.jitter = config.router_jitter_noise

    def route(self, router_logits: torch.Tensor) -> Routing:
        return sparse_mixer(router_logits, self.jitter)


def sparse_mixer(router_logits: torch.Tensor, jitter: float) -> Routing:
    """Choose the best expert, and then the best of the others (SparseMixer-v2; Liu et al., 2024).

    The weight of each is a softmax over itself and those that come close to it: whose logit is less by at most
    ``2 * jitter``, relative to the larger of its own size and the best logit. So the two do not sum to one.
    """
    weights, ids, candidates = [], [], router_logits
    for _ in range(2):
        best, best_id = candidates.max(dim=-1, keepdim=True)
        is_far = (best - router_logits) / router_logits.abs().clamp(min=best) > 2 * jitter
        near = candidates.masked_fill(is_far, float("-inf"))
        weights.append(near.softmax(dim=-1, dtype=torch.float32).gather(-1, best_id))
        ids.append(best_id)
        candidates = candidates.scatter(-1, best_id, float("-inf"))
    return torch.cat(weights, dim=-1), torch.cat(ids, dim=-1)


class PhimoeDecoderLayer(LlamaDecoderLayer):
    mlp_name = "block_sparse_moe"

    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        return PhimoeSparseMoeBlock(config, quant_config, prefix)


class PhimoeModel(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return LayerNorm(config.hidden_size, eps=config.rms_norm_eps)


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    use_window_from_gguf(metadata, config)
    if "rope_scaling" in config:
        scale = config["rope_scaling"].pop("attention_factor", 1.0)
        config["rope_scaling"] |= {"short_mscale": scale, "long_mscale": scale}


class PhimoeForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    rename = [(r"\.mlp\.router\.", ".block_sparse_moe.gate."), (r"\.mlp\.", ".block_sparse_moe.")]  # transformers 5
    attention_type = PhimoeAttention
    layer_type = PhimoeDecoderLayer
    base_model_type = PhimoeModel
    gguf = GGUFForm(
        "phimoe",
        config={
            "expert_count": "num_local_experts",
            "rope.scaling.original_context_length": "original_max_position_embeddings",
        },
        presence={"blk.0.attn_q.bias": "attention_bias", "output.bias": "lm_head_bias"},
        adapt=_from_gguf,
    )

    def has_head_bias(self, config: "PretrainedConfig") -> bool:
        return config.lm_head_bias


EntryClass = PhimoeForCausalLM
