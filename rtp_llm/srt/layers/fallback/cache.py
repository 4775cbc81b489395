"""The cache that a model of transformers is given: keys and values pass through, states are exchanged between calls."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig

from rtp_llm.srt.layers.fallback.masks import UnservableModelError

CONVOLUTION, RECURRENCE = "conv", "recurrent"


class Key(NamedTuple):
    """Names a state as a module asks for it."""

    layer_idx: int
    kind: str
    state_idx: int = 0

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer_idx}.{self.state_idx}"


States = dict[Key, torch.Tensor]  # [N, ...] each: the states of N pieces of sequences


class KeepsStates(Protocol):
    """Where a module keeps its states from call to call.

    ``takes_several_rows``: whether a call may be for several sequences.
    """

    takes_several_rows: bool

    def states(self, output: Any) -> States:
        """Return those of the one sequence that the module was called for, [1, ...], when it has returned this."""

    def call(
        self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], states: States, are_new: bool
    ) -> Any:
        """Call the module with these states, which are written in place. ``are_new``: the sequences begin."""


class ServedCache(DynamicCache):
    """The cache as the model sees it. Attention, which is ours, keeps keys and values by itself.

    ``probe``: is told of every state that is read or written.

    Args:
        config: of a model whose layers may keep states.
    """

    takes_several_rows = True

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        DynamicCache.__init__(self, config=config)
        self.probe: Callable[[Key], None] | None = None
        self.num_updates = 0  # of keys and values
        self._states: States = {}
        self._known: set[Key] = set()  # those that a call before has written

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_updates += 1
        return key_states, value_states

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        raise UnservableModelError(
            f"layer {layer_idx} chooses the tokens that it attends to by keys of their own (an index), which are not "
            "kept here"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are passed; the tokens of all sequences stand in one row

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.read(Key(layer_idx, CONVOLUTION, state_idx))

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Keep the last inputs [N, channels, kernel] of the known ones and these [N, channels, L]; return them all."""
        key = Key(layer_idx, CONVOLUTION, state_idx)
        known = self.read(key)
        size = conv_kernel_size or (conv_states if known is None else known).shape[-1]
        if known is None:
            whole = pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        else:
            whole = torch.cat([known, conv_states], dim=-1)
        self.write(key, whole[..., -size:])
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.read(Key(layer_idx, RECURRENCE, state_idx))

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        key = Key(layer_idx, RECURRENCE, state_idx)
        self.write(key, recurrent_states)
        return self._states[key]

    def read(self, key: Key) -> torch.Tensor | None:
        self._ask(key)
        return self._states[key] if key in self._known else None

    def write(self, key: Key, state: torch.Tensor) -> None:
        self._ask(key)
        if key in self._states:
            self._states[key].copy_(state)
        else:
            self._states[key] = state.clone()
        self._known.add(key)

    def _ask(self, key: Key) -> None:
        if self.probe is not None:
            self.probe(key)
        elif key not in self._states:
            raise RuntimeError(f"the state {key} is asked for by a module that did not ask for it at loading")

    def states(self, output: Any) -> States:
        return self._states

    def call(
        self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], states: States, are_new: bool
    ) -> Any:
        own = self._states, self._known
        self._states, self._known = states, set() if are_new else set(states)
        try:
            return module(*args, **kwargs)
        finally:
            self._states, self._known = own
