"""How layers that keep a state compute a step: piece after piece of its rows, each from the state before it."""

from collections.abc import Callable

import torch

from rtp_llm.srt.forward_batch import ForwardBatch, StateWave
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
        part = compute(wave, *(_of_wave(wave, x) for x in tokens))
        if output is None:
            output = part.new_empty(len(tokens[0]), *part.shape[1:])
        if wave.tokens is None or wave.first_token is not None:
            _of_wave(wave, output).copy_(part)
        else:
            output.index_copy_(0, wave.tokens, part)  # copies rows; an assignment by index copies numbers
    if output is None:
        raise ValueError("the batch has no state waves: whoever makes a batch for this model gives it state_waves")
    return output


def _of_wave(wave: StateWave, x: torch.Tensor) -> torch.Tensor:
    """Return the wave's tokens of x; a view if they are neighbours."""
    if wave.tokens is None:
        return x
    if wave.first_token is not None:
        return x[wave.first_token : wave.first_token + len(wave.tokens)]
    return x.index_select(0, wave.tokens)


def _pool_of(batch: ForwardBatch) -> StatePool:
    if batch.state_pool is None:
        raise ValueError("the batch has no states: whoever makes a batch for this model gives it a state_pool")
    return batch.state_pool
