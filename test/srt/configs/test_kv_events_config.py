"""The option --kv-events-config."""

import pytest

from rtp_llm.srt.configs.kv_events import KvEventsConfig, parse_kv_events_config
from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.srt.configs.server_args import ServerArgs


@pytest.mark.parametrize(
    "text",
    [None, "{}", '{"publisher": "null"}', '{"enable_kv_cache_events": false, "publisher": "zmq"}', '{"topic": "kv"}'],
)
def test_off(text: str | None):
    assert parse_kv_events_config(text) is None


@pytest.mark.parametrize("text", ['{"enable_kv_cache_events": true}', '{"publisher": "zmq"}'])
def test_on_with_the_defaults_of_vllm(text: str):
    config = parse_kv_events_config(text)
    assert config is not None and (config.endpoint, config.replay_endpoint) == ("tcp://*:5557", None)
    assert (config.buffer_steps, config.hwm, config.max_queue_size, config.topic) == (10_000, 100_000, 100_000, "")


def test_every_entry():
    text = (
        '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:1", "replay_endpoint": "ipc://x", '
    )
    text += '"buffer_steps": 2, "hwm": 3, "max_queue_size": 4, "topic": "t"}'
    assert parse_kv_events_config(text) == KvEventsConfig(True, "zmq", "tcp://*:1", "ipc://x", 2, 3, 4, "t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zmq", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"endpont": "x"}', "unknown entry 'endpont'.*endpoint"),
        ('{"publisher": "nats"}', "publisher must be null or zmq, got 'nats'"),
        ('{"endpoint": "http://x"}', "endpoint must be an address such as"),
        ('{"hwm": 0}', "hwm must be a positive number, got 0"),
        ('{"hwm": true}', "hwm must be a positive number, got True"),
        ('{"enable_kv_cache_events": 1}', "must be true or false, got 1"),
        ('{"topic": null}', "topic must be a text"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str):
    with pytest.raises(ServerArgsError, match=message):
        ServerArgs(kv_events_config=text)


def test_there_must_be_a_cache():
    with pytest.raises(ServerArgsError, match="leave disable_radix_cache out"):
        ServerArgs(kv_events_config='{"publisher": "zmq"}', disable_radix_cache=True)
