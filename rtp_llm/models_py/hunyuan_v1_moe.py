"""Hunyuan MoE (Tencent, 2025): Hunyuan dense with routed experts and a shared one on every layer."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.hunyuan_v1_dense import HunYuanDenseV1ForCausalLM
from rtp_llm.models_py.llama import LlamaDecoderLayer
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class HunYuanMoeBlock(SparseMoeBlock):
    """Experts whose weights sum to one, plus a shared one for all tokens."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            of_layer(config.num_experts, layer_id),
            of_layer(config.moe_topk, layer_id),
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            gate_dtype=torch.float32,
            shared=("shared_mlp", config.intermediate_size),
            quant_config=quant_config,
            prefix=prefix,
        )


def of_layer(value: int | list[int], layer_id: int) -> int:
    """Return the layer's number of a field that may be one for all layers, or a list."""
    return value[layer_id] if isinstance(value, list) else value


def check_experts(config: "PretrainedConfig", layer_id: int) -> None:
    """Raise ValueError for experts of other sizes or numbers than transformers' code has."""
    require(config, "use_mixed_mlp_moe", (True,))
    require(config, "norm_topk_prob", (True,))
    require(config, "moe_layer_num_skipped", (0,))
    for name, expected in (("num_shared_expert", 1), ("moe_intermediate_size", config.intermediate_size)):
        value = of_layer(getattr(config, name, expected), layer_id)
        if value != expected:
            raise ValueError(f"{name} of layer {layer_id} must be {expected}, not {value}")


class HunYuanMoEV1DecoderLayer(LlamaDecoderLayer):
    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        check_experts(config, layer_id)
        return HunYuanMoeBlock(config, layer_id, quant_config, prefix)


class HunYuanMoEV1ForCausalLM(HunYuanDenseV1ForCausalLM):
    rename = [(r"\.mlp\.gate\.wg\.", ".mlp.gate.")]
    layer_type = HunYuanMoEV1DecoderLayer
    gguf = GGUFForm(
        "hunyuan-moe", config={"expert_used_count": "moe_topk"}, presence={"blk.0.attn_q.bias": "attention_bias"}
    )


EntryClass = HunYuanMoEV1ForCausalLM
