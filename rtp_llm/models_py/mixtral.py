"""Mixtral (Jiang et al., 2024): Mistral with experts in place of its feed-forward blocks."""

from typing import TYPE_CHECKING

from torch import nn

from rtp_llm.models_py.llama import LlamaDecoderLayer, LlamaForCausalLM
from rtp_llm.models_py.mistral import MistralAttention
from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class MixtralDecoderLayer(LlamaDecoderLayer):
    mlp_name = "block_sparse_moe"

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        return SparseMoeBlock(
            config.num_local_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            expert_names=("w1", "w3", "w2"),
            quant_config=quant_config,
            prefix=prefix,
        )


class MixtralForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    rename = [(r"\.mlp\.", ".block_sparse_moe.")]  # the name in transformers 5, which may be saved
    attention_type = MistralAttention
    layer_type = MixtralDecoderLayer
    gguf = GGUFForm(
        "llama",
        config={"expert_count": "num_local_experts"},
        changes=PERMUTED,
        matches=lambda metadata: metadata.get("llama.expert_count", 0) > 0,
    )


EntryClass = MixtralForCausalLM
