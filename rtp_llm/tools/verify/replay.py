"""The reference computed again, a layer or all of it, while something in it is changed."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rtp_llm.tools.verify.copies import copied
from rtp_llm.tools.verify.latent import PLAIN, ROTATED, their_scores
from rtp_llm.tools.verify.locate import layer_of, relative_error
from rtp_llm.tools.verify.recorders import TheirRecorder
from rtp_llm.tools.verify.trace import LOGITS, Place, Trace

NOT_REPEATED = (
    "not found: no change of the reference can be tried, since its layer, computed again with what it was given, gives "
    "something else. It keeps or changes something from one call to the next"
)


class Replay:
    """Computes places of the reference anew.

    Args:
        recorder: that recorded the reference; it keeps its layers' calls.
        run_all: runs the whole reference, fills a trace, and returns the last logits [1, vocab_size].
    """

    def __init__(self, recorder: TheirRecorder, run_all: Callable[[Trace], torch.Tensor]) -> None:
        self._recorder = recorder
        self._run_all = run_all
        self._names = recorder.names

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the hooks for several replays."""
        with self._recorder:
            yield

    def modules_around(self, place: Place) -> dict[str, nn.Module]:
        """Return the modules, by our names, that are computed anew for a place: its layer's, or all outside layers."""
        layer = layer_of(place.module)
        if layer in self._recorder.calls:
            return {name: m for m, name in self._names.items() if name == layer or name.startswith(f"{layer}.")}
        return {name: m for m, name in self._names.items() if not layer_of(name)}

    def arguments(self, place: Place) -> dict[str, torch.Tensor]:
        """Return the numbers that a place's layer was called with last, by the names of ``forward``'s arguments."""
        args, kwargs = self._recorder.calls.get(layer_of(place.module), ((), {}))
        named = dict(enumerate(args)) | kwargs
        names = self._names_of_arguments(place)
        return {
            names.get(key, str(key)): value
            for key, value in named.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }

    @contextmanager
    def argument(self, place: Place, name: str, value: torch.Tensor) -> Iterator[None]:
        """Call a place's layer with another argument within the context."""
        layer, names = layer_of(place.module), self._names_of_arguments(place)
        before = self._recorder.calls[layer]
        args = tuple(value if names.get(i, str(i)) == name else arg for i, arg in enumerate(before[0]))
        kwargs = {key: value if key == name else arg for key, arg in before[1].items()}
        self._recorder.calls[layer] = (args, kwargs)
        try:
            yield
        finally:
            self._recorder.calls[layer] = before

    def _names_of_arguments(self, place: Place) -> dict[Any, str]:
        """Return the names of a place's layer's positional arguments, by their index."""
        module = next((m for m, name in self._names.items() if name == layer_of(place.module)), None)
        return {} if module is None else dict(enumerate(inspect.signature(module.forward).parameters))

    @torch.inference_mode()
    def tensor(self, place: Place, whole: bool = False) -> torch.Tensor | None:
        """Return what the reference has at a place now; None: nothing. Within ``recording``.

        Args:
            whole: compute all of it, not the place's layer alone from what that was given.
        """
        before = self._recorder.trace
        trace = self._recorder.trace = Trace(before.num_tokens, before.first_kept, before.parts)
        try:
            logits = self._run(trace, "" if whole or place in before.joined else layer_of(place.module))
            trace.join_as(before)
        except Exception:  # of any kind: what was changed does not fit
            return None
        finally:
            self._recorder.end_watches()
            self._recorder.trace = before
        if place.part in (PLAIN, ROTATED):
            trace.latent_sizes = before.latent_sizes
            return their_scores(trace, place.module).get(place)
        return logits if place.part == LOGITS else trace.tensors.get(place)

    def repeats(self, place: Place, theirs: torch.Tensor, tolerance: float) -> bool:
        """Return whether a place's layer, computed again with what it was given, gives what it gave."""
        with self.recording():
            again = self.tensor(place)
        return again is not None and again.shape == theirs.shape and relative_error(again, theirs) <= tolerance

    def _run(self, trace: Trace, layer: str) -> torch.Tensor | None:
        """Compute a layer, or all, if it is none, and return the last logits."""
        call = self._recorder.calls.get(layer)
        if call is None:
            return self._run_all(trace)
        module = next(module for module, name in self._names.items() if name == layer)
        args, kwargs = copied(call)
        calls = dict(self._recorder.calls)
        with trace.step(0, trace.num_tokens):
            module(*map(_without_cache, args), **{name: _without_cache(value) for name, value in kwargs.items()})
        self._recorder.calls = calls
        return None


def _without_cache(value: Any) -> Any:
    """Replace a cache, which holds the layer's keys already, by none."""
    return None if "Cache" in type(value).__name__ else value
