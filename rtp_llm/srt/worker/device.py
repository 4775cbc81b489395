"""Getting host values to the device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_device(values: list[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of host values; on a GPU it is copied from pinned memory, so that the host does not wait for it."""
    if device.type != "cuda":
        if dtype == torch.int64:  # half the time of torch.tensor, for the lists that every step has
            return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def to_device_together(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """A tensor for each one-dimensional int64 array. They share memory, and get to the device in one copy."""
    together = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        together = together.pin_memory()
    return together.to(device, non_blocking=True).split([len(array) for array in arrays])
