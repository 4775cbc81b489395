"""The tensors behind state slots: per layer, the states of sequences that run or can be resumed."""

from collections.abc import Callable, Sequence

import torch

from rtp_llm.srt.cache.spec import StateGroup
from rtp_llm.srt.device.choice import provider_named


class StatePool:
    """The states of all layers, [num_slots + 2, ...] each.

    Slot 0 has the states of no tokens, zeros, and is never written. Slots 1 to ``num_slots`` are the scheduler's. Slot
    ``dummy_slot`` is for rows that only pad a batch: what is in it means nothing.
    """

    def __init__(self, group: StateGroup, num_slots: int, device: str) -> None:
        self.group = group
        self.num_slots = num_slots
        self._provider = provider_named(device)
        allocate = self._provider.cache_allocator()
        self._tensors: dict[tuple[int, str], torch.Tensor] = {}
        for layer_id, spec in group.layers:
            for tensor in spec.tensors:
                states = allocate(num_slots + 2, *tensor.shape, dtype=getattr(torch, tensor.dtype))
                states[0].zero_()
                states[self.dummy_slot].zero_()
                self._tensors[layer_id, tensor.name] = states

    @property
    def dummy_slot(self) -> int:
        return self.num_slots + 1

    def tensor(self, layer_id: int, name: str) -> torch.Tensor:
        """Return one tensor of a layer's states, [num_slots + 2, ...]."""
        return self._tensors[layer_id, name]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the states of all layers from slots to other slots; no slot is in both lists."""
        if not sources:
            return
        from_slots, to_slots = (self._provider.to_device(slots, torch.int64) for slots in (sources, targets))
        for states in self._tensors.values():
            states[to_slots] = states[from_slots]

    def kept(self, slots: torch.Tensor) -> Callable[[], None]:
        """Copy the states of slots [N] as they are now; return a function that writes them back."""
        before = [(states, states[slots]) for states in self._tensors.values()]

        def put_back() -> None:
            for states, values in before:
                states[slots] = values

        return put_back
