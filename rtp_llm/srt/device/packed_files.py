"""How a device lets packed weights be kept in files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class PackedFiles:
    """Where a device's packed weights are kept, and what their bytes depend on.

    Attributes:
        folder: where they are kept.
        layout: names the order in which numbers lie.
        made_by: names of the programs that quantize and pack: others as soon as these change.
        empty: allocates memory for them, called as ``torch.empty(*shape, dtype=...)``.
    """

    folder: Path
    layout: str
    made_by: tuple[str, ...]
    empty: Callable[..., torch.Tensor]
