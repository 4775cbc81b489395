"""Helpers of all vision towers: hidden states of several layers, and prefixed names in checkpoints."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from rtp_llm.srt.layers.vision import Sources


def hidden_states_at(
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    layers: Sequence[nn.Module] | nn.ModuleList,
    x: torch.Tensor,
    wanted: int | Sequence[int],
) -> torch.Tensor | list[torch.Tensor]:
    """Return the hidden state of each number in ``wanted``, a list for a list; later layers are not run.

    As in Hugging Face's ``hidden_states``, 0 is ``x``, i the output of the i-th layer, and -1 that of the last.

    Raises:
        ValueError: there is no such state.
    """
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    num_states = len(layers) + 1
    wrong = [number for number in numbers if not -num_states <= number < num_states]
    if wrong or not numbers:
        raise ValueError(
            f"a tower of {len(layers)} layers has hidden states {-num_states} to {len(layers)}, not {wrong}"
        )
    places = [number % num_states for number in numbers]
    states = {0: x}
    for i in range(max(places)):
        x = run(layers[i], x)
        if i + 1 in places:
            states[i + 1] = x
    return states[places[0]] if isinstance(wanted, int) else [states[place] for place in places]


def sources_below(prefix: str, tower: nn.Module) -> Sources:
    """Return ``weight_sources`` for a tower whose names may have ``prefix`` before them in checkpoints."""
    sources: Sources = {f"{prefix}.{name}": (name, None) for name, _ in tower.named_parameters()}
    for path, module in tower.named_modules():
        if path:
            for source, (parameter, shard_id) in getattr(module, "weight_sources", {}).items():
                sources[f"{prefix}.{path}.{source}"] = (f"{path}.{parameter}", shard_id)
    return sources
