"""The store of responses: its limits in number and bytes, and what conversations share."""

import random
from typing import Any

import msgspec
import pytest

from rtp_llm.srt.entrypoints.openai.responses.store import ITEM_BYTES, ResponseStore, StoredResponse

Item = dict[str, Any]


def an_item(name: str, text: str = "") -> Item:
    return {"id": name, "type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def stored(name: str, items: list[Item], output: Item) -> StoredResponse:
    response: Any = {"id": name, "output": [output]}
    return StoredResponse(response, items)


def size_of(responses: list[StoredResponse]) -> int:
    """Return the bytes of responses, with items that they share counted once."""
    items = {id(item): item for response in responses for item in response.items}
    heads = sum(len(msgspec.json.encode({**response.response, "output": []})) for response in responses)
    return heads + sum(ITEM_BYTES + len(msgspec.json.encode(item)) for item in items.values())


def test_a_history_counts_once() -> None:
    store = ResponseStore(10, 10**6)
    first = stored("r1", [an_item("a", "x" * 1000)], an_item("b"))
    store.add(first)
    second = stored("r2", [*first.items, an_item("c")], an_item("d"))
    store.add(second)
    assert store.num_bytes == size_of([first, second]) < 2 * size_of([first])
    assert store.delete("r1") and not store.delete("r1")
    assert store.item("a") is first.input[0] and store.num_bytes == size_of([second])
    store.delete("r2")
    assert (store.num_bytes, len(store), store.item("a")) == (0, 0, None)


@pytest.mark.parametrize(("max_responses", "max_bytes"), [(0, 10**6), (10, 100)])
def test_one_that_does_not_fit_is_not_kept(max_responses: int, max_bytes: int) -> None:
    store = ResponseStore(max_responses, max_bytes)
    store.add(stored("r", [an_item("a")], an_item("b")))
    assert (store.get("r"), store.num_bytes, len(store)) == (None, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_random_operations(seed: int) -> None:
    """What is there is what was used last; the bytes are those of what is there."""
    rng = random.Random(seed)
    store = ResponseStore(8, 12_000)
    kept: dict[str, StoredResponse] = {}  # the least recently used first
    for i in range(300):
        name = rng.choice(list(kept)) if kept and rng.random() < 0.5 else None
        if name is not None and rng.random() < 0.3:
            store.delete(name)
            del kept[name]
            continue
        former: list[Item] = []
        if name is not None:
            found = store.get(name)
            assert found is kept[name]
            kept[name] = kept.pop(name)
            former = found.items[-4:]
        made = stored(f"r{i}", [*former, an_item(f"same{i % 3}", "x" * rng.randrange(400))], an_item(f"o{i}"))
        store.add(made)
        kept[f"r{i}"] = made
        while len(kept) > 8 or size_of(list(kept.values())) > 12_000:
            del kept[next(iter(kept))]
        assert len(store) == len(kept) and store.num_bytes == size_of(list(kept.values()))
    for name in list(kept):
        store.delete(name)
    assert store.num_bytes == 0 and store.item("same1") is None
