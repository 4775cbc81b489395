"""The loop over a real model: any depth gives the same tokens, and a failure reaches whoever waits."""

import subprocess
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, cast

import pytest
import torch
from made_requests import generate_request, request_spec
from stepped_core import Core, mixed_requests
from token_masks import masks_of

from rtp_llm.srt.attention.backends import make_backend
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import choose_device, provider_named
from rtp_llm.srt.engine.executor import InProcessExecutor, MultiProcessExecutor, WorkerError
from rtp_llm.srt.messages import AbortRequest, CoreStats, Ping, Shutdown
from rtp_llm.srt.plan import Admission, PageWrite, RowWork, StepPlan, StepResult
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.utils.ipc import receive, send
from rtp_llm.srt.worker.process import RankServer
from rtp_llm.srt.worker.sampler import draw
from rtp_llm.srt.worker.worker import WorkerConfig
from tiny_models import TINY_MODELS, random_prompts, tiny_model

MODELS = ["llama-default", "qwen3-mixed-window7-tied", "llama-dynamic-mlp-bias"]


@pytest.mark.parametrize("name", MODELS)
def test_every_depth_gives_the_same_tokens(name):
    requests = mixed_requests(TINY_MODELS[name].vocab_size)
    expected = Core(name).run(requests)
    assert len(expected) == len(requests) and all(expected.values())
    for depth, delayed, tokens in [(1, True, 2000), (1, False, 2000), (0, True, 2000), (1, True, 125)]:
        core = Core(name, depth, delayed, max_total_tokens=tokens)
        assert core.run(requests) == expected, f"depth {depth}, delayed {delayed}, {tokens} tokens of cache"
        if tokens == 125:
            assert core.core.scheduler.stats.retractions > 0
        for rid, outputs in core.outputs.items():
            logprobs = [entry.token_id for output in outputs for entry in output.logprobs]
            assert logprobs == ([] if int(rid[1:]) % 3 else expected[rid])


def test_options_reach_the_part_that_they_are_for():
    options = {"max_prefill_tokens": 33, "schedule_policy": "lpm", "disable_radix_cache": True}
    core = Core("qwen3-mixed-window7-tied", **options, swa_full_tokens_ratio=0.5).core
    assert {name: getattr(core.scheduler.config, name) for name in options} == options
    assert core.scheduler.config.max_running_requests == 32
    assert core.scheduler.config.chunked_prefill_size == 16
    assert sorted(core.capacity.num_pages) == [1000, 2000]


def test_a_draw_is_keyed_by_the_seed_and_the_place_in_the_sequence():
    params = SamplingParams(max_new_tokens=16, temperature=1.0, ignore_eos=True)
    prompt, vocab_size = [5, 9, 2, 40], TINY_MODELS["llama-default"].vocab_size
    core = Core("llama-default")
    core.run([generate_request("r", prompt, params, seed=77, return_logprob=True, top_logprobs_num=vocab_size)])
    entries = [entry for output in core.outputs["r"] for entry in output.logprobs]
    assert len(entries) == 16
    for place, entry in enumerate(entries, start=len(prompt)):
        logits = torch.empty(1, vocab_size)
        for logprob, token_id in entry.top:
            logits[0, token_id] = logprob
        assert draw(logits, [params], torch.tensor([77]), torch.tensor([place]), provider_named("cpu")).tolist() == [
            entry.token_id
        ]


@pytest.mark.parametrize("depth", [0, 1])
def test_an_abort_ends_one_request_and_no_other(depth):
    name = "llama-default"
    requests = [
        generate_request(f"r{i}", prompt, SamplingParams(max_new_tokens=30, temperature=0, ignore_eos=True), seed=0)
        for i, prompt in enumerate(random_prompts(131, (9, 8, 7)))
    ]
    expected = Core(name).run(requests)
    core = Core(name, depth, delayed=True)
    for request in requests:
        core.link.client.send(request)
    for _ in range(6):
        core.core.step(block=False)
    core.link.client.send(AbortRequest("r1"))
    ids = core.run([])
    assert ids["r0"] == expected["r0"] and ids["r2"] == expected["r2"]
    assert core.outputs["r1"][-1].finish_reason.type == "abort"
    assert ids["r1"] == expected["r1"][: len(ids["r1"])] and len(ids["r1"]) < 30


