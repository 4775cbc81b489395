"""Images in the prefix cache, in chunks, and beside each other: with media made by hand, on a tiny Qwen2-VL."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from erring_eyes import ErringQwen2VL
from mm_parity import joined, open_vision_engine, token_types, vision_reference

from rtp_llm import Engine
from rtp_llm.srt.entrypoints.frontend import Call
from rtp_llm.srt.layers.multimodal import general_mm_embed_routine, rows_within
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.multimodal.embedding_cache import EmbeddingCache
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalInputs
from rtp_llm.srt.multimodal.placement import MediaPlacer
from tiny_models import Reference, assert_same_ids
from tiny_seeing import END, IMAGE_PAD, START, make_seeing

pytestmark = pytest.mark.xdist_group("media cache")

Image = tuple[torch.Tensor, tuple[int, int]]  # patches, (rows, columns)
CHUNKS = {"chunked_prefill_size": 5}
HAND_MADE: dict[str, Any] = {"enable_multimodal": False}  # no processor is needed


def draw(seed: int, rows: int = 4, columns: int = 6) -> Image:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows * columns, 3 * 2 * 14 * 14, generator=generator), (rows, columns)


CAT, DOG, SMALL = draw(1), draw(2), draw(3, 2, 2)


class Model:
    """A checkpoint, and what transformers answers to prompts of ids and images."""

    def __init__(self, model_dir: str) -> None:
        self.model_dir = model_dir
        self._model = transformers.AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()

    def prompt(self, parts: Sequence[int | Image]) -> tuple[list[int], MultimodalInputs]:
        ids: list[int] = []
        items = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            patches, (rows, columns) = part
            first, count = len(ids) + 1, rows * columns // 4
            ids += [START, *[IMAGE_PAD] * count, END]
            grid = torch.tensor([[1, rows, columns]])
            items.append(MultimodalDataItem(Modality.IMAGE, patches, [(first, first + count - 1)], image_grid_thw=grid))
        media = MultimodalInputs(items, im_token_id=IMAGE_PAD)
        if items:
            types = token_types(ids, media)
            grids = joined(items, "image_grid_thw")
            positions, delta = self._model.model.get_rope_index(torch.tensor([ids]), types, image_grid_thw=grids)
            media.mrope_positions, media.mrope_position_delta = positions[:, 0], int(delta)
        return ids, media

    def expected(self, parts: Sequence[int | Image]) -> Reference:
        ids, media = self.prompt(parts)
        options = {"mm_token_type_ids": token_types(ids, media)} if media.mm_items else {}
        if media.mm_items:
            options |= {
                "pixel_values": joined(media.mm_items),
                "image_grid_thw": joined(media.mm_items, "image_grid_thw"),
            }
        return vision_reference(self._model, ids, options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(make_seeing(tmp_path_factory.mktemp("seeing")))


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    with open_vision_engine(model.model_dir, **HAND_MADE) as engine:
        yield engine


def ask(engine: Engine, model: Model, *prompts: Sequence[int | Image], **options: Any) -> list[dict[str, Any]]:
    """All at once."""
    completions = []
    params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True} | options
    for parts in prompts:
        ids, media = model.prompt(parts)
        placed = MediaPlacer().place(ids, media)[1] if media.mm_items else None
        prompt = Prompt(input_ids=ids, sampling_params=params, media=placed)
        manager = engine.tokenizer_manager
        completions += [manager.completion(request) for request in manager.requests(prompt)]
    return engine._collect(Call(engine._client, completions, True))


def check(engine: Engine, model: Model, *prompts: Sequence[int | Image]) -> list[int]:
    """Answers are transformers'; returns how many tokens of each prompt came from the cache."""
    results = ask(engine, model, *prompts)
    for result, parts in zip(results, prompts, strict=True):
        assert_same_ids(
            result["output_ids"], model.expected(parts), str([p if isinstance(p, int) else "#" for p in parts])
        )
    return [result["meta_info"]["cached_tokens"] for result in results]


def test_the_same_image_is_found_another_is_not(engine: Engine, model: Model) -> None:
    first = [5, 6, CAT, 7, 8]
    assert check(engine, model, first) == [0]
    assert check(engine, model, first) == [len(model.prompt(first)[0]) - 1]
    assert check(engine, model, [5, 6, CAT, 9]) == [2 + 8]
    assert check(engine, model, [5, 6, DOG, 7, 8]) == [3]  # up to <|vision_start|>
    almost = (CAT[0].clone(), CAT[1])
    almost[0][-1, -1] += 1e-3
    assert check(engine, model, [5, 6, almost, 7, 8]) == [3]


def test_two_images_swapped(engine: Engine, model: Model) -> None:
    assert check(engine, model, [5, CAT, DOG, 7]) == [0]
    assert check(engine, model, [5, DOG, CAT, 7]) == [2]
    assert check(engine, model, [5, CAT, CAT, 7]) == [1 + 8 + 1]


