"""The tensors behind page ids: per cache group and layer, pages of keys and values."""

from collections.abc import Sequence

import torch

from rtp_llm.srt.cache.spec import CacheGroup
from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.kernels import reference


class KVPool:
    """Keys and values of all layers. A token's *slot* is ``page_id * page_size + offset``.

    The values of a latent layer are a view of its keys. Where a group's ``dtype`` is int8, scales [slots, num_kv_heads]
    float32 lie beside keys and values.

    Memory is reserved by the device, and not touched but for page 0, which is zeroed: padded page tables point to it.
    """

    def __init__(self, groups: Sequence[CacheGroup], num_pages: Sequence[int], device: str) -> None:
        self.groups = list(groups)
        self.num_pages = list(num_pages)
        self._group_of: dict[int, int] = {}
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._scales: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        provider = provider_named(device)
        empty = provider.cache_allocator()
        for g, (group, count) in enumerate(zip(groups, num_pages, strict=True)):
            spec, dtype = group.spec, getattr(torch, group.spec.dtype)
            num_slots = (count + 1) * group.page_size
            for layer_id in group.layer_ids:
                self._group_of[layer_id] = g
                keys = empty(num_slots, spec.num_kv_heads, spec.head_dim, dtype=dtype)
                if spec.latent:
                    values = keys[..., : spec.v_head_dim]
                else:
                    values = empty(num_slots, spec.num_kv_heads, spec.v_head_dim, dtype=dtype)
                keys[: group.page_size].zero_()
                values[: group.page_size].zero_()
                self._keys[layer_id], self._values[layer_id] = keys, values
                if spec.has_scales:
                    scales = [empty(num_slots, spec.num_kv_heads, dtype=torch.float32) for _ in "kv"]
                    for scale in scales:
                        scale[: group.page_size].zero_()
                    self._scales[layer_id] = scales[0], scales[1]
        provider.take_cache([*self._keys.values(), *(v for v in self._values.values() if v.is_contiguous())])

    def group_of(self, layer_id: int) -> int:
        return self._group_of[layer_id]

    def write(self, layer_id: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
        """Stores k [T, num_kv_heads, head_dim] and v [T, num_kv_heads, v_head_dim] at slots [T].

        ``v`` is None for latent layers, and for them alone.
        """
        self.check_values(layer_id, v)
        reference.write_kv(k, v, *self.read(layer_id), slots, *self.scales(layer_id))

    def check_values(self, layer_id: int, v: torch.Tensor | None) -> None:
        """Raises ValueError where values are given to a latent layer, or none to another."""
        if (v is None) != self.groups[self._group_of[layer_id]].spec.latent:
            raise ValueError(f"layer {layer_id}: a latent cache is written without values, any other with them")

    def read(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All slots of a layer: keys [slots, num_kv_heads, head_dim], values [slots, num_kv_heads, v_head_dim]."""
        return self._keys[layer_id], self._values[layer_id]

    def scales(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """What a layer's int8 keys and values are multiplied by, [slots, num_kv_heads] float32 each; else None."""
        return self._scales.get(layer_id, (None, None))


def slots_of(page_table: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """Slots [...] of tokens at ``positions`` [...] of the page table's ``rows`` [...] (broadcast together)."""
    if page_size == 1:
        return page_table[rows, positions].long()
    pages = page_table[rows, positions // page_size].long()
    return pages * page_size + positions % page_size
