"""Whether a module that keeps states computes one token after others as it computes the same token among them.

Many have code of their own for a single token, and some leave something out there: Mamba 2's mixer in NemotronH and
Zamba2 bounds the step sizes of whole sequences only. Then no answer is right in every schedule.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from rtp_llm.srt.layers.fallback.cache import ServedCache, States
from rtp_llm.srt.layers.fallback.masks import UnservableModelError
from rtp_llm.srt.layers.fallback.states import Call, is_by_token

TOLERANCE = 1e-4  # relative difference of a token's output, in float32, that is more than rounding
SCALES = (1.0, 4.0, 16.0)  # of inputs, by turns: bounds of values are met by large ones only


def check_single_steps(calls: Sequence[Call], cache: ServedCache, num_tokens: int) -> None:
    """Check the first call of each class of modules that keep states in the cache.

    Args:
        calls: of modules in a pass over one sequence of ``num_tokens``.

    Raises:
        UnservableModelError: one computes a token in another way when it is given alone.
    """
    kept = [call for call in calls if cache.states(call.output).keys() >= set(call.keys)]
    for call in {type(call.module): call for call in reversed(kept)}.values():
        error = _Steps(call, cache, num_tokens).error()
        if not error <= TOLERANCE:
            raise UnservableModelError(
                f"{call} computes a token that follows others differently when it is given alone: outputs differ by "
                f"{error:.1g} of their size. Transformers' code for single tokens lacks something there, such as the "
                "bounds of step sizes (time_step_min, time_step_limit)"
            )


class _Steps:
    """A module's call again, with larger inputs, in float32: in any other dtype rounding would hide what differs."""

    def __init__(self, call: Call, cache: ServedCache, num_tokens: int) -> None:
        module = call.module
        tensors = chain(module.named_parameters(), module.named_buffers())
        self._weights = {name: tensor.float() for name, tensor in tensors if tensor.is_floating_point()}
        self._module, self._cache, self._num_tokens = module, cache, num_tokens
        self._states = {key: cache.states(call.output)[key] for key in call.keys}
        leaves, self._form = tree_flatten((call.args, call.kwargs))
        self._is_by_token = [is_by_token(leaf, num_tokens) for leaf in leaves]
        self._returns_by_token = [is_by_token(leaf, num_tokens) for leaf in tree_flatten(call.output)[0]]
        self._leaves = [self._scaled(leaf, of) for leaf, of in zip(leaves, self._is_by_token, strict=True)]

    def _scaled(self, leaf: Any, by_token: bool) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        if not by_token:
            return leaf.float()
        scales = torch.tensor([SCALES[i % len(SCALES)] for i in range(self._num_tokens)], device=leaf.device)
        return leaf.float() * scales.view(1, -1, *[1] * (leaf.dim() - 2))

    def error(self) -> float:
        """Return the largest difference of a token's output, relative to its size."""
        tokens = torch.arange(self._num_tokens, device=next(iter(self._states.values())).device)[None]
        whole = self._output(tokens, self._zeros(), are_new=True)
        states = self._zeros()
        alone = [self._output(token, states, are_new=i == 0) for i, token in enumerate(tokens.split(1, dim=1))]
        errors = [
            (torch.cat(parts, dim=1) - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-20)
            for expected, *parts in zip(whole, *alone, strict=True)
        ]
        return max(float(error.max().nan_to_num(torch.inf)) for error in errors)

    def _zeros(self) -> States:
        return {key: torch.zeros_like(state, dtype=torch.float32) for key, state in self._states.items()}

    def _output(self, tokens: torch.Tensor, states: States, are_new: bool) -> list[torch.Tensor]:
        """Return what the module gives for each of ``tokens`` [1, L]; ``states`` change in place."""
        given = [leaf[0, tokens] if of else leaf for leaf, of in zip(self._leaves, self._is_by_token, strict=True)]
        args, kwargs = tree_unflatten(given, self._form)
        leaves = tree_flatten(self._cache.call(self._run, args, kwargs, states, are_new))[0]
        return [leaf for leaf, of in zip(leaves, self._returns_by_token, strict=True) if of]

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._module, self._weights, args, kwargs)