def test_an_image_of_another_shape_and_equal_patches(engine: Engine, model: Model) -> None:
    turned = (CAT[0], (6, 4))
    assert check(engine, model, [5, CAT, 7]) == [0]
    assert check(engine, model, [5, turned, 7]) == [2]


def test_three_turns(engine: Engine, model: Model) -> None:
    turn: list[int | Image] = [5, CAT, 7]
    known = 0
    for question in ([8, 9], [10, 11, 12], [13]):
        assert check(engine, model, turn) == [known]
        answer = ask(engine, model, turn)[0]["output_ids"]
        known = len(model.prompt(turn)[0]) + len(answer) - 1  # the last token's keys were never computed
        turn = [*turn, *answer, *question]


@pytest.mark.parametrize("page_size", [1, 4])
def test_chunks_that_cut_images(model: Model, page_size: int) -> None:
    with open_vision_engine(model.model_dir, page_size=page_size, **CHUNKS, **HAND_MADE) as engine:
        check(engine, model, [5, CAT, DOG, 7], [SMALL, CAT], [5, 6, 7], [*range(5, 30), DOG])
        check(engine, model, [5, CAT, DOG, 7], [5, CAT, 8], [DOG, CAT, SMALL])


def test_text_one_and_many_images_together(engine: Engine, model: Model) -> None:
    prompts = [[5, 6, 7], [CAT, 8], [DOG, SMALL, CAT, DOG, 9], [10], [5, SMALL]]
    check(engine, model, *prompts)
    check(engine, model, *prompts)


def test_retraction_within_an_image(model: Model) -> None:
    """There is memory for one and a half of these requests."""
    with open_vision_engine(model.model_dir, max_total_tokens=48, chunked_prefill_size=4, **HAND_MADE) as engine:
        prompts = [[5 + i, draw(10 + i), draw(20 + i), 7] for i in range(4)]
        results = ask(engine, model, *prompts, max_new_tokens=20)
        assert sum(result["meta_info"]["num_retractions"] for result in results) > 0
        for result, parts in zip(results, prompts, strict=True):
            expected = model.expected(parts)
            assert_same_ids(result["output_ids"][: len(expected.output_ids)], expected)


def test_several_answers_to_one_image(engine: Engine, model: Model) -> None:
    results = ask(engine, model, [5, CAT, 7], n=3, temperature=1.0, seed=1)
    assert len({tuple(result["output_ids"]) for result in results}) > 1
    again = ask(engine, model, [5, CAT, 7], n=3, temperature=1.0, seed=1)
    assert [result["output_ids"] for result in results] == [result["output_ids"] for result in again]


def test_penalties_count_the_placeholder_as_transformers_does(engine: Engine, model: Model) -> None:
    """It is a token of the prompt that stands there often; pad ids are none."""
    plain = ask(engine, model, [5, CAT, 7])[0]["output_ids"]
    held = ask(engine, model, [5, CAT, 7], frequency_penalty=0.5, repetition_penalty=1.3)[0]["output_ids"]
    assert len(held) == len(plain) == 8 and held != plain


@pytest.mark.parametrize("size_mb", [0, 512])
def test_images_are_encoded_once_if_there_is_room(model: Model, size_mb: int) -> None:
    with open_vision_engine(model.model_dir, mm_embedding_cache_size_mb=size_mb, **CHUNKS, **HAND_MADE) as engine:
        worker_model = engine._runner.core.executor.worker.runner.model
        encoded: list[int] = []
        encode = worker_model.get_image_feature
        worker_model.get_image_feature = lambda items: encoded.append(len(items)) or encode(items)
        check(engine, model, [5, CAT, 7])
        assert sum(encoded) == (1 if size_mb else 2)  # two chunks of five tokens hold some of the image
        check(engine, model, [6, CAT, 7], [7, CAT, DOG])
        assert sum(encoded) == 2 if size_mb else sum(encoded) > 4


def is_dog(item: MultimodalDataItem) -> bool:
    return torch.equal(item.feature, DOG[0])


def short_of_a_row(encode: Any, items: list[MultimodalDataItem]) -> torch.Tensor:
    """The dog has a row less than it has placeholders."""
    return torch.cat([encode([item])[: -1 if is_dog(item) else None] for item in items])


def blind_to_dogs(encode: Any, items: list[MultimodalDataItem]) -> Any:
    if any(is_dog(item) for item in items):
        raise KeyError("no dogs")
    return encode(items)


ERRING = [
    (short_of_a_row, r"ValueError: the encoder of kind image gave \[5, \d+\] for 1 items with \[6\] placeholders"),
    (blind_to_dogs, "KeyError: 'no dogs'"),
]


