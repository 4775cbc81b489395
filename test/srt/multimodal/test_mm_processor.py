"""From prompts with placeholders to ids and items, and which processor belongs to which model."""

import asyncio
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.managers import multimodal_processor as registry
from rtp_llm.srt.managers.multimodal_processor import (
    get_mm_processor,
    import_processors,
    make_processor,
    register_processor,
)
from rtp_llm.srt.multimodal import prompt_media
from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from rtp_llm.srt.multimodal.hf_processor import HfProcessor
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalProcessorOutput, pad_mm_tokens
from rtp_llm.srt.multimodal.media import MediaLoader
from rtp_llm.srt.multimodal.placeholders import place, runs
from rtp_llm.srt.multimodal.processor_output import split_item
from rtp_llm.srt.sampling_params import InvalidRequest

WORDS = ["<bos>", "a", "b", "c", "aa", "<image>", "<pad>", "<open>", "<close>", "<break>", "<video>"]
BOS, A, B, C, AA, IMAGE, PAD, OPEN, CLOSE, BREAK, VIDEO = range(len(WORDS))


def make_tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<unk>": len(WORDS)}, [("a", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": [word for word in WORDS if word.startswith("<")][1:]})
    fast.add_bos_token = True
    return fast


TOKENIZER = make_tokenizer()
TEXT_CONFIG = SimpleNamespace(hidden_size=4)
CONFIG = SimpleNamespace(architectures=["XModel"], get_text_config=lambda: TEXT_CONFIG)


class XModel:
    def pad_input_ids(self, input_ids, mm_inputs):
        return pad_mm_tokens(input_ids, mm_inputs)


class XProcessor(BaseMultimodalProcessor):
    """An image is as many rows of pads as it has pixels in height, each as long as it is wide."""

    models = [XModel]

    def __init__(self, hf_config, server_args, _processor, *args, **kwargs):
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.mm_tokens = MultimodalSpecialTokens(
            image_token="<image>", image_token_id=PAD, video_token="<video>", video_token_id=PAD
        ).build(_processor)

    def image_item(self, image):
        return MultimodalDataItem(Modality.IMAGE, torch.from_numpy(np.array(image)))

    def video_item(self, video):
        return MultimodalDataItem(Modality.VIDEO, torch.from_numpy(video.frames)[0])

    def replacement(self, item):
        height, width = item.feature.shape[:2]
        return "<open>" + "<break>".join(["<pad>" * width] * height) + "<close>"

    async def process_mm_data_async(self, image_data, audio_data, input_text, request_obj, **kwargs):
        return await self.process(image_data, audio_data, input_text, request_obj)


def draw_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processed(
    prompt, images=(), videos=(), processor_cls=XProcessor, trusted=True, special=False, audios=()
) -> MultimodalProcessorOutput:
    processor = processor_cls(CONFIG, None, TOKENIZER, loader=MediaLoader(trusted=trusted))
    request = SimpleNamespace(video_data=list(videos), add_special_tokens=special)
    call = processor.process_mm_data_async(
        image_data=list(images), audio_data=list(audios), input_text=prompt, request_obj=request
    )
    return asyncio.run(call)


# Expansion

ONE = [OPEN, PAD, PAD, BREAK, PAD, PAD, CLOSE]  # 2 x 2
TWO = [OPEN, PAD, PAD, PAD, CLOSE]  # 1 x 3


@pytest.mark.parametrize("prompt", ["a<image>b<image>c", [A, IMAGE, B, IMAGE, C]])
def test_each_placeholder_is_replaced_by_its_item_s_own_text(prompt):
    output = processed(prompt, [draw_image(2, 2), draw_image(1, 3)])
    assert output.input_ids == [A, *ONE, B, *TWO, C]
    assert [item.offsets for item in output.mm_items] == [[(2, 3), (5, 6)], [(10, 12)]]
    assert (output.im_token_id, output.video_token_id) == (PAD, PAD)
    padded = pad_mm_tokens(output.input_ids, output)
    assert [i for i, token_id in enumerate(padded) if token_id != output.input_ids[i]] == [2, 3, 5, 6, 10, 11, 12]


