"""Which device computes: chosen by name, once, and named while layers are built."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from rtp_llm.srt.device.provider import DeviceProvider, Kernel
from rtp_llm.srt.device.registry import DEVICES, load_target

BUILT_FOR = "cpu"  # what layers are built for where nobody says

_providers: dict[tuple[str, str], DeviceProvider] = {}
_built_for: ContextVar[DeviceProvider | None] = ContextVar("built_for", default=None)


def provider_named(name: str) -> DeviceProvider:
    """The provider of ``--device NAME``, one in each process. Whether it can be used here, its ``problem`` says.

    Raises:
        ValueError: there is no such device.
    """
    key = name, DEVICES.target(name)
    if key not in _providers:
        _providers[key] = load_target(key[1])(name)
    return _providers[key]


def choose_device(asked: str | None) -> str:
    """The name of the device that was asked for, else of the best that is usable here.

    Raises:
        RuntimeError: the device that was asked for is not there.
        ValueError: there is no such device.
    """
    if asked is None:
        return next(name for name in DEVICES.own_names() if provider_named(name).problem() is None)
    problem = provider_named(asked).problem()
    if problem is not None:
        raise RuntimeError(f"device is {asked!r}, but {problem}")
    return asked


def choose_torch_device(asked: str | None) -> str:
    """As ``choose_device``; what torch calls it."""
    return provider_named(choose_device(asked)).torch_device


@contextmanager
def building_for(provider: DeviceProvider) -> Iterator[None]:
    """Layers that are built, and weights that are packed, within are for this provider."""
    token = _built_for.set(provider)
    try:
        yield
    finally:
        _built_for.reset(token)


def built_for() -> DeviceProvider:
    return _built_for.get() or provider_named(BUILT_FOR)


def pick(name: str, dtype: torch.dtype | None = None) -> Kernel:
    """The kernel called ``name`` for a layer that is built now, in ``dtype`` (None: the default dtype)."""
    return built_for().pick(name, dtype or torch.get_default_dtype())
