"""How layers that keep a state compute a step: piece after piece of its rows, each from the state before it."""

from collections.abc import Callable

import torch

from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.state_pool import StatePool


def state_tensor(batch: ForwardBatch, layer_id: int, name: str) -> torch.Tensor:
    """Return one tensor of a layer's states, [slots, ...]."""
    return _pool_of(batch).tensor(layer_id, name)


def in_waves(batch: ForwardBatch, compute: Callable[..., torch.Tensor], *tokens: torch.Tensor) -> torch.Tensor:
    """Return ``compute(wave, *its tokens)`` of all of the batch's waves, in the order of the batch's tokens.

    Args:
        compute: loads and stores the states of the wave's slots; [P, ...] of each tensor -> [P, ...].
        tokens: [T, ...] each.
    """
    waves = batch.state_waves
    if len(waves) == 1 and waves[0].tokens is None:
        return compute(waves[0], *tokens)
    output: torch.Tensor | None = None
    for wave in waves:
        places = slice(None) if wave.tokens is None else wave.tokens
        part = compute(wave, *(x[places] for x in tokens))
        if output is None:
            output = part.new_empty(len(tokens[0]), *part.shape[1:])
        output[places] = part
    if output is None:
        raise ValueError("the batch has no state waves: whoever makes a batch for this model gives it state_waves")
    return output


def _pool_of(batch: ForwardBatch) -> StatePool:
    if batch.state_pool is None:
        raise ValueError("the batch has no states: whoever makes a batch for this model gives it a state_pool")
    return batch.state_pool