def test_neighbours_without_anything_between_are_told_apart():
    class Bare(XProcessor):
        def replacement(self, item):
            return "<pad>" * item.feature.shape[1]

    output = processed(
        "<image><image><image>", [draw_image(1, 2), draw_image(1, 3), draw_image(1, 1)], processor_cls=Bare
    )
    assert output.input_ids == [PAD] * 6
    assert [item.offsets for item in output.mm_items] == [[(0, 1)], [(2, 4)], [(5, 5)]]


def test_images_and_videos_that_share_a_token_keep_the_prompt_s_order():
    frames = np.zeros((1, 1, 2, 3), np.uint8)
    for prompt in ("<video>a<image><video>", [VIDEO, A, IMAGE, VIDEO]):
        output = processed(prompt, [draw_image(1, 3)], [frames, frames[:, :, :1]])
        ids = [OPEN, PAD, PAD, CLOSE, A, OPEN, PAD, PAD, PAD, CLOSE, OPEN, PAD, CLOSE]
        assert output.input_ids == ids
        found = {item.offsets[0]: item.modality for item in output.mm_items}
        assert found == {(1, 2): Modality.VIDEO, (6, 8): Modality.IMAGE, (11, 11): Modality.VIDEO}


def test_a_text_is_tokenised_after_its_placeholders_are_replaced():
    """The replacement's last letter merges with the first one after it, as in transformers' processors."""

    class Merging(XProcessor):
        def replacement(self, item):
            return "<pad>a"

    assert processed("<image>ab", [draw_image(1, 1)], processor_cls=Merging).input_ids == [PAD, AA, B]
    assert processed([IMAGE, A, B], [draw_image(1, 1)], processor_cls=Merging).input_ids == [PAD, A, A, B]


def test_the_token_that_begins_a_text_stands_there_once():
    # The tokenizer here adds none of its own; what is asked for is handed on.
    asked = []

    class Asked(XProcessor):
        def _tokenize(self, text, add_special_tokens):
            asked.append(add_special_tokens)
            return super()._tokenize(text, add_special_tokens)

    processed("<image>", [draw_image(1, 1)], processor_cls=Asked, special=True)
    processed("<image>", [draw_image(1, 1)], processor_cls=Asked, special=False)
    processed("<bos><image>", [draw_image(1, 1)], processor_cls=Asked, special=None)
    processed("a<image>", [draw_image(1, 1)], processor_cls=Asked, special=None)
    assert asked == [True, False, False, True]


