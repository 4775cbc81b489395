"""Responses that are kept for later requests: a limited number of them, of limited size; the least recently used goes.

A conversation's responses share the items of its history, which count once.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from rtp_llm.srt.entrypoints.openai.responses.protocol import Item, ResponseObject

ITEM_BYTES = 512  # of an item, beside its JSON


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that has ended.

    Args:
        input: all items that it answered, those of the responses before it included; they are never changed.
    """

    response: ResponseObject
    input: Sequence[Item]

    @property
    def items(self) -> list[Item]:
        """The conversation so far."""
        return [*self.input, *self.response["output"]]


class ResponseStore:
    """Keeps responses by their ids.

    Args:
        max_responses: largest number; 0: none is kept.
        max_bytes: largest size of all, as JSON, with ITEM_BYTES for each item.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()  # the least recently used first
        self._sizes: dict[str, int] = {}  # bytes of a response without its items
        self._items: dict[int, tuple[int, int]] = {}  # identity of an item -> number of its uses, its bytes
        self._by_id: dict[str, dict[int, Item]] = {}  # an item's id -> items of this id, by their identities

    def __len__(self) -> int:
        return len(self._responses)

    def add(self, stored: StoredResponse) -> None:
        """Keep a response, and drop what there is no room for: at worst the response itself."""
        response_id = stored.response["id"]
        size = len(msgspec.json.encode({**stored.response, "output": []}))
        self._responses[response_id] = stored
        self._sizes[response_id] = size
        self.num_bytes += size
        for item in stored.items:
            self._use(item)
        while self._responses and (len(self._responses) > self.max_responses or self.num_bytes > self.max_bytes):
            self.delete(next(iter(self._responses)))

    def get(self, response_id: str) -> StoredResponse | None:
        """Return a response, which thereby is the most recently used; None: it is not here."""
        stored = self._responses.get(response_id)
        if stored is not None:
            self._responses.move_to_end(response_id)
        return stored

    def item(self, item_id: str) -> Item | None:
        """Return an item of a stored conversation."""
        found = self._by_id.get(item_id)
        return next(reversed(found.values())) if found else None

    def delete(self, response_id: str) -> bool:
        """Drop a response; return whether it was here. Responses after it keep the items of its conversation."""
        stored = self._responses.pop(response_id, None)
        if stored is None:
            return False
        self.num_bytes -= self._sizes.pop(response_id)
        for item in stored.items:
            self._release(item)
        return True

    def _use(self, item: Item) -> None:
        num_uses, size = self._items.get(id(item), (0, 0))
        if not num_uses:
            size = ITEM_BYTES + len(msgspec.json.encode(item))
            self.num_bytes += size
            self._by_id.setdefault(item["id"], {})[id(item)] = item
        self._items[id(item)] = (num_uses + 1, size)

    def _release(self, item: Item) -> None:
        num_uses, size = self._items[id(item)]
        if num_uses > 1:
            self._items[id(item)] = (num_uses - 1, size)
            return
        del self._items[id(item)]
        self.num_bytes -= size
        same_id = self._by_id[item["id"]]
        del same_id[id(item)]
        if not same_id:
            del self._by_id[item["id"]]
