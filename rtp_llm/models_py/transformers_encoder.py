"""Any encoder of the transformers library, by its own code.

Inputs of equal lengths are computed together, and none is padded, so that the code gets what it would get from
transformers' user: nothing in it is replaced. After loading, inputs together and alone are compared; a model in which
they differ, or that reads something else than one text, is refused.
"""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.initialization import no_init_weights

from rtp_llm.srt.layers.fallback.encoders import (
    CLASSIFY,
    EMBED,
    EncoderRun,
    build_encoder,
    encoder_kind,
    is_decoder,
    max_positions,
)
from rtp_llm.srt.layers.fallback.loading import loaded, refuse_setting
from rtp_llm.srt.layers.fallback.masks import UnservableModelError
from rtp_llm.srt.layers.pooler import Pooler, classifiers, embedders
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch

UNUSED = r"(^|\.)(pooler|cls|lm_head|predictions|generator_\w+)\."  # by a model that embeds


class TransformersEncoder(nn.Module):
    """Transformers' own class of an encoder, of a classifier, or of one of tokens.

    Raises:
        UnservableModelError: from the constructor if the configuration shows that it cannot be served, from
            ``finish_load`` if only running the model does.
    """

    generates = False
    sees_whole_prompts = True
    replays_steps = False  # transformers' code may keep state between steps

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        refuse_setting(quant_config)
        found = encoder_kind(config.architectures or [])
        if found is None:
            raise UnservableModelError(f"transformers has no encoder of class {', '.join(config.architectures or [])}")
        name, self.kind = found
        self.own_config = copy.deepcopy(config)
        if quant_config is not None:
            vars(self.own_config).pop("quantization_config", None)  # weights come dequantized
        with no_init_weights():
            self.model = build_encoder(self.own_config, name)
        self.max_positions = max_positions(self.model)
        self.poolers = self._poolers(config)

    def _poolers(self, config: "PretrainedConfig") -> dict[str, Pooler]:
        if self.kind == EMBED:
            return embedders("last" if is_decoder(config.model_type) else "cls", config.get_text_config().hidden_size)
        if self.kind == CLASSIFY:
            return classifiers(config, "cls", nn.Identity())  # all tokens of an input have its logits
        return {"token_classify": Pooler("all", config.num_labels, finish="softmax")}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load as transformers does. A missing weight is an error, unless nothing reads it."""
        model_class, device = type(self.model), self.model.device
        del self.model  # free its tensors, which are not initialised, before the loaded ones are made
        unused = UNUSED if self.kind == EMBED else None
        self.model = loaded(model_class, self.own_config, device, weights, unused)

    def finish_load(self) -> None:
        """Make sure that the model computes inputs together as it does alone."""
        self.model.eval()
        self._run = EncoderRun(self.model, self.kind)
        self._run.check(self.own_config, self.max_positions)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        """[T] ids -> [T, size]: hidden states, or logits; of a classifier of whole inputs, on each of their tokens."""
        if not len(input_ids):
            return torch.empty(0, self._width, device=input_ids.device)
        return self._run(input_ids, forward_batch.extend_seq_lens_cpu, forward_batch.token_types)

    @property
    def _width(self) -> int:
        return next(iter(self.poolers.values())).width


EntryClass = TransformersEncoder
