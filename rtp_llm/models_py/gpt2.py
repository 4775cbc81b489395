"""GPT-2 (Radford et al., 2019): learned positions, layer norms before the blocks, and feed-forward without a gate."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.linear import ColumnParallelLinear, LinearBase, QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.weights import ShardId
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class StoredTransposed(LinearBase):
    """Mixin of a linear layer whose weights are [inputs, outputs] in the checkpoint."""

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        super().weight_loader(param, tensor.t(), shard_id)  # t() leaves a bias as it is


class GPT2QKVLinear(StoredTransposed, QKVParallelLinear):
    pass


class GPT2ColumnLinear(StoredTransposed, ColumnParallelLinear):
    pass


class GPT2RowLinear(StoredTransposed, RowParallelLinear):
    pass


class GPT2Attention(nn.Module):
    """Causal self-attention. ``reorder_and_upcast_attn`` is ignored: scores are in float32 anyway."""

    qkv_type: type[QKVParallelLinear] = GPT2QKVLinear
    row_type: type[RowParallelLinear] = GPT2RowLinear

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        head_dim = hidden_size // num_heads
        self.c_attn = self.qkv_type(
            hidden_size,
            head_dim,
            num_heads,
            self.num_kv_heads(config),
            quant_config=quant_config,
            prefix=add_prefix("c_attn", prefix),
        )
        self.q_size, self.kv_size = self.c_attn.q_size, self.c_attn.kv_size
        self.c_proj = self.row_type(
            hidden_size, hidden_size, quant_config=quant_config, prefix=add_prefix("c_proj", prefix)
        )
        scaling = head_dim**-0.5 if config.scale_attn_weights else 1.0
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            scaling /= layer_id + 1
        self.attn = RadixAttention(
            self.c_attn.num_heads,
            head_dim,
            scaling,
            num_kv_heads=self.c_attn.num_kv_heads,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def num_kv_heads(self, config: "PretrainedConfig") -> int:
        return config.num_attention_heads

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        qkv, _ = self.c_attn(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        output, _ = self.c_proj(self.attn(q, k, v, forward_batch))
        return output


class GPT2MLP(nn.Module):
    """``c_proj(act(c_fc(x)))``."""

    column_type: type[ColumnParallelLinear] = GPT2ColumnLinear
    row_type: type[RowParallelLinear] = GPT2RowLinear

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        inner_size = 4 * hidden_size if config.n_inner is None else config.n_inner
        self.c_fc = self.column_type(
            hidden_size, inner_size, quant_config=quant_config, prefix=add_prefix("c_fc", prefix)
        )
        self.c_proj = self.row_type(
            inner_size, hidden_size, quant_config=quant_config, prefix=add_prefix("c_proj", prefix)
        )
        self.act_fn = get_act_fn(config.activation_function)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.c_fc(x)
        x, _ = self.c_proj(self.act_fn(x))
        return x


class GPT2Block(nn.Module):
    attention_type: type[nn.Module] = GPT2Attention
    mlp_type: type[nn.Module] = GPT2MLP

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = self.attention_type(config, layer_id, quant_config, add_prefix("attn", prefix))
        self.ln_2 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = self.mlp_type(config, quant_config, add_prefix("mlp", prefix))

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), forward_batch)
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPT2Model(nn.Module):
    layer_type: type[nn.Module] = GPT2Block

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.wte = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("wte", prefix)
        )
        self.wpe = nn.Embedding(config.n_positions, config.hidden_size)
        self.h = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: self.layer_type(config, idx, quant_config, prefix),
            prefix=add_prefix("h", prefix),
        )
        self.ln_f = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T] ids, or [T, hidden_size] embeddings in their place -> [T, hidden_size] after the last norm."""
        hidden_states = self.wte(input_ids) if input_embeds is None else input_embeds
        hidden_states = hidden_states + self.wpe(positions)
        for layer in self.h:
            hidden_states = layer(hidden_states, forward_batch)
        return self.ln_f(hidden_states)


class GPT2LMHeadModel(nn.Module):
    """
    Attributes:
        max_positions: the number of learned positions, and so the longest sequence.
    """

    rename = [(r"^(wte|wpe|h|ln_f)\.", r"transformer.\1.")]  # the first checkpoints were saved from the base model
    base_model_type: type[GPT2Model] = GPT2Model
    gguf = GGUFForm(
        "gpt2",
        config={
            "context_length": "n_positions",
            "feed_forward_length": "n_inner",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        changes=[(r"\.c_(attn|proj|fc)\.weight$", "transposed")],
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        if config.add_cross_attention:
            raise ValueError("add_cross_attention is set: a GPT-2 that attends to an encoder is not supported")
        self.max_positions = config.n_positions
        self.transformer = self.base_model_type(config, quant_config, add_prefix("transformer", prefix))
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


EntryClass = GPT2LMHeadModel
