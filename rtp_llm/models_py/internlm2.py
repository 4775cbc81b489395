"""InternLM2 and 2.5 (Cai et al., 2024): Llama by other names, with queries, keys and values stored by key heads."""

from typing import TYPE_CHECKING

from rtp_llm.models_py.gpt_neox import QKVByHeadLinear
from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class InternLM2Attention(GroupedQueryAttention):
    qkv_type = QKVByHeadLinear

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            config, layer_id, qkv_bias=config.bias, o_bias=config.bias, quant_config=quant_config, prefix=prefix
        )


class InternLM2ForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    rename = [
        (r"^model\.tok_embeddings\.", "model.embed_tokens."),
        (r"^output\.", "lm_head."),
        (r"\.attention\.wqkv\.", ".self_attn.qkv_proj."),
        (r"\.attention\.wo\.", ".self_attn.o_proj."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
    ]
    attention_type = InternLM2Attention
    gguf = GGUFForm(
        "internlm2",
        defaults={"model_type": "internlm2", "hidden_act": "silu", "bias": False},
        changes=PERMUTED,
    )


EntryClass = InternLM2ForCausalLM
