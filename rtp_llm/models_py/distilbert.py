"""DistilBERT (Sanh et al., 2019): BERT without token types, distilled into half of the layers.

Its configuration and its weights have names of their own; the layers are BERT's.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.bert import BertEncoder, BertTransform
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.pooler import classifiers, embedders, token_classifiers
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.splade import MaskedLMHead, splades
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch

PACKED = {"qkv_proj": ["query", "key", "value"]}
RENAME = [
    (r"transformer\.layer\.", "encoder.layer."),
    (r"\.attention\.([qkv])_lin\.", r".attention.self.\1_lin."),
    (r"\.q_lin\.", ".query."),
    (r"\.k_lin\.", ".key."),
    (r"\.v_lin\.", ".value."),
    (r"\.attention\.out_lin\.", ".attention.output.dense."),
    (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
    (r"\.ffn\.lin1\.", ".intermediate.dense."),
    (r"\.ffn\.lin2\.", ".output.dense."),
    (r"\.output_layer_norm\.", ".output.LayerNorm."),
]
EPS = 1e-12


def bert_config(config: "PretrainedConfig") -> "PretrainedConfig":
    """Return the configuration with BERT's names beside its own."""
    config.intermediate_size = config.hidden_dim
    config.hidden_act = config.activation
    config.layer_norm_eps = EPS
    return config


class DistilBertEmbeddings(nn.Module):
    """The sum of a token's and its position's embedding, normed."""

    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("word_embeddings", prefix),
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=EPS)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        normed, _ = self.LayerNorm(self.position_embeddings(positions), self.word_embeddings(input_ids))
        return normed


class DistilBertTrunk(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        config = bert_config(config)
        self.embeddings = DistilBertEmbeddings(config, quant_config, add_prefix("embeddings", prefix))
        self.encoder = BertEncoder(config, quant_config, add_prefix("encoder", prefix))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        """[T] ids -> [T, hidden_size]."""
        return self.encoder(self.embeddings(input_ids, positions), forward_batch)


class DistilBertModel(DistilBertTrunk):
    """The bare model, which embeds."""

    generates = False
    packed_modules_mapping = PACKED
    rename = [(r"^distilbert\.", ""), *RENAME]
    ignore = [r"^vocab_"]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.max_positions = config.max_position_embeddings
        self.poolers = embedders("cls", config.hidden_size)


class DistilBertForMaskedLM(DistilBertModel):
    """With the head for masked tokens, for SPLADE."""

    rename = [
        *DistilBertModel.rename,
        (r"^vocab_transform\.", "masked_lm.transform.dense."),
        (r"^vocab_layer_norm\.", "masked_lm.transform.LayerNorm."),
        (r"^vocab_projector\.bias$", "masked_lm.bias"),
        (r"^vocab_projector\.weight$", "masked_lm.decoder.weight"),
    ]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.masked_lm = MaskedLMHead(config, BertTransform(config), self.embeddings.word_embeddings)
        self.poolers |= splades(config, self.masked_lm)


class _WithHead(nn.Module):
    generates = False
    packed_modules_mapping = PACKED
    rename = RENAME

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.max_positions = config.max_position_embeddings
        self.distilbert = DistilBertTrunk(config, quant_config, add_prefix("distilbert", prefix))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.distilbert(input_ids, positions, forward_batch)


class DistilBertForSequenceClassification(_WithHead):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        self.poolers = classifiers(config, "cls", nn.Sequential(self.pre_classifier, nn.ReLU(), self.classifier))


class DistilBertForTokenClassification(_WithHead):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.poolers = token_classifiers(config, self.classifier)


EntryClass = [
    DistilBertModel,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
]