def test_a_ping_is_answered_by_the_core_itself():
    core = Core("llama-default")
    requests = mixed_requests(TINY_MODELS["llama-default"].vocab_size)[:2]
    stats = []
    core.link.client.on_messages(lambda messages: (core.take(messages), stats.extend(messages)))
    for message in (Ping(), *requests, Ping()):
        core.link.client.send(message)
        core.core.step(block=False)
    while not core.core.scheduler.idle:
        core.core.step(block=False)
    assert len(core.outputs) == 2 and sum(isinstance(message, CoreStats) for message in stats) >= 2
    core.close()


def test_shutdown_ends_the_loop():
    core = Core("llama-default")
    core.link.client.send(Shutdown())
    core.core.run()
    core.core.shutdown()


@pytest.mark.usefixtures("warm_processes")
def test_a_worker_process_computes_while_the_next_step_is_planned():
    name = "qwen3-mixed-window7-tied"
    requests = mixed_requests(TINY_MODELS[name].vocab_size)
    inline = Core(name, depth=1, delayed=True, max_total_tokens=125)
    expected = inline.run(requests)  # with as many threads as the process: last digits depend on them
    apart = Core(name, depth=1, processes=True, max_total_tokens=125)
    in_flight, submit = [], apart.executor.submit

    def watched(plan: StepPlan) -> Any:
        step = submit(plan)
        in_flight.append(len(apart.executor._in_flight))
        return step

    apart.executor.submit = watched
    try:
        assert apart.run(requests) == expected
    finally:
        apart.close()
    assert max(in_flight) == 2 and apart.core.scheduler.stats.retractions > 0
    assert apart.logprobs() == inline.logprobs()


def make_executor(name: str, kind: str) -> Any:
    args = ServerArgs(model_path=tiny_model(name), device="cpu", dtype="float32", tp_size=1)
    config = WorkerConfig(args, ModelConfig.from_pretrained(args.model_path), "cpu")
    executor = (
        MultiProcessExecutor(config, 60.0, 1) if kind == "process" else InProcessExecutor(config, 1, kind == "late")
    )
    loaded = executor.load()
    assert loaded.weight_bytes > 0 and len(loaded.layout.groups) == 1
    executor.init_cache([64], 4, 64)
    return executor


def first_plan(**kwargs: Any) -> StepPlan:
    params = SamplingParams(temperature=0, max_new_tokens=4)
    admission = Admission(2, "r", [5, 6, 7], [], request_spec(params))
    return StepPlan(0, [], [admission], [PageWrite(2, 0, 0, [9, 3, 7, 11])], [RowWork(2, 0, 3, True)], **kwargs)


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("kind", ["at once", "late", "process"])
def test_masks_come_between_forward_and_draw(kind):
    executor = make_executor("llama-default", kind)
    try:
        free = executor.submit(first_plan()).result().rows[0].token_ids[0]
        again = StepPlan(1, releases=[2])
        again.admissions, again.work, again.masked_rows = first_plan().admissions, first_plan().work, [2]
        step = executor.submit(again)
        with pytest.raises(RuntimeError, match="masks"):
            step.result()
        executor.sample(masks_of([2], [[17]], 131))
        assert step.result().rows[0].token_ids == [17] != [free]
        # The drawn token is where the next step takes it from.
        later = executor.submit(StepPlan(2, work=[RowWork(2, 3, 1, True)])).result()
        assert len(later.rows[0].token_ids) == 1
    finally:
        executor.shutdown()


