"""Media: their digests and pad ids, where they lie in a prompt, and the bytes that they travel as."""

import mmap
import tracemalloc
from pathlib import Path

import pytest
import torch

from rtp_llm.srt.multimodal.items import (
    PAD_START,
    MediaError,
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
    MultimodalProcessorOutput,
    media_blocks,
    pad_mm_token_pairs,
    pad_mm_tokens,
    vocabulary_ids,
)

IMAGE, END = 90, 91


def image(offsets: list[tuple[int, int]], fill: float = 0.5, **data: object) -> MultimodalDataItem:
    return MultimodalDataItem(Modality.IMAGE, torch.full((4, 3), fill), offsets, **data)


def inputs(*items: MultimodalDataItem) -> MultimodalInputs:
    return MultimodalInputs(list(items), im_token_id=IMAGE)


def test_equal_contents_have_equal_ids_wherever_they_stand() -> None:
    assert image([(0, 3)]).pad_ids(6) == image([(7, 9)]).pad_ids(6)
    assert image([]).pad_ids(6)[:4] == image([]).pad_ids(4)
    assert len(set(image([]).pad_ids(100))) == 100 and min(image([]).pad_ids(100)) >= PAD_START
    assert image([]).pad_value == image([]).pad_ids(1)[0]


@pytest.mark.parametrize(
    "other",
    [
        image([], fill=0.25),
        image([], image_grid_thw=torch.tensor([1, 2, 2])),
        MultimodalDataItem(Modality.VIDEO, torch.full((4, 3), 0.5)),
        MultimodalDataItem(Modality.IMAGE, torch.full((3, 4), 0.5)),
        MultimodalDataItem(Modality.IMAGE, torch.full((4, 3), 0.5, dtype=torch.float64)),
        MultimodalDataItem(Modality.IMAGE, [torch.full((4, 3), 0.5)]),
        MultimodalDataItem(Modality.IMAGE, precomputed_embeddings=torch.full((4, 3), 0.5)),
    ],
)
def test_whatever_the_encoder_reads_tells_items_apart(other: MultimodalDataItem) -> None:
    assert other.digest != image([]).digest and other.hash != image([]).hash
    assert not set(other.pad_ids(50)) & set(image([]).pad_ids(50))


def test_values_do_not_run_into_each_other() -> None:
    assert image([], a=["xy", "z"]).digest != image([], a=["x", "yz"]).digest
    assert image([], a=1).digest != image([], a=True).digest != image([], a="1").digest


def test_a_change_of_contents_changes_the_digest() -> None:
    item = image([])
    before = item.digest
    item.offsets = [(1, 2)]
    assert item.digest == before
    item.scale = 2.0
    assert item.digest != before and item.model_specific_data == {"scale": 2.0}
    item.feature = torch.ones(1)
    assert item.digest not in (before, image([], scale=2.0).digest)
    with pytest.raises(AttributeError, match="has no grid"):
        _ = item.grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_bytes_and_back(dtype: torch.dtype) -> None:
    item = MultimodalDataItem(
        Modality.VIDEO,
        [torch.ones(2, 3).to(dtype), torch.zeros(0, 4).to(dtype)],
        [(1, 2), (5, 5)],
        precomputed_embeddings=torch.arange(6.0).view(2, 3).T,
        times=[0.5, None, "x", b"\0\1", {"deep": [torch.tensor(7)]}],
    )
    sent = MultimodalInputs([item], video_token_id=9, mrope_positions=torch.zeros(3, 7).long(), mrope_position_delta=-3)
    came = MultimodalInputs.decode(sent.encode())
    [back] = came.mm_items
    assert (came.video_token_id, came.mrope_position_delta, came.im_token_id) == (9, -3, None)
    assert back.offsets == [(1, 2), (5, 5)] and back.digest == item.digest
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(back.feature, item.feature, strict=True))
    assert torch.equal(back.precomputed_embeddings, item.precomputed_embeddings)
    assert back.times[:4] == [0.5, None, "x", b"\0\1"] and back.times[4]["deep"][0] == 7
    back.__dict__.pop("_digest")
    assert back.digest == item.digest  # anew, from what came


