"""Calls that a recorder of steps takes as one operation: what they do inside depends on values that they read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

Function = Callable[..., torch.Tensor]
Taker = Callable[[Function, tuple[Any, ...]], torch.Tensor]

_taker: ContextVar[Taker | None] = ContextVar("takes whole calls", default=None)


def whole(function: Function, *args: Any) -> torch.Tensor:
    """Return ``function(*args)``, whose shape and dtype must follow from those of the arguments.

    A recorder gets function and arguments, to call them anew in each replay: the tensors have other values then.
    """
    take = _taker.get()
    return function(*args) if take is None else take(function, args)


@contextmanager
def taken_whole(take: Taker) -> Iterator[None]:
    """Have ``take(function, args)`` make such calls of this thread within the context."""
    token = _taker.set(take)
    try:
        yield
    finally:
        _taker.reset(token)
