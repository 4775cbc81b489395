"""One test for each statement of docs/specification.md about models that see, of its number.

These are quick. The page names the tests that prove a statement with servers, or by comparing with transformers.
"""

import ast
import asyncio
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import supported_models
from rtp_llm import ModelRegistry
from rtp_llm.models_py.qwen2_vl import Qwen2VLForConditionalGeneration
from rtp_llm.srt import conversation
from rtp_llm.srt.cache.allocator import PageAllocator
from rtp_llm.srt.cache.prefix_cache import Lock
from rtp_llm.srt.cache.radix_cache import RadixCache
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec
from rtp_llm.srt.configs import model_config
from rtp_llm.srt.configs.model_config import ModelConfig, is_multimodal_model, register_multimodal_model
from rtp_llm.srt.layers.multimodal import general_mm_embed_routine
from rtp_llm.srt.layers.vision import VisionAttention
from rtp_llm.srt.managers import multimodal_processor
from rtp_llm.srt.managers.multimodal_processor import get_mm_processor, register_processor
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalInputs, pad_mm_tokens
from rtp_llm.srt.multimodal.placement import MediaPlacer
from rtp_llm.tools.bench_one_batch import correctness
from tiny_seeing import IMAGE_PAD, make_seeing

ROOT = Path(__file__).resolve().parents[2]
PAD = 9  # stands for images in the prompts here


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_seeing(tmp_path_factory.mktemp("seeing"))


def test_m01_is_multimodal_model_is_extended_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_config, "multimodal_model_archs", model_config.multimodal_model_archs.copy())
    assert not is_multimodal_model(["MineForConditionalGeneration"])
    register_multimodal_model("MineForConditionalGeneration")
    assert is_multimodal_model(["MineForConditionalGeneration"])


def test_m01_every_model_of_ours_that_takes_media_is_in_it() -> None:
    for model in supported_models.models():
        model_class, _ = ModelRegistry.resolve_model_cls([model.architecture])
        assert is_multimodal_model(model.architecture) == hasattr(model_class, "pad_input_ids"), model.architecture


def test_m02_a_chat_template_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "chat_templates", conversation.chat_templates.copy())
    monkeypatch.setattr(conversation, "_matching_functions", [])
    mine = conversation.Conversation(name="mine", roles=("Q", "A"), image_token="<picture>")
    conversation.register_conv_template(mine)
    conversation.register_conv_template_matching_function(lambda path: "mine" if "my-model" in path else None)
    assert conversation.chat_template_exists("mine")
    content = [{"type": "image_url", "image_url": {"url": "http://a/b"}}, {"type": "text", "text": "What?"}]
    request = {"messages": [{"role": "user", "content": content}]}
    chat = conversation.generate_chat_conv(request, conversation.get_conv_template_by_model_path("me/my-model"))
    assert chat.get_prompt() == "Q: <picture>\nWhat?\nA:"
    assert [image.url for image in chat.image_data] == ["http://a/b"]


class Mine:
    pass


class MineProcessor(BaseMultimodalProcessor):
    models = [Mine]

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.mm_tokens = MultimodalSpecialTokens(image_token_id=PAD).build(_processor)

    def replacement(self, item: MultimodalDataItem) -> str:
        return "#" * item.feature.shape[0]

    def image_item(self, image: Image.Image) -> MultimodalDataItem:
        return MultimodalDataItem(Modality.IMAGE, torch.zeros(image.height, image.width))

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: Any, request_obj: Any, **kwargs: Any
    ) -> Any:
        return await self.process(image_data, audio_data, input_text, request_obj)


class Letters:
    """A tokenizer: a letter's id is its place in the alphabet, and ``#`` is PAD."""

    bos_token, unk_token, unk_token_id = None, None, None
    letters = "abcdefghi#"

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self.letters[token_id]

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.letters.index(token)


def test_m03_a_processor_is_registered_for_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multimodal_processor, "PROCESSOR_MAPPING", {})
    config = SimpleNamespace(architectures=["Mine"])
    with pytest.raises(ValueError, match="No processor registered for architecture: Mine"):
        get_mm_processor(config, None, Letters())
    register_processor(MineProcessor)
    processor = get_mm_processor(config, None, Letters())
    assert type(processor) is MineProcessor
    images = [Image.new("RGB", (1, 3)), Image.new("RGB", (1, 2))]
    call = processor.process_mm_data_async(
        image_data=images, audio_data=None, input_text="a#b#", request_obj=SimpleNamespace(video_data=None)
    )
    output = asyncio.run(call)
    assert output.input_ids == [0, PAD, PAD, PAD, 1, PAD, PAD]
    assert [item.offsets for item in output.mm_items] == [[(1, 3)], [(5, 6)]]


def media(*values: float, num_rows: int = 3) -> MultimodalInputs:
    """An image for each value, at positions 2 to 4, 5 to 7, ..."""
    items = [
        MultimodalDataItem(Modality.IMAGE, torch.full((num_rows, 4), value), [(2 + 3 * i, 1 + 3 * i + num_rows)])
        for i, value in enumerate(values)
    ]
    return MultimodalInputs(items, im_token_id=PAD)


def test_m04_the_radix_cache_tells_media_apart_by_their_padded_ids() -> None:
    prompt = [5, 6, PAD, PAD, PAD, 7, 8]
    one, again, other = (
        Qwen2VLForConditionalGeneration.pad_input_ids(None, prompt, media(value)) for value in (0.5, 0.5, 0.7)
    )
    assert prompt == [5, 6, PAD, PAD, PAD, 7, 8]
    assert one[:2] + one[5:] == [5, 6, 7, 8] and len(set(one)) == 7
    group = CacheGroup(CacheSpec(1, 8, 8, "float32"), (0,), 1)
    allocator = PageAllocator(16)
    cache = RadixCache([group], [allocator])
    cache.insert("", one, [allocator.allocate(len(one))], Lock(0, None, [0]))
    assert cache.match("", again, len(again)).num_tokens == 7
    assert cache.match("", other, len(other)).num_tokens == 2


