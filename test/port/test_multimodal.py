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
    assert not seeing.report.is_complete and len(seeing.report.review) == 3
    assert "get_video_feature" not in seeing.text and "video_token" not in seeing.text


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
    assert "make_registered_model( config.text_config, quant_config, add_prefix(" in " ".join(seeing.text.split())


VIDEOS = SEEING.replace(
    'image_embeds=MultiModalFieldConfig.batched("image"),',
    """pixel_values_videos=MultiModalFieldConfig.flat_from_sizes("video", 1),
            video_grid_thw=MultiModalFieldConfig.batched("video"),""",
).replace(
    "    def _process(self",
    """    def rows(self, mm_features):
        return [len(feature.data["image_sizes"].data) // self.config.merge for feature in mm_features]

    def get_mrope_input_positions(self, input_tokens, mm_features):
        return torch.arange(len(input_tokens)).expand(3, -1), sum(self.rows(mm_features))

    def _process(self""",
)


def test_videos_have_a_method_and_their_own_inputs(ported: Callable[..., Ported]):
    text = ported(VIDEOS).text
    image, video = text.split("def get_video_feature(")
    assert "for name in ('image_sizes',)" in image and "for name in ('video_grid_thw',)" in video
    assert '"pixel_values_videos": torch.cat(' in video


def test_positions_of_three_axes_are_computed_by_the_processor(ported: Callable[..., Ported]):
    result = ported(VIDEOS)
    model, processor = result.text.split("class BoatForCausalLMProcessor(BaseMultimodalProcessor):")
    assert "positions = forward_batch.mrope_positions" in model and "mm_features" not in model
    assert "self.config = hf_config" in processor and "def rows(self, mm_features):" in processor
    assert "self.get_mrope_input_positions(output.input_ids, features)" in processor
    assert len(result.report.review) == 4
    needs_weights = ported(VIDEOS.replace("self.config.merge", "self.eye.size"))
    assert any("positions have three axes" in remark.text for remark in needs_weights.report.review)


PRUNING = (
    VIDEOS.replace(
        "    def _process(self, pixel_values):",
        """    def _begin_pruning(self, multimodal_config: MultiModalConfig):
        spec = multimodal_config.get_video_pruning_spec()
        if spec is None:
            self.pruning_rate = multimodal_config.video_pruning_rate
        else:
            self.method, self.pruning_rate = spec
        self.is_pruned = multimodal_config.is_multimodal_pruning_enabled()

    def recompute_mrope_positions(self, input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens):
        return LampProcessor.pruned(input_ids)

    def _fewer(self, rows):
        return LampProcessor.pruned(rows)

    def _process(self, pixel_values):
        if self.is_pruned:
            return self._fewer(pixel_values)""",
    )
    .replace(
        "        self.configure_mm_token_handling(7)\n",
        "        self._begin_pruning(vllm_config.model_config.multimodal_config)\n",
    )
    .replace("\n\n\nclass Lamp", "\nfrom vllm.config.multimodal import MultiModalConfig\n\n\nclass Lamp", 1)
)


def test_what_prunes_videos_goes_and_the_other_engines_processor_with_it(ported: Callable[..., Ported]):
    text = ported(PRUNING).text
    for gone in ("LampProcessor", "recompute_mrope_positions", "multimodal_config", "get_video_pruning_spec", "_fewer"):
        assert gone not in text
    assert "return self.eye(pixel_values)" in text


TOWER = """
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.models.vision import get_vit_attn_backend, is_vit_use_data_parallel
from vllm.utils.tensor_schema import TensorSchema, TensorShape
from vllm.utils.torch_utils import PIN_MEMORY, async_tensor_h2d
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.distributed import parallel_state
from typing import Annotated


class Pixels(TensorSchema):
    pixels: Annotated[torch.Tensor, TensorShape("images", 3)]


class Eye(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.ranks = 1 if is_vit_use_data_parallel() else parallel_state.get_tensor_model_parallel_world_size()
        self.attn_backend = get_vit_attn_backend(size)
        self.attn = MMEncoderAttention(4, size, prefix="attn")
        if self.attn_backend not in {AttentionBackendEnum.FLASH_ATTN}:
            raise ValueError("unknown")

    def forward(self, x, lengths, device):
        bounds = MMEncoderAttention.maybe_recompute_cu_seqlens(self.attn_backend, lengths, 4, 1, device)
        longest = torch.tensor(MMEncoderAttention.compute_max_seqlen(self.attn_backend, lengths))
        each = MMEncoderAttention.maybe_compute_seq_lens(self.attn_backend, lengths, device)
        ids = async_tensor_h2d(lengths, device)
        return self.attn(x, x, x, cu_seqlens=bounds, max_seqlen=longest, sequence_lengths=each), ids, Pixels(pixels=x)
"""


def test_a_tower_keeps_its_attention(ported: Callable[..., Ported]):
    text = SEEING.replace("self.eye = nn.Linear(4, 4)", "self.eye = Eye(4)").replace("self.eye(", "self.eye(1, 2, 3, ")
    result = ported(TOWER + text)
    for expected in (
        "from rtp_llm.srt.layers.encoder_attention import MMEncoderAttention",
        "from rtp_llm.srt.multimodal.tensor_schema import TensorSchema, TensorShape",
        "self.ranks = get_tensor_model_parallel_world_size()",
        "bounds = torch.as_tensor(lengths, device=device)",
        "longest = torch.tensor(0)",
        "ids = torch.as_tensor(lengths, device=device)",
    ):
        assert expected in result.text, result.text
    assert "attn_backend" not in result.text and "unknown" not in result.text
    assert len(result.report.review) == 3 and not result.report.not_portable
