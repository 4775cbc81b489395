"""MPT (MosaicML, 2023): biases by distance instead of positions, clipped queries, keys and values, no other biases."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.alibi import alibi_slopes
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class MptAttention(nn.Module):
    """Causal self-attention. ``Wqkv`` has all queries, then all keys, then all values.

    ``alibi_bias_max`` is heeded as in MosaicML's code; transformers' class computes with 8 whatever it is.
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        hidden_size, num_heads, options = config.hidden_size, config.num_attention_heads, config.attn_config
        head_dim = hidden_size // num_heads
        self.clip = options.clip_qkv
        self.Wqkv = QKVParallelLinear(
            hidden_size, head_dim, num_heads, bias=False, quant_config=quant_config, prefix=add_prefix("Wqkv", prefix)
        )
        self.out_proj = RowParallelLinear(
            hidden_size, hidden_size, bias=False, quant_config=quant_config, prefix=add_prefix("out_proj", prefix)
        )
        self.attn = RadixAttention(
            self.Wqkv.num_heads,
            head_dim,
            head_dim**-0.5 if options.softmax_scale is None else options.softmax_scale,
            num_kv_heads=self.Wqkv.num_kv_heads,
            layer_id=layer_id,
            alibi_slopes=alibi_slopes(self.Wqkv, options.alibi_bias_max),
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        qkv, _ = self.Wqkv(hidden_states)
        if self.clip:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv.chunk(3, dim=-1)
        output, _ = self.out_proj(self.attn(q, k, v, forward_batch))
        return output


class MptBlock(nn.Module):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.norm_1 = LayerNorm(hidden_size, eps=config.layer_norm_epsilon, bias=False)
        self.attn = MptAttention(config, layer_id, quant_config, add_prefix("attn", prefix))
        self.norm_2 = LayerNorm(hidden_size, eps=config.layer_norm_epsilon, bias=False)
        self.ffn = UngatedMLP(
            hidden_size,
            4 * hidden_size,
            "gelu",
            quant_config=quant_config,
            prefix=add_prefix("ffn", prefix),
            bias=False,
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm_1(hidden_states), forward_batch)
        return hidden_states + self.ffn(self.norm_2(hidden_states))


class MptModel(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.wte = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("wte", prefix)
        )
        self.blocks = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: MptBlock(config, idx, quant_config, prefix),
            prefix=add_prefix("blocks", prefix),
        )
        self.norm_f = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T] ids, or [T, hidden_size] embeddings in their place -> [T, hidden_size] after the last norm."""
        hidden_states = self.wte(input_ids) if input_embeds is None else input_embeds
        for layer in self.blocks:
            hidden_states = layer(hidden_states, forward_batch)
        return self.norm_f(hidden_states)


def _refuse_other_forms(config: "PretrainedConfig") -> None:
    """Raise ValueError for a field of MosaicML's code that neither transformers nor this file computes.

    ``learned_pos_emb`` is not among them: with ALiBi there are no learned positions, whatever it says.
    """
    options = config.attn_config
    served: list[tuple[str, object, tuple[object, ...]]] = [
        ("no_bias", config.no_bias, (True,)),
        ("expansion_ratio", config.expansion_ratio, (4,)),
        ("norm_type", config.norm_type, ("low_precision_layernorm", "layernorm")),
        ("logit_scale", config.logit_scale, (None,)),
        ("attn_config.attn_type", options.attn_type, ("multihead_attention",)),
        ("attn_config.alibi", options.alibi, (True,)),
        ("attn_config.qk_ln", options.qk_ln, (False,)),
        ("attn_config.prefix_lm", options.prefix_lm, (False,)),
    ]
    for name, value, values in served:
        if value not in values:
            raise ValueError(f"{name}={value!r} is not supported for MPT; have {list(values)}")


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    config["attn_config"] = {
        "clip_qkv": metadata.get("mpt.attention.clamp_kqv"),
        "alibi_bias_max": int(metadata["mpt.attention.max_alibi_bias"]),
        "alibi": metadata["mpt.attention.max_alibi_bias"] > 0,
    }


class MptForCausalLM(nn.Module):
    rename = [(r"^(wte|blocks|norm_f)\.", r"transformer.\1.")]  # saved from the base model
    gguf = GGUFForm(
        "mpt",
        config={
            "context_length": "max_seq_len",
            "embedding_length": "d_model",
            "block_count": "n_layers",
            "attention.head_count": "n_heads",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        adapt=_from_gguf,
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        _refuse_other_forms(config)
        self.transformer = MptModel(config, quant_config, add_prefix("transformer", prefix))
        if config.tie_word_embeddings:
            self.lm_head = self.transformer.wte
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("lm_head", prefix)
            )
        self.logits_processor = LogitsProcessor(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        hidden_states = self.transformer(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)


EntryClass = MptForCausalLM
