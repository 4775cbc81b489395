"""The tensors behind page ids: per cache group and layer, pages of keys and values."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch

from rtp_llm.srt.cache.spec import CacheGroup
from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.kernels import reference


class LayerCache(NamedTuple):
    """One layer's keys and values: a token's are at its *slot*, ``page_id * page_size + offset``.

    ``key_scales`` and ``value_scales`` are the factors of int8 keys and values; else None.
    """

    group: int  # its cache group: the index in ``batch.page_tables`` and ``batch.out_cache_locs``
    page_size: int
    keys: torch.Tensor  # [slots, num_kv_heads, head_dim]
    values: torch.Tensor  # [slots, num_kv_heads, v_head_dim]; of a latent layer a view of its keys
    key_scales: torch.Tensor | None = None  # [slots, num_kv_heads] float32
    value_scales: torch.Tensor | None = None

    @classmethod
    def empty(cls, index: int, group: CacheGroup, num_pages: int, allocate: Callable[..., torch.Tensor]) -> Self:
        """Allocate ``num_pages`` pages and page 0, which is zeroed; no other memory is touched."""
        spec, dtype = group.spec, getattr(torch, group.spec.dtype)
        heads = (num_pages + 1) * group.page_size, spec.num_kv_heads
        keys = allocate(*heads, spec.head_dim, dtype=dtype)
        values = keys[..., : spec.v_head_dim] if spec.latent else allocate(*heads, spec.v_head_dim, dtype=dtype)
        scales = [allocate(*heads, dtype=torch.float32) for _ in "kv"] if spec.has_scales else []
        for tensor in (keys, values, *scales):
            tensor[: group.page_size].zero_()
        return cls(index, group.page_size, keys, values, *scales)

    def numbers(self, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of keys [..., num_kv_heads, head_dim] and values at slots [...], in ``dtype``."""
        return _scaled(self.keys, self.key_scales, slots, dtype), _scaled(self.values, self.value_scales, slots, dtype)


class KVPool:
    """Keys and values of all layers.

    The device reserves memory without touching it, except page 0, which is zeroed: padded page tables point to it.
    """

    def __init__(self, groups: Sequence[CacheGroup], num_pages: Sequence[int], device: str) -> None:
        self.groups = list(groups)
        self.num_pages = list(num_pages)
        provider = provider_named(device)
        allocate = provider.cache_allocator()
        self._layers = {
            layer_id: LayerCache.empty(index, group, count, allocate)
            for index, (group, count) in enumerate(zip(groups, num_pages, strict=True))
            for layer_id in group.layer_ids
        }
        caches = self._layers.values()
        values = [cache.values for cache in caches if cache.values.is_contiguous()]
        provider.take_cache([*(cache.keys for cache in caches), *values])

    def layer(self, layer_id: int) -> LayerCache:
        return self._layers[layer_id]

    def write(self, layer_id: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
        """Store k [T, num_kv_heads, head_dim] and v [T, num_kv_heads, v_head_dim] at slots [T].

        Raises:
            ValueError: ``v`` is not None for a latent layer, or is None for another.
        """
        cache = self._layers[layer_id]
        if (v is None) != self.groups[cache.group].spec.latent:
            raise ValueError(f"layer {layer_id}: a latent cache is written without values, any other with them")
        reference.write_kv(k, v, cache.keys, cache.values, slots, cache.key_scales, cache.value_scales)


def _scaled(stored: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if scales is None:
        return stored[slots].to(dtype)
    return (stored[slots] * scales[slots][..., None]).to(dtype)


def slots_of(page_table: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return slots [...] of tokens at ``positions`` [...] in the page table's ``rows`` [...] (broadcast together)."""
    if page_size == 1:
        return page_table[rows, positions].long()
    pages = page_table[rows, positions // page_size].long()
    return pages * page_size + positions % page_size