def check_that_some_fail(
    engine: Engine, model: Model, prompts: Sequence[Sequence[int | Image]], messages: dict[int, str]
) -> None:
    """Those end with the cause; those computed in the same steps are answered, and so are later ones.

    Args:
        messages: patterns, by index into ``prompts`` of those that fail.
    """
    for _ in range(2):
        for i, result in enumerate(ask(engine, model, *prompts)):
            if i in messages:
                reason = result["meta_info"]["finish_reason"]
                assert reason["type"] == "abort" and reason["status_code"] == 500 and not result["output_ids"]
                assert re.search(f"media of this request cannot be encoded: {messages[i]}", reason["message"])
            else:
                assert_same_ids(result["output_ids"], model.expected(prompts[i]))


@pytest.mark.parametrize(("encode", "message"), ERRING)
def test_an_item_that_cannot_be_encoded_ends_its_requests_only(
    engine: Engine, model: Model, encode: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker_model = engine._runner.core.executor.worker.runner.model
    worker_model.get_image_feature = partial(encode, worker_model.get_image_feature)
    prompts = [[5, CAT, 7], [5, 6, DOG, 7], [SMALL, 9, CAT], [10, 11], [CAT, DOG]]
    check_that_some_fail(engine, model, prompts, {1: message, 4: message})
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert errors and all(record.exc_info for record in errors)


@pytest.mark.slow
def test_ranks_agree_on_what_cannot_be_encoded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error on both ranks, and one on a rank alone."""
    monkeypatch.setitem(ModelRegistry.models.layers[0], "Qwen2VLForConditionalGeneration", ErringQwen2VL)
    prompts = [[5, CAT, 7], [5, 6, draw(4, 6, 4), 7], [SMALL, 9, CAT], [10, 11]]
    with open_vision_engine(model.model_dir, tp_size=2, **HAND_MADE) as engine:
        check_that_some_fail(engine, model, prompts, {1: "KeyError: 'too tall'", 2: ".*the encoder failed on rank 1"})


def test_the_embedding_cache_forgets_the_least_recently_used() -> None:
    cache = EmbeddingCache(100)
    rows = torch.ones(5, 2)  # 40 bytes
    for digest in (b"a", b"b"):
        cache.put(digest, rows)
    assert cache.get(b"a") is rows
    cache.put(b"c", rows)
    assert cache.get(b"b") is None and cache.get(b"a") is not None and cache.num_bytes == 80
    cache.put(b"large", torch.ones(50, 2))
    assert cache.get(b"large") is None and cache.num_bytes == 80


def test_rows_within_a_step() -> None:
    offsets = [(3, 6), (8, 8), (20, 10**12)]  # nobody must walk through the last one
    for begin in range(25):
        for end in range(begin, 26):
            there = [(row, place) for row, place in enumerate([3, 4, 5, 6, 8, *range(20, 30)]) if begin <= place < end]
            assert rows_within(offsets, begin, end) == ([row for row, _ in there], [place for _, place in there])
    assert rows_within(offsets, 10**12 + 1, 10**12 + 2) == ([], [])


class Batch:
    """What the routine reads of a ForwardBatch."""

    def __init__(self, media: MultimodalInputs, num_tokens: int) -> None:
        self.mm_inputs, self.embedding_cache, self.row_errors = [media], None, None
        self.extend_prefix_lens_cpu, self.extend_seq_lens_cpu = [0], [num_tokens]


class Language(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(10, 2)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed_tokens

    def forward(self, input_ids: None, forward_batch: Batch, input_embeds: torch.Tensor, **kwargs: Any) -> Any:
        assert input_ids is None
        return input_embeds, kwargs


def embed(function: Any, **options: Any) -> Any:
    item = MultimodalDataItem(Modality.IMAGE, torch.ones(1), [(1, 2)])
    batch = Batch(MultimodalInputs([item], im_token_id=9), 4)
    functions = {Modality.IMAGE: function} if function else None
    ids = torch.tensor([1, 9, 9, 2])
    with torch.inference_mode():
        return general_mm_embed_routine(ids, batch, Language(), object(), functions, **options)


def test_embeddings_go_to_their_places_and_deeper_ones_beside_them() -> None:
    rows = torch.arange(12.0).view(2, 6)
    embeds, kwargs = embed(lambda items: rows, use_deepstack={Modality.IMAGE: True}, positions=3)
    assert embeds[1:3].tolist() == rows[:, :2].tolist() and kwargs["positions"] == 3
    deep = kwargs["input_deepstack_embeds"]
    assert deep[1:3].tolist() == rows[:, 2:].tolist() and not deep[[0, 3]].any()


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (None, {}, "object takes no media of kind image: it has no get_image_feature"),
        (lambda items: torch.ones(3, 2), {}, r"gave \[3, 2\] for 1 items with \[2\] placeholders"),
        (lambda items: torch.ones(2, 3), {}, "has 3 values, but the language model takes 2"),
        (lambda items: torch.ones(2, 2), {"placeholder_tokens": {Modality.IMAGE: [8]}}, "token 9 stands for"),
    ],
)
def test_mistakes_of_a_model_are_named(function: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(function, **options)
