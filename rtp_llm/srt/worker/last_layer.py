"""The last layer of a step with prompts, for those tokens alone whose hidden states are wanted.

Of a prompt only the last token has logits, unless log-probabilities or pooled outputs are asked for: the last layer
writes the keys and values of all tokens, but what it makes of the others nobody reads. A model file knows nothing of
this: the layer is called twice. The first call is for all tokens and ends at its attention, once their keys and values
are written. The second is for the wanted tokens, as if the step had no others. What the layer returns is filled up
with zeros, so that later modules find each token in its place.
"""

import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.distributed.parallel_state import SplitError
from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.model_traits import KeepsCache, KeepsState, PreparesForward
from rtp_llm.srt.models.stages import layers_of
from rtp_llm.srt.worker.columns import mode_of
from rtp_llm.srt.worker.replayable import Unknown, batch_tensors, hide

logger = logging.getLogger(__name__)

LEAST_SAVED = 32  # tokens: with fewer, the second call costs as much as it saves
Result = torch.Tensor | tuple[torch.Tensor | None, ...]  # what a layer returns


class KeysWritten(Exception):
    """The step's keys and values are in the cache: the first call of the layer has done what it is for."""


class UnknownForm(Exception):
    """The layer takes or returns something of which it is not known how it belongs to tokens."""


class WritesOnly(AttentionBackend):
    """Attention of the first call, by a back end that has planned all tokens."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def plan(self, batch: ForwardBatch) -> None:
        raise AssertionError("the back end has planned the step")

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: AttentionSpec,
        batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if save_kv_cache and k is not None:
            self._backend.write(k, v, layer, batch)
        raise KeysWritten


class ReadsOnly(AttentionBackend):
    """Attention of the second call, by a back end that plans the wanted tokens."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def plan(self, batch: ForwardBatch) -> None:
        self._backend.plan(batch)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: AttentionSpec,
        batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._backend.forward(q, None, None, layer, batch, False, sinks)


@dataclass(frozen=True, slots=True)
class WantedTokens:
    """The last tokens of each row, from the first one that is wanted on.

    ``tokens``: [W] int64, indices into the batch's [T]; ``counts``: [B] int64 on the host, of each row, at least 1.
    """

    tokens: torch.Tensor
    counts: np.ndarray

    @classmethod
    def of(cls, batch: ForwardBatch) -> Self | None:
        """Return them; None if they are nearly all. Reads tensors of the batch."""
        counts = np.array(batch.extend_seq_lens_cpu, dtype=np.int64)
        ends = counts.cumsum()
        if ends[-1] - len(ends) < LEAST_SAVED:
            return None
        read = [batch.sample_rows, *(row.token_rows for row in batch.prompt_logprobs), batch.pooled_tokens]
        wanted = np.concatenate([each.numpy() for each in read if each is not None])
        first = ends - 1
        np.minimum.at(first, np.searchsorted(ends, wanted, side="right"), wanted)
        left = ends - first
        total = int(left.sum())
        if ends[-1] - total < LEAST_SAVED or 2 * total > ends[-1]:
            return None
        tokens = np.arange(total) + np.repeat(first - (left.cumsum() - left), left)
        return cls(torch.from_numpy(tokens), left)

    def batch_of(self, batch: ForwardBatch, backend: AttentionBackend) -> ForwardBatch:
        """Return a batch that computes these tokens, whose keys and values will be written, with attention planned by
        ``backend``."""
        counts, tokens, ends = self.counts, self.tokens, batch.visible_ends
        starts = np.array(batch.seq_lens_cpu, dtype=np.int64) - counts
        narrow = replace(
            batch,
            forward_mode=mode_of(counts.tolist()),
            input_ids=batch.input_ids[tokens],
            positions=batch.positions[tokens],
            extend_prefix_lens=torch.from_numpy(starts),
            extend_seq_lens=torch.from_numpy(counts),
            extend_start_loc=torch.from_numpy(counts.cumsum() - counts),
            extend_prefix_lens_cpu=starts.tolist(),
            extend_seq_lens_cpu=counts.tolist(),
            out_cache_locs=[slots[tokens] for slots in batch.out_cache_locs],
            attn_backend=ReadsOnly(backend),
            mrope_positions=None if batch.mrope_positions is None else batch.mrope_positions[:, tokens],
            visible_ends=None if ends is None else ends[tokens],
            token_types=None if batch.token_types is None else batch.token_types[tokens],
            state_waves=[],
        )
        backend.plan(narrow)
        return narrow

    def argument(self, value: Any, batch: ForwardBatch, narrow: ForwardBatch) -> Any:
        """Return a layer's argument for these tokens alone.

        Raises:
            UnknownForm: it is not known whether it belongs to tokens: it is neither the batch nor its positions, nor
                numbers of each token.
        """
        if value is batch:
            return narrow
        if value is batch.positions:
            return narrow.positions
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if value is batch.mrope_positions:
            return narrow.mrope_positions
        is_tensor = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
        if not is_tensor or isinstance(value, nn.Parameter) or value.shape[0] != batch.num_tokens:
            raise UnknownForm(f"it takes {_described(value)}")
        return value[self.tokens]

    def filled_up(self, result: Any, num_tokens: int) -> Result:
        """Return what a layer has made of these tokens, with zeros for all others of ``num_tokens``.

        Raises:
            UnknownForm: it is not a tensor of a line for each token, nor a tuple of such tensors and Nones.
        """
        if isinstance(result, tuple):
            return tuple(None if part is None else self._filled_up(part, num_tokens) for part in result)
        return self._filled_up(result, num_tokens)

    def _filled_up(self, part: Any, num_tokens: int) -> torch.Tensor:
        if not isinstance(part, torch.Tensor) or part.dim() < 2 or part.shape[0] != len(self.tokens):
            raise UnknownForm(f"it returns {_described(part)}")
        whole = part.new_zeros(num_tokens, *part.shape[1:])
        whole[self.tokens] = part
        return whole