def decode_plan(step_id: int, **kwargs: Any) -> StepPlan:
    """The row of ``first_plan`` goes on; its first step drew token 3."""
    return StepPlan(step_id, work=[RowWork(2, 2 + step_id, 1, True)], **kwargs)


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("kind", ["at once", "late", "process"])
def test_two_steps_are_in_flight(kind):
    alone = make_executor("llama-default", "at once")
    plans = [first_plan(), *(decode_plan(i) for i in range(1, 4))]
    expected = [alone.submit(plan).result() for plan in plans]
    executor = make_executor("llama-default", kind)
    try:
        first, second = executor.submit(plans[0]), executor.submit(plans[1])
        assert executor.rpc("loaded") == [alone.worker.loaded()]  # an answer of its own, whatever is in flight
        assert [first.result(), second.result()] == expected[:2]
        third, masked = executor.submit(plans[2]), executor.submit(decode_plan(3, masked_rows=[2]))
        with pytest.raises(ValueError, match=r"step 3 needs a mask for rows \[2\] too"):
            executor.sample(masks_of([], [], 131))
        assert third.result() == expected[2]
        with pytest.raises(RuntimeError, match=r"step 3 waits for the masks of rows \[2\]"):
            masked.result()
        executor.sample(masks_of([2], [[17]], 131))
        assert masked.result().rows[0].token_ids == [17] != expected[3].rows[0].token_ids
    finally:
        executor.shutdown()


@pytest.mark.usefixtures("warm_processes")
def test_whichever_step_in_flight_fails_everyone_who_asks_is_told_why():
    executor = make_executor("llama-default", "process")
    steps = [executor.submit(first_plan())]
    try:
        with pytest.raises(WorkerError, match=r"^the worker of rank 0 failed: KeyError: 3"):
            steps.append(executor.submit(StepPlan(1, releases=[3])))  # nobody was admitted there
            steps[0].result()
        for ask in (
            *(step.result for step in steps),
            lambda: executor.rpc("loaded"),
            lambda: executor.sample(masks_of([], [], 131)),
        ):
            with pytest.raises(WorkerError, match=r"^the worker of rank 0 failed: KeyError: 3"):
                ask()
    finally:
        executor.shutdown()


def test_nothing_but_a_result_is_answered_and_waited_for():
    """A rank hears of the next step before it waits for the one before."""
    events: list[Any] = []

    class Pending:
        def __init__(self, plan: StepPlan) -> None:
            self.plan = plan

        def result(self) -> str:
            events.append(("waited for", self.plan.step_id))
            return f"result of {self.plan.step_id}"

    class FakeWorker:
        def forward(self, plan: StepPlan) -> Pending:
            events.append(("launched", plan.step_id))
            return Pending(plan)

        def sample(self, pending: Pending, masks: Any) -> Pending:
            return pending

    for rank, answer in [(0, "result of 0"), (1, None)]:  # rank 0 answers for all
        events.clear()
        server = RankServer(cast(Any, FakeWorker()), rank)
        for step_id in (0, 1):
            assert server.call("submit", (StepPlan(step_id),)) is None
        assert events == [("launched", 0), ("launched", 1)]
        assert server.call("result", ()) == answer
        assert events[2:] == [("waited for", 0)]


@pytest.mark.usefixtures("warm_processes")
def test_a_worker_process_that_fails_says_why():
    executor = make_executor("llama-default", "process")
    with pytest.raises(WorkerError, match=r"^the worker of rank 0 failed: AttributeError: .*no_such_method") as failure:
        executor.rpc("no_such_method")
    assert "\n" not in str(failure.value) and "Traceback" in failure.value.__notes__[0]
    executor.shutdown()


def test_a_worker_process_that_dies_is_noticed():
    executor = make_executor("llama-default", "process")
    executor._processes[0].kill()
    executor._processes[0].wait()
    with pytest.raises(WorkerError, match="rank 0 died with exit code -9"):
        executor.submit(first_plan()).result()
    executor.shutdown()
    assert not executor._processes


