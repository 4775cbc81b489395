"""GTE of 2024 (mGTE: Zhang et al., 2024): Nomic BERT with biases."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.bert import BertPooler
from rtp_llm.models_py.nomic_bert import PACKED, RotaryBertTrunk
from rtp_llm.srt.layers.pooler import classifiers, embedders, token_classifiers
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


# Names in checkpoints, which are those of the code that came with the first ones.
NAMES = [
    (r"^new\.", "gte."),
    (r"\bencoder\.layer\.", "layers."),
    (r"\.attention\.", ".self_attn."),
    (r"\.attn_ln\.", ".post_attention_layernorm."),
    (r"\.mlp_ln\.", ".post_mlp_layernorm."),
    (r"\.up_gate_proj\.", ".gate_up_proj."),
]


class GteTrunk(RotaryBertTrunk):
    has_biases = True


class GteModel(GteTrunk):
    """The bare model, which embeds; a checkpoint of the masked language model holds it, too."""

    generates = False
    packed_modules_mapping = PACKED
    rename = [*NAMES, (r"^gte\.", "")]
    ignore = [r"^pooler\.", r"^lm_head\."]

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.poolers = embedders("cls", config.hidden_size)


class GteForMaskedLM(GteModel):
    """Its trunk: the head for masked tokens is left out."""


class PooledGteTrunk(GteTrunk):
    def __init__(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__(config, quant_config, prefix)
        self.pooler = BertPooler(config)


class GteForSequenceClassification(nn.Module):
    generates = False
    packed_modules_mapping = PACKED
    rename = NAMES

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.gte = PooledGteTrunk(config, quant_config, add_prefix("gte", prefix))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.poolers = classifiers(config, "cls", nn.Sequential(self.gte.pooler, self.classifier))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.gte(input_ids, positions, forward_batch)


class GteForTokenClassification(nn.Module):
    generates = False
    packed_modules_mapping = PACKED
    rename = NAMES

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.gte = GteTrunk(config, quant_config, add_prefix("gte", prefix))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.poolers = token_classifiers(config, self.classifier)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        return self.gte(input_ids, positions, forward_batch)


EntryClass = [GteModel, GteForMaskedLM, GteForSequenceClassification, GteForTokenClassification]
