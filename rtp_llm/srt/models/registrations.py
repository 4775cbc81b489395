"""What the caller registered, on its way to other processes."""

import pickle

from rtp_llm.srt.models.registry import ModelRegistry


class RegistrationError(TypeError):
    """A registered class cannot be sent to other processes."""


def pack_registrations() -> bytes:
    """The user's entries in ``ModelRegistry.models``: by name where a class can be imported, by value otherwise.

    Raises:
        RegistrationError: a class refers to something that cannot be sent; the message names both.
    """
    if not ModelRegistry.models:
        return b""
    import cloudpickle

    packed = {}
    for name, model_class in ModelRegistry.models.items():
        try:
            packed[name] = cloudpickle.dumps(model_class)
        except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
            raise RegistrationError(
                f"{model_class!r}, registered as {name!r}, cannot be sent to the engine's processes: {error}. Move it "
                "into a module of its own, or keep what cannot be sent out of its globals"
            ) from error
    return pickle.dumps(packed)


def unpack_registrations(packed: bytes) -> None:
    """Enters what ``pack_registrations`` gave into this process's registry."""
    if packed:
        ModelRegistry.models.update({name: pickle.loads(data) for name, data in pickle.loads(packed).items()})
