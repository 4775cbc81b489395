"""The link between processes: every message arrives as it was sent, and nothing after the end."""

import queue
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
from made_requests import LOGPROBS, generate_request

from rtp_llm.srt import messages
from rtp_llm.srt.managers.engine_client import EngineClient
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
from rtp_llm.srt.request_spec import LogprobSpec, PromptMedia
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams
from rtp_llm.srt.utils.zmq_link import MessageCodec, ZmqClientEnd, ZmqCoreEnd, socket_addresses

TO_CORE, FROM_CORE = get_args(messages.ToCore), get_args(messages.FromCore)

PARAMS = SamplingParams(
    max_new_tokens=None, temperature=0.3, logit_bias={5: -1.5, 7: 100.0}, stop=["é\n", "</s>"], stop_token_ids=[1, 2]
)
SENT = [
    generate_request("r", [1, 2**31], PARAMS, seed=2**64 - 1, output_ids=[3], return_logprob=True, logprob_start_len=0),
    generate_request("leer", [0], return_logprob=True, token_ids_logprob=(9,), eos_token_ids=(1, 2), cache_salt="Ω"),
    generate_request("media", [7, 7], media=PromptMedia(b"\x00m", [2**61, 3], [(0, 1)])),
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


UNSENDABLE = {
    "seed": 2**64,
    "prompt_ids": [2**70],
    "rid": "\ud800",
    "cache_salt": "lone \udfff",
    "top_logprobs_num": object(),
    "logprob_start_len": 0.5,  # written, but the core could not read it
    "num_prompt_logprobs": "yes",
    "token_ids_logprob": (None,),
    "params": SamplingParams(),
}


def unsendable(name: str) -> GenerateRequest:
    request = generate_request("bad", [1], return_logprob=True)
    value = UNSENDABLE[name]
    if name == "params":
        request.spec.params.stop = ["\ud800"]
    elif name in LOGPROBS:
        request.spec = replace(request.spec, logprobs=LogprobSpec(**{name: value}))
    elif hasattr(request.spec, name):
        request.spec = replace(request.spec, **{name: value})
    else:
        setattr(request, name, value)
    return request


@pytest.mark.parametrize("name", UNSENDABLE)
def test_what_the_core_could_not_read_is_never_sent(directory: str, name: str) -> None:
    """Neither it nor the rest of its batch is live then, and whoever submits is told."""
    link = ZmqClientEnd(directory, TO_CORE, FROM_CORE)
    client = EngineClient(link)
    core = ZmqCoreEnd(directory, TO_CORE, FROM_CORE)
    good = [generate_request(rid, [1], SamplingParams(), seed=0) for rid in ("first", "last", "after")]
    try:
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            client.submit_all([(item, pytest.fail) for item in (good[0], unsendable(name), good[1])])
        assert client.num_live == 0
        client.submit_all([(good[2], pytest.fail)])
        assert core.drain(block=True) == [good[2]] and core.drain(block=False) == []
    finally:
        core.close()
        link.close()


def test_what_cannot_be_sent_again_costs_nobody_else(directory: str) -> None:
    """A request that came while no core was there, or whose rest cannot be sent to the next core."""
    came: dict[str, list[Any]] = {rid: [] for rid in ("good", "bad")}
    client = EngineClient()
    client.submit_all([(unsendable("seed"), came["bad"].append)])
    client.submit(generate_request("good", [1], SamplingParams(), seed=0), came["good"].append)
    link = ZmqClientEnd(directory, TO_CORE, FROM_CORE)
    core = ZmqCoreEnd(directory, TO_CORE, FROM_CORE)
    try:
        client.attach(link)
        assert [message.rid for message in core.drain(block=True)] == ["good"]
        (output,) = came["bad"]
        assert (output.finish_reason.type, output.finish_reason.status_code) == ("abort", 400)
        assert client.num_live == 1 and came["good"] == []
    finally:
        core.close()
        link.close()


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