class Expanding:
    """One placeholder in the prompt, three rows of its encoder."""

    def pad_input_ids(self, input_ids: list[int], mm_inputs: MultimodalInputs) -> list[int]:
        place = input_ids.index(PAD)
        mm_inputs.mm_items[0].offsets = [(place, place + 2)]
        return pad_mm_tokens([*input_ids[:place], PAD, PAD, PAD, *input_ids[place + 1 :]], mm_inputs)


def test_m04_pad_input_ids_may_expand() -> None:
    ids, placed = MediaPlacer(Expanding).place([5, PAD, 6], media(0.5, num_rows=1))
    assert ids == [5, PAD, PAD, PAD, 6]
    assert placed.cache_keys[1:4] == media(0.5, num_rows=1).mm_items[0].pad_ids(3)
    assert placed.blocks == [(1, 3)]
    assert MultimodalInputs.decode(placed.content).mm_items[0].offsets == [(1, 3)]


def test_m05_vision_attention_is_attention_within_segments() -> None:
    torch.manual_seed(0)
    attention = VisionAttention(embed_dim=12, num_heads=3, projection_size=12, use_qkv_parallel=True)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, 12)
    q, k, v = (x @ attention.qkv_proj.weight.T + attention.qkv_proj.bias).view(7, 3, 3, 4).permute(1, 2, 0, 3)
    seen = [
        (q[:, a:b] @ k[:, a:b].transpose(1, 2) / 2).softmax(-1) @ v[:, a:b]  # 2: the root of the heads' size
        for a, b in ((0, 3), (3, 7))
    ]
    expected = torch.cat(seen, dim=1).transpose(0, 1).reshape(7, 12) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x, torch.tensor([0, 3, 7], dtype=torch.int32))[0], expected)


def test_m05_towers_have_no_attention_of_their_own() -> None:
    """No file of a model that sees scores anything by itself."""
    files = {model.file for model in supported_models.models() if model.sees}
    files |= set((ROOT / "rtp_llm" / "srt" / "layers" / "towers").glob("[a-z]*.py"))
    assert len(files) > 5
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {node.id for node in nodes if isinstance(node, ast.Name)}
        assert not names & {"scaled_dot_product_attention", "softmax", "MultiheadAttention"}, file.name


def test_m06_reference_hf_answers_for_images(seeing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec_from_file_location("reference_hf", ROOT / "scripts" / "playground" / "reference_hf.py")
    assert spec is not None and spec.loader is not None
    reference_hf = module_from_spec(spec)
    spec.loader.exec_module(reference_hf)
    assert reference_hf.read_images is correctness.read_images
    printed = []
    for colour in ("red", "blue"):
        Image.new("RGB", (60, 40), colour).save(tmp_path / "picture.png")
        argv = ["--model-path", seeing, "--model-type", "mllm", "--image", str(tmp_path / "picture.png")]
        assert reference_hf.main([*argv, "--max-new-tokens", "2"]) == 0
        printed.append(capsys.readouterr().out)
    assert all("prefill logits (final)" in text and "<|vision_start|><|image_pad|>" in text for text in printed)
    assert printed[0].splitlines()[2] != printed[1].splitlines()[2]


def test_m07_every_model_that_sees_is_compared_with_transformers() -> None:
    files = [supported_models.read_test_file(path) for path in supported_models.TEST_FILES if "_mm_" in path.name]
    tested = {architecture for file in files for architecture in (*file.quick, *file.slow)}
    assert tested == {model.architecture for model in supported_models.models() if model.sees}
    for name in ("mmmu", "mmmu_pro"):
        assert {"bench_hf.py", "bench_rtp_llm.py"} <= {path.name for path in (ROOT / "benchmark" / name).glob("*.py")}


@torch.inference_mode()
def test_m08_qwen2_vl_handles_images_and_text(seeing: str) -> None:
    """An image's rows go where its placeholders are; text is embedded as ever, beside an image or alone."""
    model: Any = load_model(ModelConfig.from_pretrained(seeing, dtype="float32"), seeing)
    assert type(model) is Qwen2VLForConditionalGeneration
    embed = model.get_input_embeddings()
    language: Any = lambda input_ids, forward_batch, input_embeds: input_embeds  # noqa: E731
    language.get_input_embeddings = lambda: embed
    image = MultimodalDataItem(
        Modality.IMAGE, torch.randn(4 * 6, 3 * 2 * 14 * 14), [(1, 6)], image_grid_thw=torch.tensor([[1, 4, 6]])
    )
    ids = torch.tensor([5, *[IMAGE_PAD] * 6, 6, 7])
    batch: Any = SimpleNamespace(
        mm_inputs=[MultimodalInputs([image]), None],
        extend_prefix_lens_cpu=[0, 0],
        extend_seq_lens_cpu=[8, 1],  # the second row is text alone
        embedding_cache=None,
    )
    embedded = general_mm_embed_routine(ids, batch, language, multimodal_model=model)
    torch.testing.assert_close(embedded[1:7], model.get_image_feature([image]))
    assert torch.equal(embedded[[0, 7, 8]], embed(ids[[0, 7, 8]]))
    batch.mm_inputs = None
    assert torch.equal(general_mm_embed_routine(ids, batch, language, multimodal_model=model), embed(ids))
