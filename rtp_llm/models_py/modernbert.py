"""ModernBERT (Warner et al., 2024): an encoder with rotary positions, gates, norms before the blocks, and windows."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.layers.activation import get_act_and_mul_fn, get_act_fn
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.encoder_attention import EncoderAttention
from rtp_llm.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.pooler import Pooler, classifiers, embedders, token_classifiers
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.layers.splade import MaskedLMHead, splades
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class ModernBertEmbeddings(nn.Module):
    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.tok_embeddings = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("tok_embeddings", prefix),
        )
        self.norm = LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tok_embeddings(input_ids))


class ModernBertAttention(nn.Module):
    """Attention whose window, on some layers, is of so many tokens on each side of a token."""

    def __init__(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        hidden_size, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.Wqkv = QKVParallelLinear(
            hidden_size,
            head_dim,
            config.num_attention_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=add_prefix("Wqkv", prefix),
        )
        self.Wo = RowParallelLinear(
            hidden_size,
            hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=add_prefix("Wo", prefix),
        )
        is_local = config.layer_types[layer_id] == "sliding_attention"
        self.rotary_emb = rope_of_layer(config, head_dim, layer_id)
        self.attn = EncoderAttention(
            self.Wqkv.num_heads,
            head_dim,
            head_dim**-0.5,
            layer_id=layer_id,
            window=config.local_attention // 2 + 1 if is_local else None,
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, _ = self.Wqkv(hidden_states)
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.Wo(self.attn(q, k, v, forward_batch))
        return output


class ModernBertMLP(nn.Module):
    """``Wo(act(first half of Wi(x)) * second half)``."""

    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        size = int(config.intermediate_size)
        self.Wi = MergedColumnParallelLinear(
            config.hidden_size,
            [size, size],
            bias=config.mlp_bias,
            quant_config=quant_config,
            prefix=add_prefix("Wi", prefix),
        )
        self.Wo = RowParallelLinear(
            size,
            config.hidden_size,
            bias=config.mlp_bias,
            quant_config=quant_config,
            prefix=add_prefix("Wo", prefix),
        )
        self.act_and_mul = get_act_and_mul_fn(config.hidden_activation)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states, _ = self.Wi(hidden_states)
        hidden_states, _ = self.Wo(self.act_and_mul(hidden_states))
        return hidden_states


class ModernBertLayer(nn.Module):
    """Attention and feed-forward, each after a norm; the first layer's attention has none, as embeddings are normed."""

    def __init__(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        norm = LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.attn_norm: nn.Module = nn.Identity() if layer_id == 0 else norm
        self.attn = ModernBertAttention(config, layer_id, quant_config, add_prefix("attn", prefix))
        self.mlp_norm = LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.mlp = ModernBertMLP(config, quant_config, add_prefix("mlp", prefix))

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        attended = self.attn(positions, self.attn_norm(hidden_states), forward_batch)
        normed, hidden_states = self.mlp_norm(attended, hidden_states)
        return hidden_states + self.mlp(normed)


class ModernBertTrunk(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.embeddings = ModernBertEmbeddings(config, quant_config, add_prefix("embeddings", prefix))
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: ModernBertLayer(config, idx, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )
        self.final_norm = LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        """[T] ids -> [T, hidden_size]."""
        hidden_states = self.embeddings(input_ids)
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states, forward_batch)
        return self.final_norm(hidden_states)


class ModernBertHead(nn.Module):
    """The layer before a classifier."""

    def __init__(self, config: "PretrainedConfig") -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act_fn = get_act_fn(config.classifier_activation)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act_fn(self.dense(states)))


class ModernBertModel(ModernBertTrunk):
    """The bare model, which embeds; a checkpoint of the masked language model holds it, too."""

    generates = False
    rename = [(r"^model\.", "")]
    ignore = [r"^head\.", r"^decoder\."]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.poolers = embedders("cls", config.hidden_size)


class ModernBertForMaskedLM(ModernBertModel):
    """With the head for masked tokens, for SPLADE."""

    rename = [
        *ModernBertModel.rename,
        (r"^head\.", "masked_lm.transform."),
        (r"^decoder\.bias$", "masked_lm.bias"),
        (r"^decoder\.weight$", "masked_lm.decoder.weight"),
    ]
    ignore = []

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        embedding = self.embeddings.tok_embeddings
        self.masked_lm = MaskedLMHead(config, ModernBertHead(config), embedding, config.decoder_bias)
        self.poolers |= splades(config, self.masked_lm)


class _WithClassifier(nn.Module):
    generates = False

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.model = ModernBertTrunk(config, quant_config, add_prefix("model", prefix))
        self.head = ModernBertHead(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.poolers = self.make_poolers(config, nn.Sequential(self.head, self.classifier))

    def make_poolers(self, config: "PretrainedConfig", head: nn.Module) -> dict[str, Pooler]:
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.model(input_ids, positions, forward_batch)


class ModernBertForSequenceClassification(_WithClassifier):
    def make_poolers(self, config: "PretrainedConfig", head: nn.Module) -> dict[str, Pooler]:
        return classifiers(config, config.classifier_pooling, head)


class ModernBertForTokenClassification(_WithClassifier):
    def make_poolers(self, config: "PretrainedConfig", head: nn.Module) -> dict[str, Pooler]:
        return token_classifiers(config, head)


EntryClass = [
    ModernBertModel,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
]
