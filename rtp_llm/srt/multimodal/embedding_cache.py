"""Embeddings of media, kept for later steps and requests."""

from collections import OrderedDict

import torch


class EmbeddingCache:
    """Embeddings of items by digest; beyond ``max_bytes`` the least recently used are dropped.

    Used by prompts that are computed in chunks, images that return in a conversation, and requests that resume.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def clear(self) -> None:
        self._entries.clear()
        self.num_bytes = 0

    def get(self, digest: bytes) -> torch.Tensor | None:
        if digest in self._entries:
            self._entries.move_to_end(digest)
        return self._entries.get(digest)

    def put(self, digest: bytes, embedding: torch.Tensor) -> None:
        if digest in self._entries or embedding.nbytes > self.max_bytes:
            return
        self._entries[digest] = embedding
        self.num_bytes += embedding.nbytes
        while self.num_bytes > self.max_bytes:
            _, forgotten = self._entries.popitem(last=False)
            self.num_bytes -= forgotten.nbytes