def _described(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


@dataclass(frozen=True, slots=True)
class SecondCall:
    """What a step's second call computes: the wanted tokens of ``batch``, as the batch ``narrow``."""

    wanted: WantedTokens
    batch: ForwardBatch
    narrow: ForwardBatch


class LastLayer:
    """Stands in place of the ``forward`` of a model's last layer. Steps in which all tokens are wanted, those that are
    watched by hooks within the layer, and those that nothing prepared, are computed as before.

    It is prepared for a step as modules are (ReplaysForward), after them, so that a recorded step reads nothing of the
    host's.

    Attributes:
        is_on: whether steps may be computed so; False from the first one on whose arguments have another form.
    """

    def __init__(self, layer: nn.Module, backend: AttentionBackend) -> None:
        """``backend``: which plans each step. It writes keys and values; another like it computes the wanted tokens."""
        self.is_on = True
        self._second: SecondCall | None = None  # of the step that was prepared last; None: all tokens are computed once
        self._forward: Callable[..., Any] = layer.forward
        self._modules = list(layer.modules())
        self._step_modules = [module for module in self._modules if isinstance(module, PreparesForward)]
        self._writing, self._reading = WritesOnly(backend), type(backend)()
        replaced: Any = layer
        replaced.forward = functools.wraps(layer.forward)(lambda *args, **kwargs: self._run(*args, **kwargs))

    @classmethod
    def of(cls, model: nn.Module, backend: AttentionBackend) -> Self | None:
        """Take the last layer of a model, and the attention back end that plans its steps.

        None: it keeps no keys and values, more than those of one attention, or a state; or layers are not found, as
        where the list has attention alone, and other modules follow it.
        """
        try:
            _, layers = layers_of(model)
        except SplitError:
            return None
        last = layers[-1]
        keepers = [module for module in last.modules() if isinstance(module, (KeepsCache, KeepsState))]
        if len(keepers) != 1 or not isinstance(keepers[0], RadixAttention) or keepers[0] is last:
            return None
        return cls(last, backend)

    def prepare_for_forward(self, batch: ForwardBatch) -> None:
        """Find the tokens of the second call, and plan their attention."""
        self._second = None
        if self.is_on and batch.forward_mode.is_extend() and not self._is_watched():
            wanted = WantedTokens.of(batch)
            if wanted is not None:
                self._second = SecondCall(wanted, batch, wanted.batch_of(batch, self._reading))

    def step_tensors(self) -> list[torch.Tensor]:
        """Tensors that ``prepare_for_forward`` made."""
        if self._second is None:
            return []
        return [self._second.wanted.tokens, *batch_tensors(self._second.narrow), *self._reading.step_tensors()]

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        second = self._second
        if second is None or not self.is_on or not any(value is second.batch for value in (*args, *kwargs.values())):
            return self._forward(*args, **kwargs)
        if isinstance(second.batch.seq_lens_cpu, Unknown):  # the step is being recorded
            hide(second.narrow)
        try:
            return self._run_wanted(second, args, kwargs)
        except UnknownForm as error:
            self.is_on = False
            logger.info("the last layer is computed for all tokens of a prompt: %s", error)
            return self._forward(*args, **kwargs)

    def _run_wanted(self, second: SecondCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted, batch, narrow = second.wanted, second.batch, second.narrow
        narrow_args = [wanted.argument(value, batch, narrow) for value in args]
        narrow_kwargs = {name: wanted.argument(value, batch, narrow) for name, value in kwargs.items()}
        writing = replace(batch, attn_backend=self._writing)
        with suppress(KeysWritten):
            return self._forward(
                *(writing if value is batch else value for value in args),
                **{name: writing if value is batch else value for name, value in kwargs.items()},
            )  # it has called no attention
        for module in self._step_modules:
            module.prepare_for_forward(narrow)
        return wanted.filled_up(self._forward(*narrow_args, **narrow_kwargs), batch.num_tokens)

    def _is_watched(self) -> bool:
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)
