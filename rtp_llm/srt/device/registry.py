"""Devices and attention back ends by name, each imported when it is first needed."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


class Registry:
    """Maps names to targets, ``module:attribute``."""

    def __init__(self, kind: str, own: Mapping[str, str]) -> None:
        self._kind = kind
        self._own = dict(own)
        self.added: dict[str, str] = {}  # by users of this package; sent to the engine's processes

    def register(self, name: str, target: str) -> None:
        """Add a name, or change its target.

        Raises:
            ValueError: ``target`` is not of the form ``module:attribute``.
        """
        module, _, attribute = target.partition(":")
        if not (module and attribute.isidentifier()):
            raise ValueError(f"the {self._kind} {name!r} must be found at 'module:attribute', not at {target!r}")
        self.added[name] = target

    def own_names(self) -> tuple[str, ...]:
        """Return this package's names, the preferred ones first."""
        return tuple(self._own)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted({*self._own, *self.added}))

    def target(self, name: str) -> str:
        """Return the name's target.

        Raises:
            ValueError: the name is unknown.
        """
        found = self.added.get(name) or self._own.get(name)
        if found is None:
            raise ValueError(f"unknown {self._kind} {name!r}; have {list(self.names())}")
        return found

    def load(self, name: str) -> Any:
        """Import and return the name's class; raise as ``target`` does, or as importing its module does."""
        return load_target(self.target(name))


def load_target(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


# Subclasses of DeviceProvider. Without ``--device``, the first usable one is chosen.
DEVICES = Registry(
    "device",
    {
        "cuda": "rtp_llm.srt.devices.cuda.provider:CudaProvider",
        "cpu": "rtp_llm.srt.devices.cpu.provider:CpuProvider",
        "reference": "rtp_llm.srt.devices.reference.provider:ReferenceProvider",
    },
)

# Subclasses of AttentionBackend.
ATTENTION_BACKENDS = Registry(
    "attention backend",
    {
        "cpu": "rtp_llm.srt.devices.cpu.backend:CpuAttention",
        "triton": "rtp_llm.srt.devices.cuda.attention_backend:TritonAttention",
        "torch_native": "rtp_llm.srt.attention.torch:TorchAttention",
    },
)


def register_device(name: str, target: str) -> None:
    """Make ``--device NAME`` a choice: ``target`` is a subclass of DeviceProvider, as ``module:attribute``."""
    DEVICES.register(name, target)


def register_attention_backend(name: str, target: str) -> None:
    """Make ``--attention-backend NAME`` a choice: ``target`` is a subclass of AttentionBackend."""
    ATTENTION_BACKENDS.register(name, target)
