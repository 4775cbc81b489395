"""States that models of transformers keep elsewhere than where its cache has them, made accessible in the same way."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from rtp_llm.srt.layers.fallback.cache import KeepsStates, Key, ServedCache, States


class ServedMiniMaxCache(ServedCache, MiniMaxCache):
    """The cache of MiniMax (2025), which has methods of its own for the states of lightning attention."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.linear_cache: list[torch.Tensor] = []

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        return self.read(Key(layer_idx, "lightning"))

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self.write(Key(layer_idx, "lightning"), linear_cache)


def served_cache(config: PreTrainedConfig) -> ServedCache:
    """Return the cache to hand to a model that keeps states."""
    return ServedMiniMaxCache(config) if config.model_type == "minimax" else ServedCache(config)


class AttributeStates:
    """States in attributes of a module, or of modules within it: RecurrentGemma (2024)."""

    takes_several_rows = True

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        paths = [name.rpartition(".") for name in names]
        self._places = {
            Key(getattr(module, "layer_idx", 0), name): (module.get_submodule(path), last)
            for name, (path, _, last) in zip(names, paths, strict=True)
        }

    def states(self, output: Any) -> States:
        return {key: getattr(module, name) for key, (module, name) in self._places.items()}

    def call(
        self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], states: States, are_new: bool
    ) -> Any:
        for key, (owner, name) in self._places.items():
            setattr(owner, name, states[key])
        output = module(*args, **kwargs)
        for key, state in self.states(output).items():
            states[key].copy_(state)
        for owner, name in self._places.values():
            setattr(owner, name, None)
        return output


class RwkvStates:
    """States of all layers that RWKV (Peng et al., 2023) takes as an argument, and returns.

    Its code mixes the rows of a batch up when it goes on by one token.
    """

    takes_several_rows = False

    def states(self, output: Any) -> States:
        return {Key(0, "state", place): state for place, state in enumerate(output.state)}

    def call(
        self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], states: States, are_new: bool
    ) -> Any:
        output = module(*args, **kwargs | {"state": None if are_new else list(states.values())})
        for key, state in self.states(output).items():
            states[key].copy_(state)
        output.state = None
        return output


class XlstmStates:
    """States of all layers in the cache that xLSTM (Beck et al., 2024) takes as an argument, and returns."""

    takes_several_rows = True

    def states(self, output: Any) -> States:
        self._cache = output.cache_params
        return {
            Key(layer_idx, "rnn", place): state
            for layer_idx, states in self._cache.rnn_state.items()
            for place, state in enumerate(states)
        }

    def call(
        self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], states: States, are_new: bool
    ) -> Any:
        cache = copy.copy(self._cache)
        cache.seqlen_offset = torch.zeros_like(cache.seqlen_offset)
        cache.rnn_state = {
            layer_idx: tuple(states[Key(layer_idx, "rnn", place)] for place in range(len(old)))
            for layer_idx, old in cache.rnn_state.items()
        }
        output = module(*args, **kwargs | {"cache_params": cache})
        output.cache_params = None
        return output


_OWN: dict[str, Callable[[nn.Module], KeepsStates]] = {
    "RecurrentGemmaRecurrentBlock": lambda m: AttributeStates(m, ("conv1d_state", "rg_lru.recurrent_states")),
    "RwkvModel": lambda _: RwkvStates(),
    "xLSTMModel": lambda _: XlstmStates(),
}


def own_states(module: nn.Module) -> KeepsStates | None:
    """Return where a module keeps states by itself; None: nowhere."""
    make = _OWN.get(type(module).__name__)
    return None if make is None else make(module)
