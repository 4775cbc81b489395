"""``--kv-events-config``: whether and where events of the prefix cache are published. The JSON object is vLLM's."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

from rtp_llm.srt.configs.options import ServerArgsError, nearest

OPTION = "kv_events_config"


@dataclass(frozen=True, slots=True)
class KvEventsConfig:
    """Where events are published, and how many are kept.

    An address with ``*`` or ``::``, and one of ipc or inproc, is bound; another is connected to. To a tcp port the
    data-parallel rank is added; port 0 takes a free one.
    """

    enable_kv_cache_events: bool | None = None  # None: if the publisher is zmq
    publisher: str | None = None  # None: zmq if events are enabled
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000  # batches kept for replay
    hwm: int = 100_000  # batches that wait for one subscriber; it misses those beyond
    max_queue_size: int = 100_000  # batches that wait to be sent
    topic: str = ""

    @property
    def is_on(self) -> bool:
        publishes = self.publisher in (None, "zmq")
        asked = self.publisher == "zmq" if self.enable_kv_cache_events is None else self.enable_kv_cache_events
        return publishes and asked


def parse_kv_events_config(text: str | None) -> KvEventsConfig | None:
    """Return the configuration; None if nothing is to be published.

    Raises:
        ServerArgsError: it is no JSON object of these entries.
    """
    if text is None:
        return None
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ServerArgsError(f"{OPTION} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ServerArgsError(f'{OPTION} must be a JSON object such as {{"enable_kv_cache_events": true}}, got {text}')
    config = _checked(given)
    return config if config.is_on else None


def _checked(given: dict) -> KvEventsConfig:
    names = [field.name for field in dataclasses.fields(KvEventsConfig)]
    for name, value in given.items():
        if name not in names:
            raise ServerArgsError(f"{OPTION} has an unknown entry {name!r}{nearest(name, names)}")
        wanted, is_right = ENTRIES[name]
        if not is_right(value):
            raise ServerArgsError(f"{OPTION}: {name} must be {wanted}, got {value!r}")
    return KvEventsConfig(**given)


def _is_address(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("tcp://", "ipc://", "inproc://"))


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


# What each entry must be, in words and as a test.
ENTRIES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "enable_kv_cache_events": ("true or false", lambda value: value is None or isinstance(value, bool)),
    "publisher": ("null or zmq", lambda value: value in (None, "null", "zmq")),
    "endpoint": ("an address such as tcp://*:5557", _is_address),
    "replay_endpoint": ("an address such as tcp://*:5558", lambda value: value is None or _is_address(value)),
    "buffer_steps": ("a positive number", _is_count),
    "hwm": ("a positive number", _is_count),
    "max_queue_size": ("a positive number", _is_count),
    "topic": ("a text", lambda value: isinstance(value, str)),
}