@pytest.mark.parametrize(
    ("prompt", "num_images", "message"),
    [("a<image>", 2, "Prompt has 1 image placeholders but 2 image inputs were provided"),
     ("a<image><image>", 1, "Prompt has 2 image placeholders but 1 image inputs were provided"),
     ("a", 1, "Prompt has 0 image placeholders but 1 image inputs were provided"),
     ([A, IMAGE, IMAGE], 1, "Prompt has 2 image placeholders but 1 image inputs were provided"),
     ([A], 1, "Prompt has 0 image placeholders but 1 image inputs were provided")],
)  # fmt: skip
def test_as_many_placeholders_as_images(prompt, num_images, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        processed(prompt, [draw_image(1, 1)] * num_images)
    assert caught.value.param == "image_data"


def test_a_user_s_text_cannot_hold_the_token_of_embeddings():
    for prompt in ("<pad><image>", "<image><pad>", [PAD, IMAGE]):
        with pytest.raises(InvalidRequest, match="holds the token <pad>"):
            processed(prompt, [draw_image(1, 1)])


def test_kinds_that_a_model_does_not_take():
    class NoVideo(XProcessor):
        video_item = BaseMultimodalProcessor.video_item

    with pytest.raises(InvalidRequest, match="takes no videos"):
        processed("<video>", videos=[np.zeros((1, 2, 2, 3), np.uint8)], processor_cls=NoVideo)
    with pytest.raises(InvalidRequest, match="audio"):
        processed("a", audios=[b"sound"])


def test_the_first_wrong_image_ends_it():
    with pytest.raises(InvalidRequest, match="cannot be decoded"):
        processed("<image><image>", [draw_image(1, 1), b"nothing"])


def test_which_of_several_images_is_wrong_is_told():
    images = [draw_image(1, 2), b"no image", draw_image(2, 2)]
    with pytest.raises(InvalidRequest, match=r"^image 2 of 3: the image cannot be decoded") as caught:
        processed("a<image><image><image>", images)
    assert caught.value.param == "image_data"
    with pytest.raises(InvalidRequest, match=r"^the image cannot be decoded"):
        processed("a<image>", images[1:2])


def test_special_tokens():
    tokens = MultimodalSpecialTokens(image_token_id=IMAGE, video_token="<video>").build(TOKENIZER)
    assert (tokens.image_token, tokens.video_token_id, tokens.audio_token) == ("<image>", VIDEO, None)
    assert tokens.combined_regex.split("a<video>b<image>") == ["a", "<video>", "b", "<image>", ""]
    assert tokens.get_modality_of_token("<video>") is Modality.VIDEO
    assert tokens.get_modality_of_token("video") is None
    assert tokens.get_token_id_by_modality(Modality.IMAGE) == IMAGE
    many = MultimodalSpecialTokens(image_token="<image>", image_token_regex=r"<open>(?:<pad>)+<close>").build(TOKENIZER)
    assert many.get_modality_of_token("<open><pad><pad><close>") is Modality.IMAGE
    assert MultimodalSpecialTokens().build(TOKENIZER).combined_regex.split("<image>") == ["<image>"]


# Preformatted media


def test_precomputed_embeddings():
    rows = torch.randn(3, 4)
    source = {"format": "precomputed_embedding", "feature": rows}
    for prompt, ids in (("a<image>b", [A, PAD, PAD, PAD, B]), ([A, PAD, PAD, PAD, B], [A, PAD, PAD, PAD, B])):
        output = processed(prompt, [source])
        assert output.input_ids == ids and output.mm_items[0].offsets == [(1, 3)]
        assert torch.equal(output.mm_items[0].precomputed_embeddings, rows)
    with pytest.raises(InvalidRequest, match=r"must be \[rows, 4\]"):
        processed("<image>", [source | {"feature": torch.randn(3, 5)}])
    with pytest.raises(InvalidRequest, match="has 2 places for the given image, whose embedding has 3 rows"):
        processed([A, PAD, PAD], [source])
    frames = np.zeros((1, 1, 2, 3), np.uint8)
    output = processed([VIDEO, IMAGE], [source], [frames])  # another kind before it
    assert output.input_ids == [OPEN, PAD, PAD, CLOSE, PAD, PAD, PAD]
    assert [item.offsets for item in output.mm_items] == [[(4, 6)], [(1, 2)]]


def test_what_a_processor_returned_may_be_given():
    source = {
        "format": "processor_output",
        "pixel_values": torch.arange(6.0).view(6, 1),
        "image_grid_thw": [[1, 1, 4], [1, 1, 2]],
    }
    output = processed([PAD, PAD, A, PAD], [source])
    assert [item.offsets for item in output.mm_items] == [[(0, 1)], [(3, 3)]]
    assert [item.feature.flatten().tolist() for item in output.mm_items] == [[0, 1, 2, 3], [4, 5]]
    for wrong, message in (({"format": "jpeg"}, "format must be"), ({"format": "processor_output"}, "no feature")):
        with pytest.raises(InvalidRequest, match=message):
            processed("<image>", [wrong])
    with pytest.raises(InvalidRequest, match="only item"):
        processed("<image><image>", [source, draw_image(1, 1)])
    with pytest.raises(InvalidRequest, match="own process"):
        processed("<image>", [source], trusted=False)


# What transformers returns


def test_bundled_items_are_split_by_grids():
    grids = torch.tensor([[1, 2, 2], [2, 2, 4]])
    item = MultimodalDataItem(Modality.IMAGE, torch.arange(20.0).view(20, 1), image_grid_thw=grids)
    one, two = place(split_item(item, 2), [(5, 9)])
    assert (one.feature.flatten().tolist(), two.feature.shape[0]) == ([0, 1, 2, 3], 16)
    assert (one.image_grid_thw.tolist(), two.image_grid_thw.tolist()) == ([[1, 2, 2]], [[2, 2, 4]])
    assert (one.offsets, two.offsets) == ([(5, 5)], [(6, 9)])


def test_others_are_split_along_the_first_dimension():
    item = MultimodalDataItem(Modality.IMAGE, torch.zeros(2, 3, 4, 4), image_sizes=[(4, 4), (2, 4)], depth=7)
    one, two = place(split_item(item, 2), [(0, 1), (3, 9)])
    assert (one.image_sizes, two.image_sizes, two.depth, two.feature.shape[0]) == ([(4, 4)], [(2, 4)], 7, 1)
    assert (one.offsets, two.offsets) == ([(0, 1)], [(3, 9)])
    assert split_item(item, 3) == [item]


def test_runs():
    assert runs([]) == [] and runs([4]) == [(4, 4)] and runs([1, 2, 3, 7, 9, 10]) == [(1, 3), (7, 7), (9, 10)]


def test_a_processor_of_transformers_does_it_where_the_class_says_nothing():
    class Whole:
        tokenizer = TOKENIZER

        def __call__(self, text, images, **options):
            ids = TOKENIZER.encode(text[0].replace("<image>", "<pad><pad>"), add_special_tokens=False)
            return {"input_ids": torch.tensor([ids]), "pixel_values": torch.stack([torch.zeros(3)] * len(images))}

    class Plain(BaseMultimodalProcessor):
        models = [XModel]

        async def process_mm_data_async(self, image_data, audio_data, input_text, request_obj, **kwargs):
            tokens = MultimodalSpecialTokens(image_token="<image>", image_token_id=PAD).build(self._processor)
            base = await self.load_mm_data(input_text, tokens, image_data)
            items, ids, output = await self.process_and_combine_mm_data_async(base, tokens)
            assert "pixel_values" in output
            return {"input_ids": ids.tolist(), "mm_items": items}

    processor = Plain(CONFIG, None, Whole(), loader=MediaLoader(trusted=True))
    call = processor.process_mm_data_async([draw_image(1, 1), draw_image(2, 2)], None, "a<image>b<image>", None)
    output = MultimodalProcessorOutput.from_dict(asyncio.run(call))
    assert output.input_ids == [A, PAD, PAD, B, PAD, PAD]
    assert [item.offsets for item in output.mm_items] == [[(1, 2)], [(4, 5)]]


IMAGE_PROCESSORS = [
    "Qwen2VLImageProcessor", "LlavaOnevisionImageProcessor", "Gemma3ImageProcessor", "GotOcr2ImageProcessor",
    "PixtralImageProcessor", "CLIPImageProcessor", "SiglipImageProcessor",
]  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_image_processors_load_without_torchvision(name, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": name}))
    loaded = HfProcessor(str(tmp_path), TOKENIZER).image_processor
    assert type(loaded).__name__ == f"{name}Pil"

    class Plain(XProcessor):
        image_item = BaseMultimodalProcessor.image_item

    processor = Plain(CONFIG, None, HfProcessor(str(tmp_path), TOKENIZER))
    item = processor.image_item(draw_image(40, 60))
    assert item.feature.shape[0] >= 1 and item.feature.dtype == torch.float32
    assert len(item.digest) == 32


def test_parts_of_a_processor(tmp_path):
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_processor_type": "CLIPImageProcessor"}, "video_processor": {"fps": 3}})
    )
    parts = HfProcessor(str(tmp_path), TOKENIZER)
    assert type(parts.image_processor).__name__ == "CLIPImageProcessorPil"
    assert parts.video_settings == {"fps": 3}
    assert HfProcessor(str(tmp_path / "nothing"), TOKENIZER).image_processor is None
    with pytest.raises(ValueError, match="cannot make the processor"):
        HfProcessor(str(tmp_path / "nothing"), TOKENIZER)(text="a")


# Registry


@pytest.fixture(autouse=True)
def empty_mapping(monkeypatch):
    monkeypatch.setattr(registry, "PROCESSOR_MAPPING", {})


def test_a_processor_stands_beside_its_model():
    found = get_mm_processor(CONFIG, None, TOKENIZER, model_cls=XModel)
    assert type(found) is XProcessor
    derived = type("YModel", (XModel,), {"__module__": "elsewhere"})
    assert type(get_mm_processor(CONFIG, None, TOKENIZER, model_cls=derived)) is XProcessor


def test_registered_ones_win():
    class Other(XProcessor):
        models = ["XModel"]

    register_processor(Other)
    assert type(get_mm_processor(CONFIG, None, TOKENIZER, model_cls=XModel)) is Other
    with pytest.raises(ValueError, match="XModel already has"):
        register_processor(type("Third", (XProcessor,), {"models": ["XModel"]}), overwrite=False)
    with pytest.raises(TypeError, match="names no model"):
        register_processor(type("Fourth", (XProcessor,), {"models": []}))
    with pytest.raises(TypeError, match="must be a subclass"):
        register_processor(XModel)


def test_what_the_server_makes(tmp_path):
    config = SimpleNamespace(hf_config=CONFIG, model_path=str(tmp_path))
    args = ServerArgs(media_url_max_file_size_mb=0.25)
    made = make_processor(args, config, XModel, TOKENIZER)
    assert type(made) is XProcessor and not made.loader.trusted
    with pytest.raises(InvalidRequest, match=r"0\.25 MiB"):
        asyncio.run(made.loader.load_image(bytes(300_000)))
    assert make_processor(args, config, XModel, TOKENIZER, trusted=True).loader.trusted
    assert make_processor(args, config, XModel, None) is None
    assert make_processor(args, config, torch.nn.Linear, TOKENIZER) is None
    unknown = type("Blind", (), {"pad_input_ids": pad_mm_tokens, "__module__": "elsewhere"})
    config.hf_config = SimpleNamespace(architectures=["Blind"])
    with pytest.raises(ValueError, match="--no-enable-multimodal"):
        make_processor(args, config, unknown, TOKENIZER)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"auto_map": {"AutoImageProcessor": "own.Own", "AutoProcessor": "own.Own"}}, "--trust-remote-code"),
        ([1], "must be objects|cannot be read"),
        ("{not json", "cannot be read"),
    ],
)
def test_a_processor_that_cannot_be_loaded_is_told_at_the_start(tmp_path, name, content, message):
    """Not with the first image."""
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if name == "processor_config.json":  # beside which the image processor's own code is named
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "own.Own"}}))
    config = SimpleNamespace(model_path=str(tmp_path), hf_config=CONFIG)
    with pytest.raises(ValueError, match=message) as caught:
        make_processor(ServerArgs(), config, XModel, TOKENIZER)
    assert str(tmp_path) in str(caught.value) and "--no-enable-multimodal" in str(caught.value)


