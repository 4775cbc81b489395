"""Apertus (Swiss AI Initiative, 2025): Llama with normed heads, and feed-forward by xIELU without a gate."""

from typing import TYPE_CHECKING

from torch import nn

from rtp_llm.models_py.llama import LlamaDecoderLayer, LlamaForCausalLM, NormedHeadsAttention
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ApertusAttention(NormedHeadsAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        require(config, "qk_norm", (True,))
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            quant_config=quant_config,
            prefix=prefix,
        )


class ApertusDecoderLayer(LlamaDecoderLayer):
    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        require(config, "post_norm", (False,))
        require(config, "mlp_bias", (False,))
        return UngatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=prefix,
            bias=False,
        )


class ApertusForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    rename = [
        (r"\.attention_layernorm\.", ".input_layernorm."),
        (r"\.feedforward_layernorm\.", ".post_attention_layernorm."),
    ]
    attention_type = ApertusAttention
    layer_type = ApertusDecoderLayer
    gguf = GGUFForm(
        "apertus",
        presence={"blk.0.attn_q.bias": "attention_bias"},
        values={
            f"xielu.{name}": f"model.layers.{{bid}}.mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")
        },
    )


EntryClass = ApertusForCausalLM
