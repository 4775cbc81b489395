"""Which devices and attention back ends there are, by name. What a name stands for is imported when it is asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


class Registry:
    """Names and where each is found: ``module:attribute``."""

    def __init__(self, kind: str, own: Mapping[str, str]) -> None:
        self._kind = kind
        self._own = dict(own)
        self.added: dict[str, str] = {}  # from outside of this package; these travel to the engine's processes

    def register(self, name: str, target: str) -> None:
        """Add a name, or give it another meaning.

        Raises:
            ValueError: ``target`` is not of the form ``module:attribute``.
        """
        module, _, attribute = target.partition(":")
        if not (module and attribute.isidentifier()):
            raise ValueError(f"the {self._kind} {name!r} must be found at 'module:attribute', not at {target!r}")
        self.added[name] = target

    def own_names(self) -> tuple[str, ...]:
        """This package's, the preferred ones first."""
        return tuple(self._own)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted({*self._own, *self.added}))

    def target(self, name: str) -> str:
        """Where the name is found.

        Raises:
            ValueError: it is not known.
        """
        found = self.added.get(name) or self._own.get(name)
        if found is None:
            raise ValueError(f"unknown {self._kind} {name!r}; have {list(self.names())}")
        return found

    def load(self, name: str) -> Any:
        """What the name stands for; raises ValueError as ``target`` does, and what importing its module raises."""
        return load_target(self.target(name))


def load_target(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


# Classes of DeviceProvider. Where no device is asked for, the first that is usable is taken.
DEVICES = Registry(
    "device",
    {
        "cuda": "rtp_llm.srt.devices.cuda.provider:CudaProvider",
        "cpu": "rtp_llm.srt.devices.cpu.provider:CpuProvider",
        "reference": "rtp_llm.srt.devices.reference.provider:ReferenceProvider",
    },
)

# Classes of AttentionBackend.
ATTENTION_BACKENDS = Registry(
    "attention backend",
    {
        "cpu": "rtp_llm.srt.devices.cpu.backend:CpuAttention",
        "torch_native": "rtp_llm.srt.attention.torch:TorchAttention",
    },
)


def register_device(name: str, target: str) -> None:
    """Make ``--device NAME`` a choice: ``target`` is a subclass of DeviceProvider, as ``module:attribute``."""
    DEVICES.register(name, target)


def register_attention_backend(name: str, target: str) -> None:
    """Make ``--attention-backend NAME`` a choice: ``target`` is a subclass of AttentionBackend."""
    ATTENTION_BACKENDS.register(name, target)
