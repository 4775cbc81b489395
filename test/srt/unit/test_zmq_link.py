"""The link between processes: every message arrives as it was sent, and nothing after the end."""

import queue
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from rtp_llm.srt import messages
from rtp_llm.srt.messages import (
    AbortRequest,
    CoreStats,
    FinishReason,
    FlushCache,
    FlushCacheDone,
    GenerateRequest,
    Ping,
    Shutdown,
    TokenOutput,
)
from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.utils.zmq_link import MessageCodec, ZmqClientEnd, ZmqCoreEnd, socket_addresses

TO_CORE, FROM_CORE = get_args(messages.ToCore), get_args(messages.FromCore)

PARAMS = SamplingParams(
    max_new_tokens=None, temperature=0.3, logit_bias={5: -1.5, 7: 100.0}, stop=["é\n", "</s>"], stop_token_ids=[1, 2]
)
SENT = [
    GenerateRequest("r", [1, 2**31], PARAMS, seed=2**64 - 1, output_ids=[3], return_logprob=True, logprob_start_len=0),
    GenerateRequest("leer", [0], SamplingParams(), seed=0, token_ids_logprob=[9], cache_salt="Ω"),
    AbortRequest("r"),
    AbortRequest(None),
    FlushCache("call"),
    Ping(),
    Shutdown(),
]
ANSWERED = [
    TokenOutput("r", [7, 8], [TokenLogprob(7, -0.5, [(-0.1, 3), (float("-inf"), 4)], [(-2.0, 9)])], cached_tokens=3),
    TokenOutput("r", finish_reason=FinishReason("stop", matched="ende")),
    TokenOutput("r", finish_reason=FinishReason("stop", matched=2)),
    TokenOutput("r", finish_reason=FinishReason("abort", message="x", status_code=500)),
    FlushCacheDone("call", False, "busy"),
    CoreStats(num_running=3, token_usage=0.5),
]


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        yield directory


@pytest.mark.parametrize(("classes", "samples"), [(TO_CORE, SENT), (FROM_CORE, ANSWERED)])
def test_every_message_survives_encoding(classes: tuple[type, ...], samples: list[Any]) -> None:
    codec = MessageCodec(classes)
    assert [codec.decode(codec.encode(message)) for message in samples] == samples
    assert {type(message) for message in samples} == set(classes), "a kind of message has no sample here"


def test_both_ends(directory: str) -> None:
    client = ZmqClientEnd(directory, TO_CORE, FROM_CORE)
    for message in SENT:
        client.send(message)  # before there is a core: nothing blocks, nothing is lost
    received: queue.SimpleQueue = queue.SimpleQueue()
    client.on_messages(received.put)
    core = ZmqCoreEnd(directory, TO_CORE, FROM_CORE)
    got: list[Any] = []
    while len(got) < len(SENT):
        got += core.drain(block=True)
    assert got == SENT
    assert core.drain(block=False) == []
    core.send([])
    core.send(ANSWERED[:4])
    core.send(ANSWERED[4:])
    assert received.get(timeout=5) == ANSWERED[:4]
    assert received.get(timeout=5) == ANSWERED[4:]
    core.close()
    client.close()
    client.close()
    client.send(Ping())  # goes nowhere, harms nobody
    assert not any(thread.name == "rtp-llm-link" for thread in threading.enumerate())


def test_closing_before_anyone_listens(directory: str) -> None:
    ZmqClientEnd(directory, TO_CORE, FROM_CORE).close()


def test_a_directory_name_that_leaves_no_room() -> None:
    with pytest.raises(OSError, match="TMPDIR"):
        socket_addresses("/tmp/" + "x" * 100)
