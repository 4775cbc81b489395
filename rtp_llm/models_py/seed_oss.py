"""Seed-OSS (ByteDance, 2025): Llama with switches of their own for the biases of attention's output and its inputs."""

from typing import TYPE_CHECKING

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class SeedOssAttention(GroupedQueryAttention):
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
            o_bias=config.attention_out_bias,
            quant_config=quant_config,
            prefix=prefix,
        )


class SeedOssForCausalLM(LlamaForCausalLM):
    attention_type = SeedOssAttention
    gguf = GGUFForm(
        "seed_oss",
        presence={"blk.0.attn_q.bias": "attention_bias", "blk.0.attn_output.bias": "attention_out_bias"},
    )


EntryClass = SeedOssForCausalLM