def test_without_a_processor():
    with pytest.raises(ValueError, match="No processor registered for architecture: Unknown"):
        get_mm_processor(SimpleNamespace(architectures=["Unknown"]), None, TOKENIZER)


def test_a_package_of_processors(tmp_path, monkeypatch):
    package = tmp_path / "seeing_things"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "broken.py").write_text("raise RuntimeError('no')")
    (package / "one.py").write_text(
        "from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor\n"
        "class ZModel: pass\n"
        "class ZProcessor(BaseMultimodalProcessor):\n"
        "    models = [ZModel, 'ZOther']\n"
        "    async def process_mm_data_async(self, image_data, audio_data, input_text, request_obj, **kwargs): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import_processors("seeing_things")
    module = sys.modules["seeing_things.one"]
    assert isinstance(module, ModuleType)
    assert {"ZOther": module.ZProcessor, module.ZModel: module.ZProcessor} == registry.PROCESSOR_MAPPING
    import_processors("seeing_things")
    register_processor(type("Mine", (XProcessor,), {"models": ["ZOther"]}))
    with pytest.raises(ValueError, match="ZOther already has"):
        import_processors("seeing_things")
    import_processors("seeing_things", overwrite=True)
    assert type(get_mm_processor(SimpleNamespace(architectures=["ZOther"]), None, TOKENIZER)) is module.ZProcessor


def test_a_prompts_media_together_have_a_limit(monkeypatch):
    monkeypatch.setattr(prompt_media, "MAX_PROMPT_PIXELS", 4 * 30)
    images = [Image.new("RGB", (6, 5)) for _ in range(5)]
    assert len(processed("<image>" * 4, images[:4]).mm_items) == 4
    with pytest.raises(InvalidRequest, match="more than 120 pixels together"):
        processed("<image>" * 5, images)


def test_the_processor_has_a_tokenizer_of_its_own(tmp_path):
    """No tokenizer can be used on two threads at once, and that of the engine is in use."""
    config = SimpleNamespace(model_path=str(tmp_path), hf_config=CONFIG)
    made = make_processor(ServerArgs(), config, XModel, TOKENIZER)
    assert made.tokenizer is not TOKENIZER and made.tokenizer.get_vocab() == TOKENIZER.get_vocab()
