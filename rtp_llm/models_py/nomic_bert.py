"""Nomic BERT (Nussbaum et al., 2024): BERT with rotary positions and a gated feed-forward, without most biases."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.bert import BertPooler
from rtp_llm.srt.layers.activation import get_act_and_mul_fn
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.encoder_attention import EncoderAttention
from rtp_llm.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.pooler import classifiers, embedders, token_classifiers
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.layers.weights import ShardId
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# Names in checkpoints, which are those of the code that came with the first ones.
NAMES = [
    (r"\bencoder\.layers\.", "layers."),
    (r"\bemb_ln\.", "embeddings.LayerNorm."),
    (r"\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
    (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.fc11\.", ".up_proj."),
    (r"\.fc12\.", ".gate_proj."),
    (r"\.fc2\.", ".down_proj."),
    (r"\.norm1\.", ".post_attention_layernorm."),
    (r"\.norm2\.", ".post_mlp_layernorm."),
]


class RotaryBertEmbeddings(nn.Module):
    """The sum of a token's and, if there are types, its type's embedding, normed."""

    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("word_embeddings", prefix),
        )
        self.has_types = config.type_vocab_size > 0
        if self.has_types:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        embeddings = self.word_embeddings(input_ids)
        types = forward_batch.token_types
        if self.has_types:
            table = self.token_type_embeddings
            embeddings = embeddings + (table.weight[0] if types is None else table(types))
        return self.LayerNorm(embeddings)


class RotaryBertAttention(nn.Module):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        bias: bool,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            config.num_attention_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * head_dim,
            config.hidden_size,
            bias=bias,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )
        self.rotary_emb = rope_of_layer(config, head_dim, layer_id)
        self.attn = EncoderAttention(self.qkv_proj.num_heads, head_dim, head_dim**-0.5, layer_id=layer_id)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v, forward_batch))
        return output


class GateUpLinear(MergedColumnParallelLinear):
    """Gate and up in one product. A checkpoint that has both in one tensor has up before the gate."""

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        if shard_id is None:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        super().weight_loader(param, tensor, shard_id)


class RotaryBertMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, with a bias at the end or none."""

    def __init__(
        self, config: "PretrainedConfig", bias: bool, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.gate_up_proj = GateUpLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("gate_up_proj", prefix),
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=bias,
            quant_config=quant_config,
            prefix=add_prefix("down_proj", prefix),
        )
        self.act_and_mul = get_act_and_mul_fn(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states, _ = self.gate_up_proj(hidden_states)
        hidden_states, _ = self.down_proj(self.act_and_mul(hidden_states))
        return hidden_states


class RotaryBertLayer(nn.Module):
    """Attention and feed-forward; a norm after each, of the sum with what it began with."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        bias: bool,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.self_attn = RotaryBertAttention(config, layer_id, bias, quant_config, add_prefix("self_attn", prefix))
        self.mlp = RotaryBertMLP(config, bias, quant_config, add_prefix("mlp", prefix))
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_mlp_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        attended = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states, _ = self.post_attention_layernorm(attended, hidden_states)
        hidden_states, _ = self.post_mlp_layernorm(self.mlp(hidden_states), hidden_states)
        return hidden_states


class RotaryBertTrunk(nn.Module):
    """What Nomic BERT and GTE have in common.

    Attributes:
        has_biases: of attention, and of the feed-forward's end.
    """

    has_biases = False

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.embeddings = RotaryBertEmbeddings(config, quant_config, add_prefix("embeddings", prefix))
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: RotaryBertLayer(config, idx, self.has_biases, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        """[T] ids -> [T, hidden_size]."""
        hidden_states = self.embeddings(input_ids, forward_batch)
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states, forward_batch)
        return hidden_states


class NomicBertModel(RotaryBertTrunk):
    """The bare model, which embeds; a checkpoint of the masked language model holds it, too."""

    generates = False
    packed_modules_mapping = PACKED
    rename = [*NAMES, (r"^nomic_bert\.", "")]
    ignore = [r"^pooler\.", r"^cls\."]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.poolers = embedders("mean", config.hidden_size)


class NomicBertForMaskedLM(NomicBertModel):
    """Its trunk: the head for masked tokens is left out."""


class PooledNomicBertTrunk(RotaryBertTrunk):
    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__(config, quant_config, prefix)
        self.pooler = BertPooler(config)


class NomicBertForSequenceClassification(nn.Module):
    generates = False
    packed_modules_mapping = PACKED
    rename = NAMES

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.nomic_bert = PooledNomicBertTrunk(config, quant_config, add_prefix("nomic_bert", prefix))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.poolers = classifiers(config, "cls", nn.Sequential(self.nomic_bert.pooler, self.classifier))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.nomic_bert(input_ids, positions, forward_batch)


class NomicBertForTokenClassification(nn.Module):
    generates = False
    packed_modules_mapping = PACKED
    rename = NAMES

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.nomic_bert = RotaryBertTrunk(config, quant_config, add_prefix("nomic_bert", prefix))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.poolers = token_classifiers(config, self.classifier)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.nomic_bert(input_ids, positions, forward_batch)


EntryClass = [
    NomicBertModel,
    NomicBertForMaskedLM,
    NomicBertForSequenceClassification,
    NomicBertForTokenClassification,
]
