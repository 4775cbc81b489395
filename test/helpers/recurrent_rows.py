"""Rows of a step for kernels and layers that keep a state, with slots of a pool."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from thread_ranks import on_thread_ranks
from torch import nn

from rtp_llm.srt.cache.spec import StateGroup, StateSpec
from rtp_llm.srt.distributed.parallel_state import WorldShape
from rtp_llm.srt.forward_batch import StateWave
from rtp_llm.srt.layers.weights import declared_sources, fill
from rtp_llm.srt.model_traits import FinishesLoad, KeepsState
from rtp_llm.srt.state_pool import StatePool


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32 results of sums in different orders: an error is measured by the largest value, since terms cancel."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1.5e-5 * max(2.0, largest))


def rows_of(lengths: Sequence[int], load: Sequence[int], store: Sequence[int]) -> StateWave:
    """Pieces of these lengths, with the slots before and after each."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return StateWave(torch.tensor(load), torch.tensor(store), torch.tensor(bounds), bounds)


def pool_of(model: nn.Module, num_slots: int = 4) -> StatePool:
    """A pool for all states of a model, or of one layer."""
    kept = [module for module in model.modules() if isinstance(module, KeepsState)]
    layers = tuple((module.layer_id, module.state_spec()) for module in kept)
    merged: dict[int, StateSpec] = {}
    for layer_id, spec in layers:
        merged[layer_id] = StateSpec((*merged[layer_id].tensors, *spec.tensors) if layer_id in merged else spec.tensors)
    return StatePool(StateGroup(tuple(merged.items())), num_slots, "cpu")


def batch_of(pool: StatePool, *waves: StateWave) -> Any:
    """As much of a batch as layers that keep a state read."""
    return SimpleNamespace(state_pool=pool, state_waves=list(waves))


def in_pieces(
    compute: Callable[..., torch.Tensor],
    states: torch.Tensor,
    pieces: Sequence[int],
    tokens: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Compute one sequence piece after piece, from slot 0 on, in slot 1; tokens are [L, ...] each."""
    outputs, start = [], 0
    for number, length in enumerate(pieces):
        rows = rows_of([length], [min(number, 1)], [1])
        outputs.append(compute(states, rows, *(x[start : start + length] for x in tokens)))
        start += length
    return torch.cat(outputs)


def on_ranks(
    num_ranks: int, build: Callable[[], nn.Module], weights: Mapping[str, torch.Tensor], run: Callable[[Any], Any]
) -> list[Any]:
    """Build a module for each rank, load the same checkpoint into all, and run them side by side."""

    def loaded() -> nn.Module:
        module = build()
        load_all(module, weights)
        return module

    return on_thread_ranks(WorldShape(tensor=num_ranks), loaded, run)


def load_all(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load a module's parameters by the names that a checkpoint has for them, all of them."""
    sources = declared_sources(module)
    loaded = set()
    for name, tensor in weights.items():
        target, shard_id = sources.get(name, (name, None))
        fill(module.get_parameter(target), tensor, shard_id)
        loaded.add(target)
    assert loaded == {name for name, _ in module.named_parameters()}
    for part in module.modules():
        if isinstance(part, FinishesLoad):
            part.finish_load()