def test_decoding_does_not_grow_with_the_image() -> None:
    """It reads a header; what an encoder reads is made when it asks, and no other reader sees what it writes."""
    sent = MultimodalInputs([MultimodalDataItem(Modality.IMAGE, torch.ones(1 << 22), [(1, 2)], extra=b"x" * 1000)])
    content = sent.encode()
    tracemalloc.start()
    try:
        [item] = MultimodalInputs.decode(content).mm_items
        assert item.num_tokens == 2 and item.digest == sent.mm_items[0].digest
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
        assert item.feature.sum() == 1 << 22 and item.extra == b"x" * 1000
        assert tracemalloc.get_traced_memory()[1] >= 1 << 24  # of bytes that others read too, a copy
    finally:
        tracemalloc.stop()
    item.feature += 1
    assert MultimodalInputs.decode(content).mm_items[0].feature[0] == 1
    item.feature = torch.zeros(1)
    assert item.feature.shape == (1,) and item.digest != sent.mm_items[0].digest


def test_a_mapped_file_is_not_copied(tmp_path: Path) -> None:
    sent = MultimodalInputs([MultimodalDataItem(Modality.IMAGE, torch.ones(1 << 22), [(1, 2)])])
    (tmp_path / "media").write_bytes(sent.encode())
    with (tmp_path / "media").open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tracemalloc.start()
    try:
        [item] = MultimodalInputs.decode(content).mm_items
        item.feature += 1
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    assert item.feature[0] == 2 and (tmp_path / "media").read_bytes() == sent.encode()


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(MediaError, match="not object"):
        _ = image([], thing=object()).digest
    with pytest.raises(MediaError, match="pixel_size, which nobody reads; known: mm_items"):
        MultimodalProcessorOutput.from_dict({"mm_items": [], "input_ids": [1], "pixel_size": 3})


def test_padding_and_back() -> None:
    prompt = [5, IMAGE, IMAGE, 6, IMAGE, 7]
    mm = inputs(image([(1, 2)]), image([(4, 4)], fill=1.0))
    padded = pad_mm_tokens(prompt, mm)
    assert padded == [5, *mm.mm_items[0].pad_ids(2), 6, *mm.mm_items[1].pad_ids(1), 7]
    assert prompt == [5, IMAGE, IMAGE, 6, IMAGE, 7] == vocabulary_ids(padded, mm)
    parts = inputs(image([(1, 2), (4, 4)]))  # one image in two pieces
    assert pad_mm_tokens(prompt, parts)[4] == parts.mm_items[0].pad_ids(3)[2]
    with pytest.raises(MediaError, match="do not lie in the prompt of 6 tokens"):
        pad_mm_tokens(prompt, inputs(image([(4, 6)])))


@pytest.mark.parametrize("change", [lambda ids: ids[::-1], lambda ids: [*ids, 1 << 50], lambda ids: [0, *ids]])
def test_pad_ids_elsewhere_are_told(change: object) -> None:
    mm = inputs(image([(1, 2)]))
    with pytest.raises(MediaError, match="pad"):
        vocabulary_ids(change(pad_mm_tokens([5, IMAGE, IMAGE, 6], mm)), mm)


def test_pairs_of_tokens() -> None:
    mm = inputs(image([]), image([], fill=1.0))
    prompt = [1, 80, IMAGE, IMAGE, 81, 82, IMAGE, 83, 80, IMAGE, 81]
    pairs = [(80, 81), (82, 83)]
    padded = pad_mm_token_pairs(prompt, mm, pairs, data_start_token_ids=[80])
    assert [item.offsets for item in mm.mm_items] == [[(2, 3), (6, 6)], [(9, 9)]]
    assert padded[6] == mm.mm_items[0].pad_ids(3)[2] and vocabulary_ids(padded, mm) == prompt
    with pytest.raises(MediaError, match="places for 3 items, but there are 2"):
        pad_mm_token_pairs(prompt, mm, pairs)
    with pytest.raises(MediaError, match="not ended by token 81"):
        pad_mm_token_pairs([80, IMAGE], mm, pairs)
    with pytest.raises(MediaError, match="none has begun"):
        pad_mm_token_pairs([82, IMAGE, 83], mm, pairs, data_start_token_ids=[80])


def test_neighbours_are_one_block() -> None:
    assert media_blocks(inputs(image([(7, 9)]), image([(1, 2), (3, 4)]))) == [(1, 4), (7, 9)]
