"""The caller's registrations (models, devices, attention back ends), packed for other processes."""

import pickle

from rtp_llm.srt.device.registry import ATTENTION_BACKENDS, DEVICES
from rtp_llm.srt.models.registry import Entry, ModelRegistry

TARGETS = (DEVICES, ATTENTION_BACKENDS)


class RegistrationError(TypeError):
    """A registered class cannot be sent to other processes, or does not arrive there."""


def pack_registrations() -> bytes:
    """Pack the entries set in ``ModelRegistry.models`` (importable classes by name, others by value), and the targets
    of added devices and attention back ends.

    The environment and installed packages are not included: other processes find them as this one does.

    Raises:
        RegistrationError: a class refers to something that cannot be sent; the message names both.
    """
    models = {name: _pack(name, entry) for name, entry in ModelRegistry.models.overrides.items()}
    added = [registry.added for registry in TARGETS]
    return pickle.dumps((models, added)) if models or any(added) else b""


def _pack(name: str, entry: Entry) -> bytes:
    import cloudpickle

    try:
        return cloudpickle.dumps(entry)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        raise RegistrationError(
            f"{entry!r}, registered as {name!r}, cannot be sent to the engine's processes: {error}. Move it "
            "into a module of its own, or keep what cannot be sent out of its globals"
        ) from error


def pack_by_value(value: object) -> bytes:
    """Pack an object whose class may be one that only this process has, such as a model file's configuration;
    ``pickle.loads`` unpacks it, once the registrations are unpacked."""
    import cloudpickle

    return cloudpickle.dumps(value)


def unpack_registrations(packed: bytes) -> None:
    """Enter packed registrations into this process's registries.

    Raises:
        RegistrationError: a class cannot be imported here.
    """
    if packed:
        models, added = pickle.loads(packed)
        for registry, targets in zip(TARGETS, added, strict=True):
            registry.added.update(targets)
        ModelRegistry.models.overrides.update({name: _unpack(name, data) for name, data in models.items()})


def _unpack(name: str, data: bytes) -> Entry:
    try:
        return pickle.loads(data)
    except Exception as error:  # whatever importing the class's module may raise; the cause is chained
        raise RegistrationError(
            f"the class registered as {name!r} cannot be imported in an engine process: {type(error).__name__}: "
            f"{error}. Its module must be one that Python finds on sys.path"
        ) from error
