"""Base of models with images: a language model that takes embeddings of media in place of their placeholders."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.srt.layers.embedding import ParallelLMHead
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.multimodal import general_mm_embed_routine
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.multimodal.items import Modality, pad_placeholders
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class ImageTextModel(nn.Module):
    """``model`` holds ``language_model`` and what encodes media; a head follows.

    A subclass makes ``model``, has ``get_image_feature(items)`` and, if it takes videos, ``get_video_feature(items)``:
    each returns [rows of all items, hidden_size].
    """

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    use_deepstack: Mapping[Modality, bool] | None = None
    # True: the configuration class sets tie_word_embeddings by default, and a head in the checkpoint is used
    # nevertheless, unless ``text_config`` ties it as well.
    ties_by_default = False

    def __init__(
        self,
        config: "PretrainedConfig",
        model: nn.Module,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        text_config = config.get_text_config()
        self.model = model
        self.weight_defaults: dict[str, str] = {}
        if config.tie_word_embeddings and (not self.ties_by_default or text_config.tie_word_embeddings):
            self.lm_head: nn.Module = self.get_input_embeddings()
        else:
            self.lm_head = ParallelLMHead(
                text_config.vocab_size,
                text_config.hidden_size,
                quant_config=quant_config,
                prefix=add_prefix("lm_head", prefix),
            )
            if config.tie_word_embeddings:
                self.weight_defaults = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
        self.logits_processor = LogitsProcessor(text_config)

    @property
    def language_model(self) -> nn.Module:
        return self.model.get_submodule("language_model")

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_submodule("embed_tokens")

    pad_input_ids = pad_placeholders

    def forward_batch(self, batch: "ForwardBatch") -> LogitsProcessorOutput:
        positions = batch.positions if batch.mrope_positions is None else batch.mrope_positions
        return self.forward(batch.input_ids, positions, batch)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch", **options: Any
    ) -> LogitsProcessorOutput:
        """``positions``: [T], or [3, T] for M-RoPE. ``options`` go to the language model."""
        hidden_states = general_mm_embed_routine(
            input_ids,
            forward_batch,
            self.language_model,
            multimodal_model=self,
            use_deepstack=self.use_deepstack,
            positions=positions,
            **options,
        )
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)
