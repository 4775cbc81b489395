"""BERT (Devlin et al., 2019): an encoder with learned positions, and norms after the blocks.

MiniLM, and BGE, E5 and GTE of 2023, are BERTs.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.encoder_attention import EncoderAttention
from rtp_llm.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.pooler import classifiers, embedders, token_classifiers
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.splade import MaskedLMHead, splades
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch

PACKED = {"qkv_proj": ["query", "key", "value"]}
DECODER_BIAS = r"^masked_lm\.decoder\.bias$"  # the same as the bias beside it, where the decoder is the embedding
OLD_NAMES = [(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")]


class BertEmbeddings(nn.Module):
    """The sum of a token's, its position's and its type's embedding, normed."""

    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        position_type = getattr(config, "position_embedding_type", None) or "absolute"
        if position_type != "absolute":
            raise ValueError(f"position_embedding_type must be 'absolute', not {position_type!r}")
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("word_embeddings", prefix),
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        types = forward_batch.token_types
        of_types = self.token_type_embeddings.weight[0] if types is None else self.token_type_embeddings(types)
        embeddings = self.word_embeddings(input_ids) + of_types
        normed, _ = self.LayerNorm(self.position_embeddings(positions), embeddings)
        return normed


class BertSelfAttention(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        head_dim = config.hidden_size // config.num_attention_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            config.num_attention_heads,
            bias=True,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.attn = EncoderAttention(self.qkv_proj.num_heads, head_dim, head_dim**-0.5, layer_id=layer_id)

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        return self.attn(*qkv.chunk(3, dim=-1), forward_batch)


class BertOutput(nn.Module):
    """The end of a block: a projection, added to what the block began with, and normed."""

    def __init__(
        self, input_size: int, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.dense = RowParallelLinear(
            input_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("dense", prefix)
        )
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        projected, _ = self.dense(hidden_states)
        normed, _ = self.LayerNorm(projected, residual)
        return normed


class BertAttention(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, layer_id, quant_config, add_prefix("self", prefix))
        self.output = BertOutput(config.hidden_size, config, quant_config, add_prefix("output", prefix))

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.output(self.self(hidden_states, forward_batch), hidden_states)


class BertIntermediate(nn.Module):
    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.dense = ColumnParallelLinear(
            config.hidden_size,
            config.intermediate_size,
            quant_config=quant_config,
            prefix=add_prefix("dense", prefix),
        )
        self.act_fn = get_act_fn(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense.activated(hidden_states, self.act_fn)


class BertLayer(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.attention = BertAttention(config, layer_id, quant_config, add_prefix("attention", prefix))
        self.intermediate = BertIntermediate(config, quant_config, add_prefix("intermediate", prefix))
        self.output = BertOutput(config.intermediate_size, config, quant_config, add_prefix("output", prefix))

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        hidden_states = self.attention(hidden_states, forward_batch)
        return self.output(self.intermediate(hidden_states), hidden_states)


class BertEncoder(nn.Module):
    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.layer = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: BertLayer(config, idx, quant_config, prefix),
            prefix=add_prefix("layer", prefix),
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, forward_batch)
        return hidden_states


class BertTrunk(nn.Module):
    """Embeddings and encoder: what all BERTs have."""

    embeddings_type: type[BertEmbeddings] = BertEmbeddings

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        if getattr(config, "is_decoder", False):
            raise ValueError("is_decoder is set: a BERT that makes tokens one after the other is not supported")
        self.embeddings = self.embeddings_type(config, quant_config, add_prefix("embeddings", prefix))
        self.encoder = BertEncoder(config, quant_config, add_prefix("encoder", prefix))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        """[T] ids -> [T, hidden_size]."""
        return self.encoder(self.embeddings(input_ids, positions, forward_batch), forward_batch)


class BertModel(BertTrunk):
    """The bare model, which embeds; a checkpoint of the masked language model holds it, too."""

    generates = False
    packed_modules_mapping = PACKED
    rename = [*OLD_NAMES, (r"^bert\.", "")]
    ignore = [r"^pooler\.", r"^cls\."]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.max_positions = config.max_position_embeddings
        self.poolers = embedders("cls", config.hidden_size)


class BertTransform(nn.Module):
    """The layers of the head for masked tokens before its product with the embedding."""

    def __init__(self, config: "PretrainedConfig", activation: str | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = get_act_fn(activation or config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.act_fn(self.dense(states)))


class BertForMaskedLM(BertModel):
    """With the head for masked tokens, for SPLADE."""

    rename = [*BertModel.rename, (r"^cls\.predictions\.", "masked_lm.")]
    ignore = [r"^pooler\.", r"^cls\.seq_relationship\.", DECODER_BIAS]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        transform, embedding = BertTransform(config), self.embeddings.word_embeddings
        self.masked_lm = MaskedLMHead(config, transform, embedding, decoder_bias=True)
        if self.masked_lm.decoder is not embedding:
            self.ignore = [name for name in self.ignore if name != DECODER_BIAS]
            self.weight_defaults = {"masked_lm.decoder.bias": "masked_lm.bias"}
        self.poolers |= splades(config, self.masked_lm)


class BertSpladeSparseEmbeddingModel(BertForMaskedLM):
    """vLLM's name of a checkpoint of the former that was trained for SPLADE alone."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.poolers = splades(config, self.masked_lm)


class BertPooler(nn.Module):
    """The layer that was trained with the first token's state, before a classifier."""

    def __init__(self, config: "PretrainedConfig") -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(first_states))


class PooledBertTrunk(BertTrunk):
    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__(config, quant_config, prefix)
        self.pooler = BertPooler(config)


class BertForSequenceClassification(nn.Module):
    generates = False
    packed_modules_mapping = PACKED
    rename = OLD_NAMES

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.max_positions = config.max_position_embeddings
        self.bert = PooledBertTrunk(config, quant_config, add_prefix("bert", prefix))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.poolers = classifiers(config, "cls", nn.Sequential(self.bert.pooler, self.classifier))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.bert(input_ids, positions, forward_batch)


class BertForTokenClassification(nn.Module):
    generates = False
    packed_modules_mapping = PACKED
    rename = OLD_NAMES
    ignore = [r"^bert\.pooler\."]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.max_positions = config.max_position_embeddings
        self.bert = BertTrunk(config, quant_config, add_prefix("bert", prefix))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.poolers = token_classifiers(config, self.classifier)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.bert(input_ids, positions, forward_batch)


EntryClass = [
    BertModel,
    BertForMaskedLM,
    BertSpladeSparseEmbeddingModel,
    BertForSequenceClassification,
    BertForTokenClassification,
]