@pytest.fixture
def two_ranks() -> Iterator[tuple[MultiProcessExecutor, list[Connection]]]:
    """An executor whose ranks do nothing, and the ends of the pipes that they would answer by."""
    args = ServerArgs(model_path=tiny_model("llama-tp"), device="cpu", tp_size=2)
    executor = MultiProcessExecutor(WorkerConfig(args, ModelConfig.from_pretrained(args.model_path), "cpu"), 60.0)
    pairs = [Pipe() for _ in range(2)]
    executor._pipes = [ours for ours, _ in pairs]
    executor._processes = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    yield executor, [theirs for _, theirs in pairs]
    for process in executor._processes:
        process.kill()
    executor.shutdown()


def test_results_are_asked_for_in_order_and_rank_0_answers(two_ranks):
    executor, pipes = two_ranks
    with pytest.raises(RuntimeError, match="no step is in flight"):
        executor.sample({})
    first, second = executor.submit(StepPlan(0)), executor.submit(StepPlan(1))
    with pytest.raises(RuntimeError, match="in the order of submission"):
        second.result()
    for step in (first, second):
        for pipe, answer in zip(pipes, (StepResult(step.plan.step_id, []), None), strict=True):
            send(pipe, ("result", answer))
        assert step.result() == StepResult(step.plan.step_id, [])
    with pytest.raises(RuntimeError, match="once each"):
        second.result()
    assert [[receive(pipe)[0] for _ in range(4)] for pipe in pipes] == [["submit", "submit", "result", "result"]] * 2


def test_the_rank_that_fails_first_is_blamed(two_ranks):
    """Rank 0 waits for rank 1 in an exchange, and would fail only later."""
    executor, pipes = two_ranks
    send(pipes[1], ("error", ("KeyError: 'x'", "Traceback ...")))
    with pytest.raises(WorkerError, match=r"^the worker of rank 1 failed: KeyError: 'x'"):
        executor.rpc("init_cache")


def test_a_rank_that_died_is_blamed_and_not_its_neighbour(two_ranks):
    executor, pipes = two_ranks
    executor._processes[1].kill()
    executor._processes[1].wait()
    send(pipes[0], ("error", ("RuntimeError: Connection reset by peer", "Traceback ...")))
    with pytest.raises(WorkerError, match=r"^the worker process of rank 1 died with exit code -9$"):
        executor.rpc("init_cache")


def test_logits_that_are_no_numbers_end_their_request_alone():
    core = Core("llama-default")
    weights = core.core.executor.worker.runner.model.model.embed_tokens.weight
    weights.data[77] = float("nan")
    params = SamplingParams(max_new_tokens=3, temperature=0.7, ignore_eos=True)
    core.run([generate_request("bad", [1, 77], params, 0), generate_request("good", [1, 2, 3], params, 0)])
    assert core.outputs["bad"][-1].finish_reason.status_code == 500
    assert "not finite" in core.outputs["bad"][-1].finish_reason.message
    assert core.outputs["good"][-1].finish_reason.type == "length"


def test_a_missing_gpu_is_told_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"device is 'cuda', but torch .*choose device 'cpu'"):
        choose_device("cuda")


@pytest.mark.parametrize("max_total_tokens", [18, 40])
def test_prompts_that_are_not_cut_fit_a_window_model_or_are_refused(max_total_tokens):
    core = Core("mistral-window16-yarn", max_total_tokens=max_total_tokens, chunked_prefill_size=-1)
    assert core.core.max_req_len == max_total_tokens
    (prompt,) = random_prompts(127, (max_total_tokens - 2,))
    core.run([generate_request("r", prompt, SamplingParams(max_new_tokens=2, ignore_eos=True), 0)])
    assert core.outputs["r"][-1].finish_reason.type == "length"


def test_unknown_attention_backend_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown attention backend 'x'; have \[.*'torch_native'"):
        make_backend("x")
    with pytest.raises(ValueError, match="'cpu' is for models in float32, bfloat16, float16 on a CPU, not float64"):
        make_backend("cpu", "cpu", torch.float64)
    with pytest.raises(ValueError, match="not bfloat16 on cuda"):
        make_backend("cpu", "cuda", torch.bfloat16)
    assert type(make_backend(None, "cpu", torch.float64)).__name__ == "TorchAttention"
