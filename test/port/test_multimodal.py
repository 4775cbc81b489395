"""A vLLM file that takes images, of these tests' own writing: its encoder is called, and a processor is begun."""

import ast
from collections.abc import Callable

import pytest

from rtp_llm.port.porter import Ported

SEEING = """
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.inputs import MultiModalFieldConfig


class LampProcessor(BaseMultiModalProcessor):
    def _get_mm_fields_config(self, hf_inputs, kwargs):
        return dict(
            pixel_values=MultiModalFieldConfig.batched("image"),
            image_sizes=MultiModalFieldConfig.batched("image"),
            image_embeds=MultiModalFieldConfig.batched("image"),
        )


@MULTIMODAL_REGISTRY.register_processor(LampProcessor)
class BoatForCausalLM(nn.Module, SupportsMultiModal):
    @classmethod
    def get_placeholder_str(cls, modality, i):
        if modality.startswith("image"):
            return "<lamp_image>"
        raise ValueError(modality)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.configure_mm_token_handling(7)
        with self._mark_tower_model(vllm_config, "image"):
            self.eye = nn.Linear(4, 4)
            self.end_layer = config.num_hidden_layers
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=vllm_config.model_config.hf_config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )

    def _process(self, pixel_values):
        return self.eye(pixel_values)

    def embed_multimodal(self, **kwargs):
        return self._process(kwargs.pop("pixel_values"))

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        return self.language_model.model(input_ids, positions, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states):
        return self.language_model.compute_logits(hidden_states)
"""


@pytest.fixture
def seeing(ported: Callable[..., Ported]) -> Ported:
    return ported(SEEING)


def test_the_encoder_is_kept_and_called(seeing: Ported):
    ast.parse(seeing.text)
    assert "def get_image_feature(self, items: list[MultimodalDataItem])" in seeing.text
    assert '"pixel_values": torch.cat(' in seeing.text and "for name in ('image_sizes',)" in seeing.text
    assert "def _process(" in seeing.text and "image_embeds" not in seeing.text


def test_a_processor_is_begun_and_left_for_review(seeing: Ported):
    assert "class BoatForCausalLMProcessor(BaseMultimodalProcessor):" in seeing.text
    assert "models = [BoatForCausalLM]" in seeing.text and "image_token='<lamp_image>'" in seeing.text
    assert not seeing.report.is_complete and len(seeing.report.review) == 4


def test_the_other_engines_processing_goes(seeing: Ported):
    for gone in (
        "vllm",
        "LampProcessor",
        "_mark_tower",
        "configure_mm",
        "end_layer",
        "get_placeholder_str",
        "MULTIMODAL_REGISTRY",
    ):
        assert gone not in seeing.text


def test_forward_puts_media_in_their_places(seeing: Ported):
    flat = " ".join(seeing.text.split())
    assert (
        "general_mm_embed_routine( input_ids, forward_batch, self.language_model.model, multimodal_model=self" in flat
    )
    assert "self.language_model.logits_processor(" in flat and "def compute_logits" not in flat
    assert "pad_input_ids = pad_placeholders" in flat


def test_the_language_model_is_made_by_our_registry(seeing: Ported):
    assert "ModelRegistry.resolve_model_cls(config.text_config.architectures)[0](" in seeing.text
