"""Greedy choices and draws in C++: the tokens are those of ``worker/sampler.py``, without a sort of the vocabulary."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from rtp_llm.srt.devices.cpu.binding import INT64, POINTER, Kernel, bind
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.sampling_params import SamplingParams

_ARGTYPES: dict[str, tuple[Any, ...]] = {
    "argmax": (POINTER, INT64, INT64, INT64, POINTER, POINTER),
    "mask_tokens": (POINTER, INT64, INT64, POINTER, POINTER, INT64, INT64),
    "draw": (POINTER, POINTER, INT64, INT64, INT64, *(POINTER,) * 7),
    "exponential": (INT64, INT64, INT64, POINTER),
}


@functools.cache
def _function(name: str) -> Kernel:
    return bind("sampling", name, *_ARGTYPES[name])


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.dtype is not torch.float32 or not logits.is_cpu or logits.stride(1) != 1 or not logits.shape[1]:
        return reference.argmax(logits)
    num_rows, vocab_size = logits.shape
    tokens, bad = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.bool)
    _function("argmax")(logits.data_ptr(), num_rows, logits.stride(0), vocab_size, tokens.data_ptr(), bad.data_ptr())
    return tokens, bad


def mask_tokens(logits: torch.Tensor, lines: torch.Tensor, words: torch.Tensor) -> None:
    """See ``kernels/reference.py``."""
    if logits.dtype is not torch.float32 or logits.stride(1) != 1 or not words.is_contiguous():
        reference.mask_tokens(logits, lines, words)
        return
    lines = lines.contiguous()
    _function("mask_tokens")(
        logits.data_ptr(), logits.stride(0), logits.shape[1], lines.data_ptr(), words.data_ptr(), words.shape[1],
        len(lines),
    )  # fmt: skip


def draw(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    seeds: torch.Tensor,
    positions: torch.Tensor,
    lines: Sequence[int] | None = None,
) -> torch.Tensor:
    """One token per entry of ``params``: see ``draw`` in ``worker/sampler.py``.

    Args:
        logits: [S, vocab_size] float32 on the CPU. A line with bad logits gives token 0.
        params: of each draw; seeds, positions: [D] int64 on the CPU.
        lines: the line of logits of each draw; None: one after the other.

    Returns:
        [D] int64.
    """
    if logits.dtype is not torch.float32 or not logits.is_cpu or logits.stride(1) != 1:
        raise ValueError(f"draws are from rows of float32 on the CPU, not {logits.dtype} on {logits.device}")
    lines = range(len(params)) if lines is None else lines
    counts = {len(params), len(seeds), len(positions), len(lines)}
    if len(counts) > 1 or not all(0 <= line < len(logits) for line in lines):
        raise ValueError(f"{len(params)} draws with {len(seeds)} seeds from lines {lines} of {len(logits)}")
    if not seeds.dtype is positions.dtype is torch.int64:
        raise ValueError(f"seeds and positions must be int64, not {seeds.dtype} and {positions.dtype}")
    columns = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
    real, seeds, positions = torch.tensor(columns, dtype=torch.float64), seeds.contiguous(), positions.contiguous()
    whole = torch.tensor([list(lines), [p.top_k for p in params]], dtype=torch.int64)
    tokens = torch.empty(len(params), dtype=torch.int64)
    (temperature, top_p, min_p), (line_ids, top_k) = real, whole
    _function("draw")(
        logits.data_ptr(), line_ids.data_ptr(), len(params), logits.stride(0), logits.shape[1], temperature.data_ptr(),
        top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(), seeds.data_ptr(), positions.data_ptr(),
        tokens.data_ptr(),
    )  # fmt: skip
    return tokens


def exponential(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """As ``worker/philox.py``, for one seed (an int64) and position: [vocab_size] float64."""
    numbers = torch.empty(vocab_size, dtype=torch.float64)
    _function("exponential")(seed, position, vocab_size, numbers.data_ptr())
    return numbers
