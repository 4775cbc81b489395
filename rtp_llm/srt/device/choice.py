"""The choice of the device by name, and the provider that layers are built for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from rtp_llm.srt.device.provider import DeviceProvider, Kernel
from rtp_llm.srt.device.registry import DEVICES, load_target

BUILT_FOR = "cpu"  # the device for layers that are built outside of ``building_for``

_providers: dict[tuple[str, str], DeviceProvider] = {}
_built_for: ContextVar[DeviceProvider | None] = ContextVar("built_for", default=None)


def provider_named(name: str) -> DeviceProvider:
    """Return the provider of ``--device NAME``, one in each process. Its ``problem`` says whether it can be used here.

    Raises:
        ValueError: there is no such device.
    """
    key = name, DEVICES.target(name)
    if key not in _providers:
        _providers[key] = load_target(key[1])(name)
    return _providers[key]


def choose_device(asked: str | None) -> str:
    """Return the name of the requested device, else of the best that is usable here.

    Raises:
        RuntimeError: the requested device cannot be used here.
        ValueError: there is no such device.
    """
    if asked is None:
        return next(name for name in DEVICES.own_names() if provider_named(name).problem() is None)
    problem = provider_named(asked).problem()
    if problem is not None:
        raise RuntimeError(f"device is {asked!r}, but {problem}")
    return asked


def choose_torch_device(asked: str | None) -> str:
    """As ``choose_device``, but return torch's name of the device."""
    return provider_named(choose_device(asked)).torch_device


@contextmanager
def building_for(provider: DeviceProvider) -> Iterator[None]:
    """Build layers and pack weights for this provider within the context."""
    token = _built_for.set(provider)
    try:
        yield
    finally:
        _built_for.reset(token)


def built_for() -> DeviceProvider:
    return _built_for.get() or provider_named(BUILT_FOR)


def pick(name: str, dtype: torch.dtype | None = None) -> Kernel:
    """Return the kernel ``name`` for a layer that is being built, in ``dtype`` (None: the default dtype)."""
    return built_for().pick(name, dtype or torch.get_default_dtype())
