"""RoBERTa (Liu et al., 2019), XLM-RoBERTa (Conneau et al., 2020): BERT whose positions begin behind the padding id.

BGE-M3, multilingual E5 and most multilingual rerankers are XLM-RoBERTas.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.bert import DECODER_BIAS, OLD_NAMES, PACKED, BertEmbeddings, BertTransform, BertTrunk
from rtp_llm.srt.layers.pooler import classifiers, embedders, token_classifiers
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.splade import MaskedLMHead, splades
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class RobertaEmbeddings(BertEmbeddings):
    """Positions begin at ``pad_token_id + 1``."""

    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__(config, quant_config, prefix)
        self.first_position = config.pad_token_id + 1

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return super().forward(input_ids, positions + self.first_position, forward_batch)


class RobertaTrunk(BertTrunk):
    embeddings_type = RobertaEmbeddings


def max_positions(config: "PretrainedConfig") -> int:
    """Return how many of the learned positions are a token's."""
    return config.max_position_embeddings - config.pad_token_id - 1


class RobertaModel(RobertaTrunk):
    """The bare model, which embeds; a checkpoint of the masked language model holds it, too."""

    generates = False
    packed_modules_mapping = PACKED
    rename = [*OLD_NAMES, (r"^roberta\.", "")]
    ignore = [r"^pooler\.", r"^lm_head\."]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.max_positions = max_positions(config)
        self.poolers = embedders("cls", config.hidden_size)


class RobertaClassificationHead(nn.Module):
    """[N, hidden_size], first tokens' states -> [N, num_labels]."""

    def __init__(self, config: "PretrainedConfig") -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, first_states: torch.Tensor) -> torch.Tensor:
        return self.out_proj(torch.tanh(self.dense(first_states)))


class RobertaForSequenceClassification(nn.Module):
    generates = False
    packed_modules_mapping = PACKED
    rename = OLD_NAMES
    ignore = [r"^roberta\.pooler\."]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.max_positions = max_positions(config)
        self.roberta = RobertaTrunk(config, quant_config, add_prefix("roberta", prefix))
        self.classifier = RobertaClassificationHead(config)
        self.poolers = classifiers(config, "cls", self.classifier)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.roberta(input_ids, positions, forward_batch)


class RobertaForTokenClassification(nn.Module):
    generates = False
    packed_modules_mapping = PACKED
    rename = OLD_NAMES
    ignore = [r"^roberta\.pooler\."]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.max_positions = max_positions(config)
        self.roberta = RobertaTrunk(config, quant_config, add_prefix("roberta", prefix))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.poolers = token_classifiers(config, self.classifier)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.roberta(input_ids, positions, forward_batch)


class RobertaForMaskedLM(RobertaModel):
    """With the head for masked tokens, for SPLADE."""

    rename = [
        *RobertaModel.rename,
        (r"^lm_head\.dense\.", "masked_lm.transform.dense."),
        (r"^lm_head\.layer_norm\.", "masked_lm.transform.LayerNorm."),
        (r"^lm_head\.", "masked_lm."),
    ]
    ignore = [r"^pooler\.", DECODER_BIAS]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        transform, embedding = BertTransform(config, "gelu"), self.embeddings.word_embeddings
        self.masked_lm = MaskedLMHead(config, transform, embedding, decoder_bias=True)
        if self.masked_lm.decoder is not embedding:
            self.ignore = [name for name in self.ignore if name != DECODER_BIAS]
            self.weight_defaults = {"masked_lm.decoder.bias": "masked_lm.bias"}
        self.poolers |= splades(config, self.masked_lm)


class XLMRobertaModel(RobertaModel):
    """BGE-M3 (Chen et al., 2024) is one, with two heads more in files of their own (models/pooled.py)."""


class BgeM3EmbeddingModel(XLMRobertaModel):
    """vLLM's name of BGE-M3."""


class XLMRobertaForMaskedLM(RobertaForMaskedLM):
    pass


class XLMRobertaForSequenceClassification(RobertaForSequenceClassification):
    pass


class XLMRobertaForTokenClassification(RobertaForTokenClassification):
    pass


EntryClass = [
    RobertaModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    XLMRobertaModel,
    BgeM3EmbeddingModel,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
]
