"""The client side, and the offline engine around it, against a scripted core on the other end of the link."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from made_requests import generate_request
from transformers import PreTrainedConfig

from rtp_llm.srt import checkpoint as checkpoint_module
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.entrypoints import engine as engine_module
from rtp_llm.srt.entrypoints import frontend as frontend_module
from rtp_llm.srt.entrypoints.engine import Engine
from rtp_llm.srt.managers.engine_client import EngineClient, EngineStopped
from rtp_llm.srt.messages import (
    AbortRequest,
    FinishReason,
    FlushCache,
    FlushCacheDone,
    GenerateRequest,
    Shutdown,
    TokenOutput,
)
from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.pooling import ONLY_TOKENS
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams
from rtp_llm.srt.utils.ipc import QueueClientEnd, QueueLink

ALPHABET = "abcdefghij"
BOOM = "!"  # a prompt with this character breaks the core


class CharTokenizer:
    """One id per character."""

    all_special_ids: list[int] = []
    added_tokens_decoder: dict[int, Any] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


class ScriptedCore:
    """Continues every prompt with the alphabet, one letter per step; shifted by the seed."""

    max_total_tokens = 1000
    max_req_len = 500
    context_length = 600
    info = SimpleNamespace(outputs=ONLY_TOKENS)
    latest: "ScriptedCore"

    def __init__(self, server_args: ServerArgs, model_config: Any, link: Any, on_progress: Any = None) -> None:
        if server_args.revision == "broken":
            raise OSError("no weights") from ValueError("truncated")
        if on_progress:
            on_progress(1, 2)
        self.link = link
        self.live: dict[str, tuple[GenerateRequest, int]] = {}
        self.seen: list[Any] = []
        self.is_shut_down = False
        type(self).latest = self

    def run(self) -> None:
        while self.step(block=True):
            time.sleep(0.0005)

    def step(self, block: bool) -> bool:
        messages = self.link.drain(block=block and not self.live)
        self.seen += messages
        outputs: list[Any] = []
        for message in messages:
            if isinstance(message, Shutdown):
                return False
            if isinstance(message, GenerateRequest):
                if ord(BOOM) in message.prompt_ids:
                    raise ArithmeticError("boom")
                self.live[message.rid] = (message, 0)
            elif isinstance(message, AbortRequest):
                ended = [message.rid] if message.rid else list(self.live)
                outputs += [
                    TokenOutput(rid, finish_reason=FinishReason("abort", message="aborted"))
                    for rid in ended
                    if self.live.pop(rid, None)
                ]
            elif isinstance(message, FlushCache):
                outputs.append(FlushCacheDone(message.call_id, not self.live, "busy" if self.live else ""))
        self.link.send(outputs + [self.next_letter(rid) for rid in list(self.live)])
        return True

    def next_letter(self, rid: str) -> TokenOutput:
        request, count = self.live[rid]
        letter = ord(ALPHABET[(count + request.spec.seed) % len(ALPHABET)])
        self.live[rid] = (request, count + 1)
        reason = None
        if count + 1 == request.spec.max_new_tokens:
            reason = FinishReason("length", length=count + 1)
            del self.live[rid]
        logprobs = [TokenLogprob(letter, -1.0)] if request.spec.logprobs is not None else []
        return TokenOutput(rid, [letter], logprobs, finish_reason=reason)

    def shutdown(self) -> None:
        self.is_shut_down = True


def core_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "rtp-llm-core"}


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    hf_config = PreTrainedConfig()
    config = ModelConfig(
        model_path="m",
        hf_config=hf_config,
        hf_text_config=hf_config,
        architectures=["Scripted"],
        dtype="float32",
        context_length=600,
        vocab_size=1000,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        eos_token_ids=(),
        bos_token_id=None,
    )
    monkeypatch.setattr(engine_module, "EngineCore", ScriptedCore)
    monkeypatch.setattr(checkpoint_module, "has_tokenizer", lambda _: True)
    monkeypatch.setattr(checkpoint_module, "load_tokenizer", lambda *_: CharTokenizer())
    monkeypatch.setattr(checkpoint_module.ModelConfig, "from_pretrained", lambda *_, **__: config)
    engines: list[Engine] = []
    before = core_threads()

    def make(**kwargs: Any) -> Engine:
        engines.append(Engine(model_path="m", **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()
    assert core_threads() <= before


@pytest.fixture(params=["thread", "inline"])
def engine(request: pytest.FixtureRequest, make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(inline=request.param == "inline")


def params(max_new_tokens: int = 4, **others: Any) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "seed": 0, **others}


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for 10 s"
        time.sleep(0.001)


def aborted() -> list[str | None]:
    return [message.rid for message in ScriptedCore.latest.seen if isinstance(message, AbortRequest)]


# The client alone


def request(rid: str) -> GenerateRequest:
    return generate_request(rid, [1], SamplingParams(), 0)


def test_messages_reach_whom_they_are_for() -> None:
    link = QueueLink()
    client = EngineClient(link.client)
    got: dict[str, list[Any]] = {"a": [], "b": []}
    for rid in got:
        client.submit(request(rid), got[rid].append)
    assert [message.rid for message in link.core.drain(block=True)] == ["a", "b"]
    end = FinishReason("length", length=1)
    link.core.send([TokenOutput("a", [5]), TokenOutput("b", [6], finish_reason=end), TokenOutput("z", [7])])
    link.core.send([TokenOutput("b", [8])])
    assert [output.token_ids for output in got["a"]] == [[5]]
    assert [output.token_ids for output in got["b"]] == [[6]]
    assert client.num_live == 1
    assert client._live["a"].output_ids == [5]


def test_rids_are_unique_among_live_requests() -> None:
    link = QueueLink()
    client = EngineClient(link.client)
    client.submit(request("a"), lambda _: None)
    with pytest.raises(InvalidRequest, match="rid 'a'"):
        client.submit_all([(request("b"), lambda _: None), (request("a"), lambda _: None)])
    with pytest.raises(InvalidRequest, match="rid 'c'"):
        client.submit_all([(request("c"), lambda _: None), (request("c"), lambda _: None)])
    assert len(link.core.drain(block=False)) == 1


def test_a_callback_that_raises_costs_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    """Whichever way its outputs come: from the core, on an abort, on a failure."""
    link = QueueLink()
    client = EngineClient(link.client)
    got: list[Any] = []

    def broken(_: Any) -> None:
        raise KeyError("nobody listens")

    client.submit_all([(request("a"), broken), (request("b"), got.append), (request("c"), broken)])
    link.core.send([TokenOutput("a", [5]), TokenOutput("b", [6])])
    assert link.core.drain(block=False)[3:] == [AbortRequest("a")], "nobody waits for it any more"
    assert [output.token_ids for output in got] == [[6]]
    link.core.send([TokenOutput("a", finish_reason=FinishReason("abort"))])
    assert client.num_live == 2
    client.fail_all(None)
    assert isinstance(got[-1], EngineStopped) and client.num_live == 0
    assert caplog.text.count("could not be delivered") == 3 and "nobody listens" in caplog.text


def test_a_link_that_fails_leaves_nothing_live() -> None:
    class BrokenLink(QueueClientEnd):
        def send_all(self, messages: Any) -> None:
            raise OSError("the socket is closed")

    client = EngineClient(BrokenLink(SimpleQueue()))
    with pytest.raises(OSError, match="socket"):
        client.submit_all([(request("a"), pytest.fail), (request("b"), pytest.fail)])
    assert client.num_live == 0


def test_an_observer_that_raises_leaves_nothing_running() -> None:
    link = QueueLink()
    completions = [SimpleNamespace(request=request(rid), finished=False) for rid in "ab"]
    observer = SimpleNamespace(started=lambda completion: 1 / 0)
    call = frontend_module.LiveCall(EngineClient(link.client), completions, True, [observer])
    with pytest.raises(ZeroDivisionError):
        call.submit(pytest.fail)
    assert link.core.drain(block=False)[2:] == [AbortRequest("a"), AbortRequest("b")]


def test_aborts_of_ended_requests_are_not_sent() -> None:
    link = QueueLink()
    client = EngineClient(link.client)
    client.abort("a")
    client.abort(None)
    assert link.core.drain(block=False) == []
    client.submit(request("a"), lambda _: None)
    client.abort("a")
    client.abort(None)
    assert link.core.drain(block=False)[1:] == [AbortRequest("a"), AbortRequest(None)]


def test_a_failure_ends_everything_pending_and_everything_later() -> None:
    client = EngineClient(QueueLink().client)
    got: list[Any] = []
    client.submit(request("a"), got.append)
    flush = client.start_flush()
    cause = ValueError("why")
    client.fail_all(cause)
    for error in (got[0], flush.exception(timeout=5)):
        assert isinstance(error, EngineStopped)
        assert error.__cause__ is cause
    for call in (client.flush_cache, lambda: client.submit(request("b"), got.append)):
        with pytest.raises(EngineStopped, match="ValueError: why") as caught:
            call()
        assert caught.value.__cause__ is cause


def test_link_without_a_client() -> None:
    with pytest.raises(RuntimeError, match="on_messages"):
        QueueLink().core.send([TokenOutput("a")])


# The offline engine


def test_one_prompt_gives_a_dict(engine: Engine) -> None:
    result = engine.generate("xyz", params())
    assert (result["text"], result["output_ids"]) == ("abcd", [97, 98, 99, 100])
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    assert engine.generate(input_ids=[5, 6], sampling_params=params())["text"] == "abcd"
    assert engine.generate("xyz", SamplingParams(max_new_tokens=2, seed=1))["text"] == "bc"


def test_lists_give_lists_in_order(engine: Engine) -> None:
    results = engine.generate(["x", "y"], [params(2), params(3, n=2)], rid=["p", "q"])
    assert [result["text"] for result in results] == ["ab", "abc", "bcd"]
    assert [result["meta_info"]["id"] for result in results] == ["p", "q-0", "q-1"]
    assert len(engine.generate(["x"], params())) == 1
    assert len(engine.generate("x", params(n=2))) == 2
    assert len(engine.generate(input_ids=[[5], [6, 7]], sampling_params=params())) == 2


def test_the_random_seed_makes_unseeded_requests_reproducible(make_engine: Callable[..., Engine]) -> None:
    def texts(random_seed: int) -> list[str]:
        engine = make_engine(random_seed=random_seed)
        return [result["text"] for result in engine.generate(["a", "b", "c"], {"max_new_tokens": 5})]

    assert texts(1) == texts(1) != texts(2)


def test_options_per_prompt(engine: Engine) -> None:
    results = engine.generate(
        ["x", "y"], params(), return_logprob=[True, False], token_ids_logprob=[[1, 2], None], top_logprobs_num=[1, 0]
    )
    assert "output_token_ids_logprobs" in results[0]["meta_info"]
    assert "output_token_logprobs" not in results[1]["meta_info"]
    both = engine.generate(["x", "y"], params(), return_logprob=True, token_ids_logprob=[1, 2])
    assert all("output_token_ids_logprobs" in result["meta_info"] for result in both)


def test_streams_are_cumulative(engine: Engine) -> None:
    results = list(engine.generate("x", params(3), stream=True))
    assert [result["text"] for result in results] == ["a", "ab", "abc"]
    assert [len(result["output_ids"]) for result in results] == [1, 2, 3]
    assert "index" not in results[0]
    last = {result["index"]: result["text"] for result in engine.generate(["x", "y"], params(n=2), stream=True)}
    assert last == {0: "abcd", 1: "bcde", 2: "abcd", 3: "bcde"}


def test_a_stop_string_ends_the_request_in_the_core(engine: Engine) -> None:
    result = engine.generate("x", params(400, stop=["def"]), rid="r")
    assert (result["text"], result["output_ids"]) == ("abc", [97, 98, 99])
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": "def"}
    engine.generate("x", params(1))  # lets an inline core read its mail
    assert aborted() == ["r"]


def test_leaving_a_stream_ends_its_request(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    stream = engine.generate("x", params(400), stream=True, rid="closed")
    next(stream)
    stream.close()
    for _ in islice(engine.generate(["x", "y"], params(400), stream=True, rid=["dropped", "too"]), 2):
        pass
    engine.generate("x", params(400), stream=True, rid="unread")
    gc.collect()
    eventually(lambda: not ScriptedCore.latest.live)
    assert aborted() == ["closed", "dropped", "too", "unread"]


def test_streams_run_side_by_side_from_the_start(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    streams = [engine.generate("x", params(300), stream=True) for _ in range(3)]
    eventually(lambda: len(ScriptedCore.latest.live) == 3)
    for stream in streams:
        stream.close()


def test_an_interrupt_ends_what_was_submitted(make_engine: Callable[..., Engine], monkeypatch: Any) -> None:
    engine = make_engine()
    get = engine._runner.next_item
    calls = iter(range(10))

    def interrupted(queue: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return get(queue)

    monkeypatch.setattr(engine._runner, "next_item", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["x", "y"], params(400), rid=["p", "q"])
    eventually(lambda: aborted() == ["p", "q"])
    monkeypatch.undo()


def test_nothing_is_submitted_if_one_of_a_list_is_wrong(engine: Engine) -> None:
    for prompts, options, words in [
        (["x", "y" * 601], {}, "prompt 1: .*601 tokens"),
        (["x", 5], {}, "prompt 1: .*string"),
        (["x", "y"], {"sampling_params": [{}]}, "sampling_params is a list of 1 values for 2 prompts"),
        (["x", "y"], {"rid": "r"}, "rid must be a list of 2"),
        (["x", "y"], {"rid": ["r", "r"]}, "rid 'r'"),
        ([], {}, "empty list"),
    ]:
        with pytest.raises(InvalidRequest, match=words):
            engine.generate(prompts, **options)
    for options in ({}, {"prompt": "x", "input_ids": [1]}):
        with pytest.raises(InvalidRequest, match="either prompt or input_ids"):
            engine.generate(**options)
    with pytest.raises(InvalidRequest, match="list of token ids"):
        engine.generate(input_ids=[[1], 2])
    engine.generate("x", params(1))
    assert len([message for message in ScriptedCore.latest.seen if isinstance(message, GenerateRequest)]) == 1


def test_a_taken_rid_disturbs_nobody(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    stream = engine.generate("x", params(30), stream=True, rid="r")
    with pytest.raises(InvalidRequest, match="rid 'r'"):
        engine.generate("y", params(), rid="r")
    assert len(list(stream)) == 30


def test_abort_from_elsewhere(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    stream = engine.generate("x", params(400), stream=True, rid="r")
    next(stream)
    engine.abort("r")
    *_, last = stream
    assert last["meta_info"]["finish_reason"]["type"] == "abort"


def test_flush(make_engine: Callable[..., Engine], engine: Engine) -> None:
    assert engine.flush_cache() == (True, "")
    busy = make_engine()
    stream = busy.generate("x", params(400), stream=True)
    result = busy.flush_cache()
    assert not result
    assert result.message == "busy"
    stream.close()


def test_many_threads(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: engine.generate("x", params(i + 1)), range(24)))
    assert [len(result["text"]) for result in results] == list(range(1, 25))


def test_async(engine: Engine) -> None:
    async def stream() -> list[str]:
        results = await engine.async_generate("x", params(3), stream=True)
        assert isinstance(results, AsyncIterator)
        return [result["text"] async for result in results]

    async def main() -> None:
        one, many, texts = await asyncio.gather(
            engine.async_generate("x", params()), engine.async_generate(["x", "y"], params(2)), stream()
        )
        assert one["text"] == "abcd"
        assert [result["text"] for result in many] == ["ab", "ab"]
        assert texts == ["a", "ab", "abc"]
        with pytest.raises(InvalidRequest):
            await engine.async_generate("")

    asyncio.run(main())


def test_several_event_loops(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()

    async def main() -> int:
        results = await asyncio.gather(*(engine.async_generate("x", params(9)) for _ in range(3)))
        return sum(len(result["text"]) for result in results)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda _: asyncio.run(main()), range(8))) == 8 * 3 * 9


def test_cancelling_ends_the_request(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.async_generate("x", params(499), rid="waited"), 0.02)
        async for _ in await engine.async_generate("x", params(499), stream=True, rid="left"):
            break

    asyncio.run(main())
    eventually(lambda: aborted() == ["waited", "left"])


def test_an_event_loop_that_is_gone(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(engine.async_generate("x", params(499), stream=True, rid="r"))
    loop.close()
    eventually(lambda: "r" in aborted() and not ScriptedCore.latest.live)
    assert engine.generate("x", params(1))["text"] == "a"
    del stream


def test_a_core_that_fails(engine: Engine) -> None:
    with pytest.raises((EngineStopped, ArithmeticError), match="boom"):
        engine.generate("x" + BOOM)
    for call in (lambda: engine.generate("x"), engine.flush_cache):
        with pytest.raises(EngineStopped, match="ArithmeticError: boom") as caught:
            call()
        assert isinstance(caught.value.__cause__, ArithmeticError)
    assert engine._client.num_live == 0
    engine.shutdown()
    assert ScriptedCore.latest.is_shut_down


def test_a_core_that_fails_fails_all_who_wait(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(engine.generate, "x", params(499)) for _ in range(2)]
        eventually(lambda: len(ScriptedCore.latest.live) == 2)
        pool.submit(engine.generate, BOOM)
        for future in waiting:
            error = future.exception(timeout=10)
            assert isinstance(error, EngineStopped)
            assert isinstance(error.__cause__, ArithmeticError)


@pytest.mark.parametrize("inline", [False, True])
def test_a_core_that_cannot_be_built(make_engine: Callable[..., Engine], inline: bool) -> None:
    before = core_threads()
    with pytest.raises(OSError, match="no weights") as caught:
        make_engine(inline=inline, revision="broken")
    assert isinstance(caught.value.__cause__, ValueError)
    assert core_threads() <= before


def test_shutdown(engine: Engine) -> None:
    stream = engine.generate("x", params(400), stream=True)
    next(stream)
    with engine:
        pass
    engine.shutdown()
    assert ScriptedCore.latest.is_shut_down
    for call in (lambda: list(stream), lambda: engine.generate("x"), engine.flush_cache):
        with pytest.raises(EngineStopped, match="has been shut down"):
            call()
    engine.abort()


def test_a_forgotten_engine_ends_its_thread(make_engine: Callable[..., Engine]) -> None:
    engine = Engine(model_path="m")
    core = ScriptedCore.latest
    del engine
    gc.collect()
    eventually(lambda: core.is_shut_down)


def test_a_forked_process_is_refused_instead_of_waiting_forever(engine: Engine) -> None:
    engine._pid += 1  # as a forked process sees it
    for call in (lambda: engine.generate("x"), engine.flush_cache):
        with pytest.raises(EngineStopped, match="forked from the engine's"):
            call()


def test_arguments(make_engine: Callable[..., Engine]) -> None:
    seen: list[tuple[int, int]] = []
    engine = make_engine(max_running_requests=3, on_progress=lambda *progress: seen.append(progress))
    assert seen == [(1, 2)]
    assert engine.info["log_level"] == "error"
    assert engine.info["max_running_requests"] == 3
    assert engine.info["max_total_num_tokens"] == 1000
    assert engine.info["max_req_len"] == 500
    with Engine(server_args=ServerArgs(model_path="m")) as other:
        assert other.info["log_level"] == "info"
    with pytest.raises(TypeError, match="not both"):
        make_engine(server_args=ServerArgs(model_path="m"))
    with pytest.raises(ServerArgsError, match="did you mean 'tp_size'"):
        make_engine(tpsize=1)
