"""What the GPU at hand is, and how exactly its tensor cores multiply."""

from functools import cache

import torch


@cache
def generation() -> int:
    """The GPU's compute capability, without its minor number; 9 where there is none."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9


@cache
def multiplies_fp8() -> bool:
    """Whether tensor cores take fp8: those of compute capability 8.9 and more do, and of none, too."""
    return torch.cuda.get_device_capability() >= (8, 9) if torch.cuda.is_available() else True


def input_precision(dtype: torch.dtype) -> str:
    """Return how ``tl.dot`` takes float32: what came of 16 bits has no more digits than TF32, float32 itself has."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
