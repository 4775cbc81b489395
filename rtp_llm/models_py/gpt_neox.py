"""GPT-NeoX and Pythia (Black et al., 2022; Biderman et al., 2023): attention and feed-forward side by side."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.layers.weights import ShardId
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class QKVByHeadLinear(QKVParallelLinear):
    """A projection whose outputs are stored by key heads: the queries, the key and the value of one, then the next."""

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        dim: int | None = param.output_dim  # type: ignore[attr-defined]
        group = self.total_num_heads // self.total_num_kv_heads
        parts_of_all = self.total_num_kv_heads * (group + 2)
        if shard_id is None and dim is not None and tensor.dim() > dim and tensor.shape[dim] % parts_of_all == 0:
            by_head = tensor.unflatten(dim, (self.total_num_kv_heads, group + 2, -1))
            parts = by_head.split([group, 1, 1], dim + 1)
            tensor = torch.cat([part.flatten(dim, dim + 2) for part in parts], dim)
        super().weight_loader(param, tensor, shard_id)  # which refuses other sizes


class QKVByHeadAttention(nn.Module):
    """Causal self-attention with ``query_key_value``, stored by heads, and ``dense``.

    Args:
        bias: both projections have one.
        num_kv_heads: key heads of all ranks; None: one for each query head.
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        bias: bool,
        num_kv_heads: int | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        self.head_dim = hidden_size // num_heads
        self.query_key_value = QKVByHeadLinear(
            hidden_size,
            self.head_dim,
            num_heads,
            num_kv_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=add_prefix("query_key_value", prefix),
        )
        self.q_size, self.kv_size = self.query_key_value.q_size, self.query_key_value.kv_size
        self.dense = RowParallelLinear(
            hidden_size, hidden_size, bias=bias, quant_config=quant_config, prefix=add_prefix("dense", prefix)
        )
        self.rotary_emb = self.make_rope(config, layer_id)
        self.attn = RadixAttention(
            self.query_key_value.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.query_key_value.num_kv_heads,
            layer_id=layer_id,
            alibi_slopes=self.make_slopes(config),
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        """Return the rotation of queries and keys, or ``NoPositions``."""
        return rope_of_layer(config, self.head_dim, layer_id, is_partial=True)

    def make_slopes(self, config: "PretrainedConfig") -> torch.Tensor | None:
        """Return ALiBi's slopes of this rank's heads; None: there is no bias by distance."""
        return None

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, _ = self.query_key_value(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.prepare_queries_and_keys(positions, q, k)
        output, _ = self.dense(self.attn(q, k, v, forward_batch))
        return output

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform queries [T, q_size] and keys [T, kv_size] between projection and attention: rotate them."""
        return self.rotary_emb(positions, q, k)


class GPTNeoXAttention(QKVByHeadAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, bias=config.attention_bias, quant_config=quant_config, prefix=prefix)


class GPTNeoXLayer(nn.Module):
    """A layer: with ``use_parallel_residual`` both blocks read its input, else the second reads the first's result."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GPTNeoXAttention(config, layer_id, quant_config, add_prefix("attention", prefix))
        self.mlp = UngatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
            names=("dense_h_to_4h", "dense_4h_to_h"),
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        attended = hidden_states + self.attention(positions, self.input_layernorm(hidden_states), forward_batch)
        mlp_input = hidden_states if self.use_parallel_residual else attended
        return attended + self.mlp(self.post_attention_layernorm(mlp_input))


class GPTNeoXModel(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.embed_in = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("embed_in", prefix)
        )
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: GPTNeoXLayer(config, idx, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T] ids, or [T, hidden_size] embeddings in their place -> [T, hidden_size] after the last norm."""
        hidden_states = self.embed_in(input_ids) if input_embeds is None else input_embeds
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states, forward_batch)
        return self.final_layer_norm(hidden_states)


class GPTNeoXForCausalLM(nn.Module):
    rename = [
        (r"^(embed_in|layers|final_layer_norm)\.", r"gpt_neox.\1."),  # saved from the base model
        (r"^lm_head\.", "embed_out."),
    ]
    gguf = GGUFForm(
        "gptneox",
        config={"use_parallel_residual": "use_parallel_residual"},
        defaults={"partial_rotary_factor": 1.0},
        presence={"blk.0.attn_qkv.bias": "attention_bias"},
        changes=[(r"\.query_key_value\.", "by_head")],
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.gpt_neox = GPTNeoXModel(config, quant_config, add_prefix("gpt_neox", prefix))
        if config.tie_word_embeddings:
            self.embed_out = self.gpt_neox.embed_in
        else:
            self.embed_out = ParallelLMHead(
                config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("embed_out", prefix)
            )
        self.logits_processor = LogitsProcessor(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt_neox.embed_in

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        hidden_states = self.gpt_neox(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.embed_out, forward_batch)


EntryClass = GPTNeoXForCausalLM
