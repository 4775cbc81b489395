"""A profile of the time of a step: ``rtp-llm bench --profile``.

A batch of random prompts runs through a real core in this process: scheduler, runner, model, sampler. Layers are timed
by wrapping their ``forward``, kernels by the device (in replayed steps, only these). Each part's time excludes the
parts nested in it, so that all parts, with the time between them (``rest``), add up to the step.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from rtp_llm.srt.checkpoint import read_model_config
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import choose_device, provider_named
from rtp_llm.srt.engine.core import EngineCore
from rtp_llm.srt.engine.executor import InProcessExecutor, StepHandle
from rtp_llm.srt.layers.activation import ActAndMul, SiluAndMul, SwigluOAIAndMul
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.logits_processor import LogitsProcessor
from rtp_llm.srt.layers.moe import FusedMoE
from rtp_llm.srt.layers.norm import Norm
from rtp_llm.srt.layers.quantization.base import stored_bytes
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rotary import RotaryEmbedding
from rtp_llm.srt.messages import GenerateRequest, TokenOutput
from rtp_llm.srt.plan import StepPlan
from rtp_llm.srt.request_spec import RequestSpec
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.utils.ipc import CoreEnd, QueueLink
from rtp_llm.srt.utils.logging import configure_logging
from rtp_llm.srt.utils.stopwatch import Name, Part, Stopwatch
from rtp_llm.srt.worker.worker import NoResult, PendingResult, Worker, WorkerConfig
from rtp_llm.tools.bench_profile.options import ProfileArgs, ProfileError
from rtp_llm.tools.step_driver import random_prompts

REST: Name = ("rest",)  # time of a step between its parts
# Names of layers in the table, by the first class that fits.
LAYER_KINDS: Sequence[tuple[tuple[type, ...], str]] = (
    ((LinearBase,), "linear"),
    ((Norm,), "norm"),
    ((RotaryEmbedding,), "rotary"),
    ((RadixAttention,), "attention"),
    ((ActAndMul, SiluAndMul, SwigluOAIAndMul), "activation"),
    ((FusedMoE,), "experts"),
    ((VocabParallelEmbedding,), "embedding"),
)
NAMED_KINDS = ("linear", "norm")  # a block has several, distinguished by their attributes' names


def run_profile(args: argparse.Namespace) -> int:
    """Print a table for the prefill and one for the decode steps; return the exit status.

    Raises:
        ProfileError, and the errors of loading a model.
    """
    profile_args = ProfileArgs.from_cli_args(args)
    server_args = ServerArgs.from_cli_args(args)
    configure_logging(server_args.log_level)
    console = Console()
    for stage, steps in profile_steps(server_args, profile_args).items():
        if steps.num_steps:
            what = (
                f"{stage}: batch {profile_args.batch_size}, {profile_args.input_len} in, {profile_args.output_len} out"
            )
            console.print(steps.table(what))
            console.print(f"explained: {100 * steps.explained:.1f} % of {1e3 * steps.step_s:.3f} ms a step\n")
    return 0


def profile_steps(server_args: ServerArgs, args: ProfileArgs) -> dict[str, "StepTimes"]:
    """Return the times of one batch's steps, ``prefill`` and ``decode``, after another batch as warm-up."""
    if server_args.num_ranks != 1:
        raise ProfileError("the profile is of one process: it cannot be made with --tp-size or --pp-size above 1")
    provider = provider_named(choose_device(server_args.device))
    if provider.overlaps_steps:
        raise ProfileError(
            f"the profile times calls, and calls to {provider.name} return before the work is done: give "
            "--device cpu, or use python -m rtp_llm.bench_one_batch --profile"
        )
    watch = Stopwatch()
    with provider.timed_kernels(watch), ProfiledCore(server_args, read_model_config(server_args), watch) as core:
        core.run(args, seed=0)
        return core.run(args, seed=1)


class RecordingExecutor(InProcessExecutor):
    """Keeps the plans of its steps."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self.plans: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> StepHandle:
        self.plans.append(plan)
        return super().submit(plan)


class ProfiledCore:
    """A core with a timed model, which runs one batch at a time."""

    def __init__(self, server_args: ServerArgs, model_config: ModelConfig, watch: Stopwatch) -> None:
        link = QueueLink()
        link.client.on_messages(self._take)
        self._link, self._watch, self._vocab_size = link, watch, model_config.vocab_size
        self._executor = RecordingExecutor(WorkerConfig(server_args, model_config, choose_device(server_args.device)))
        self._core = EngineCore(server_args, model_config, link.core, executor=self._executor)
        self._problem: str | None = None
        self._products: dict[Name, tuple[float, float]] = {}
        time_core(self._core, link.core, watch)
        time_worker(self._executor.worker, watch)

    def _take(self, messages: list) -> None:
        for message in messages:
            if isinstance(message, TokenOutput) and message.finish_reason and message.finish_reason.type == "abort":
                self._problem = message.finish_reason.message

    def run(self, args: ProfileArgs, seed: int) -> dict[str, "StepTimes"]:
        params = SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=args.output_len)
        prompts = random_prompts(args.batch_size, args.input_len, self._vocab_size, seed)
        for i, prompt in enumerate(prompts):
            self._link.client.send(GenerateRequest(f"{seed}-{i}", prompt, RequestSpec(params, seed=0)))
        stages = {"prefill": StepTimes(), "decode": StepTimes(self._products)}
        while True:
            self._executor.plans.clear()
            with self._watch.part(REST):
                self._core.step(block=False)
            parts = self._watch.take()
            if self._problem is not None:
                raise ProfileError(self._problem)
            if not self._executor.plans:
                return stages
            num_tokens = [work.num_tokens for work in self._executor.plans[0].work]
            if num_tokens:  # else the step only released requests
                stages["decode" if max(num_tokens) == 1 else "prefill"].add(parts, sum(num_tokens))

    def __enter__(self) -> "ProfiledCore":
        return self

    def __exit__(self, *exception: object) -> None:
        self._core.shutdown()


def time_core(core: EngineCore, end: CoreEnd, watch: Stopwatch) -> None:
    watch.wrap(core.scheduler, "plan", ("scheduler", "plan"))
    watch.wrap(core.scheduler, "commit", ("scheduler", "commit"))
    watch.wrap(end, "drain", ("messages",))
    watch.wrap(end, "send", ("messages",))


def time_worker(worker: Worker, watch: Stopwatch) -> None:
    runner = worker.runner
    watch.wrap(runner, "apply", ("runner", "page tables"))
    watch.wrap(runner, "make_batch", ("runner", "batch"))
    watch.wrap(runner.attn_backend, "plan", ("attention", "plan"))
    watch.wrap(runner.kv_pool, "write", ("kv write",))
    if runner.recorder is not None:
        runner.recorder.as_recorded = watch.within_part
    worker.sample = watch.timed(("sampler",), _with_timed_results(worker.sample, watch))  # type: ignore[method-assign]
    for name, module in runner.model.named_modules():
        kind = next((kind for classes, kind in LAYER_KINDS if isinstance(module, classes)), None)
        if kind is not None:
            part = (kind, name.rpartition(".")[2]) if kind in NAMED_KINDS else (kind,)
            module.forward = _timed_layer(module, part, watch)
        if isinstance(module, RotaryEmbedding):
            watch.wrap(module, "norm_and_rotate", ("rotary",))
        if isinstance(module, LogitsProcessor):
            module.logits = _timed_logits(module, watch)  # type: ignore[method-assign]


def _with_timed_results(
    sample: Callable[..., PendingResult | NoResult], watch: Stopwatch
) -> Callable[..., PendingResult | NoResult]:
    def timed(*args: Any, **kwargs: Any) -> PendingResult | NoResult:
        pending = sample(*args, **kwargs)
        watch.wrap(pending, "result", ("sampler",))
        return pending

    return timed


def _timed_layer(module: nn.Module, name: Name, watch: Stopwatch) -> Callable[..., Any]:
    """Return a layer's timed forward; for a product, with the bytes of its weights and its operations."""
    forward = module.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        with watch.part(name) as part:
            result = forward(*args, **kwargs)
        if isinstance(module, LinearBase):
            output, halves = result[0], 2 if len(args) > 1 else 1  # a gated activation multiplies one half by the other
            _note_product(part, module, output.shape[0], module.input_size * output.shape[-1] * halves)
        return result

    return timed


def _timed_logits(module: LogitsProcessor, watch: Stopwatch) -> Callable[..., torch.Tensor]:
    """Return the timed function that computes logits, within the model's forward or later."""
    logits_of = module.logits

    def timed(hidden_states: torch.Tensor, head: VocabParallelEmbedding) -> torch.Tensor:
        with watch.part(("logits",)) as part:
            logits = logits_of(hidden_states, head)
        _note_product(part, head, len(hidden_states), head.num_embeddings * head.embedding_dim)
        return logits

    return timed


def _note_product(part: Part, module: nn.Module, num_rows: int, num_weights: int) -> None:
    if num_rows:
        part.bytes += stored_bytes(module, recurse=False)
        part.operations += 2.0 * num_rows * num_weights


class StepTimes:
    """The times of steps of one kind."""

    def __init__(self, products: dict[Name, tuple[float, float]] | None = None) -> None:
        """``products``: bytes of a layer's call, and operations per row, known from earlier steps."""
        self.num_steps = 0
        self.parts: defaultdict[Name, Part] = defaultdict(Part)
        self._products = {} if products is None else products

    def add(self, parts: dict[Name, Part], num_rows: int) -> None:
        self.num_steps += 1
        for name, part in parts.items():
            self.parts[name].add(part)
            if part.bytes:
                self._products[name] = part.bytes / part.calls, part.operations / part.calls / num_rows
        for name, calls in _replayed_layers(parts).items():
            num_bytes, operations = self._products.get(name, (0.0, 0.0))
            self.parts[name].add(Part(0.0, calls, calls * num_bytes, calls * operations * num_rows))

    @property
    def total_s(self) -> float:
        return sum(part.seconds for part in self.parts.values())

    @property
    def step_s(self) -> float:
        return self.total_s / self.num_steps

    @property
    def explained(self) -> float:
        """The fraction of the time in named parts."""
        return 1 - self.parts[REST].seconds / self.total_s

    def rows(self) -> list["Row"]:
        """Return named parts, longest first, each followed by its kernels; the rest last."""
        layers = {name: self._within(name) for name in self.parts if not _is_kernel(name) and name != REST}
        rows = []
        for name, part in sorted(layers.items(), key=lambda item: -item[1].seconds):
            rows.append(Row(" ".join(name), part))
            kernels = {n: p for n, p in self.parts.items() if _is_kernel(n) and n[:-1] == name}
            rows += [Row(f"  {n[-1]}", p) for n, p in sorted(kernels.items(), key=lambda item: -item[1].seconds)]
        stray = {n: p for n, p in self.parts.items() if _is_kernel(n) and n[:-1] == REST}
        rows += [Row(n[-1], p) for n, p in sorted(stray.items(), key=lambda item: -item[1].seconds)]
        return [*rows, Row(REST[0], self.parts[REST])]

    def _within(self, name: Name) -> Part:
        """Return a layer's times with those of its kernels; calls are the layer's own."""
        whole = Part()
        for other, part in self.parts.items():
            if other == name or (_is_kernel(other) and other[:-1] == name):
                whole.add(part)
        whole.calls = self.parts[name].calls
        return whole

    def table(self, title: str) -> Table:
        table = Table(title=f"{title}; {self.num_steps} steps", title_justify="left")
        table.add_column("part")
        for column in ("ms a step", "share", "calls", "GB/s", "GFLOP/s"):
            table.add_column(column, justify="right")
        for row in self.rows():
            table.add_row(*row.cells(self.num_steps, self.total_s))
        table.add_section()
        table.add_row("a step", f"{1e3 * self.step_s:.3f}", "100.0 %")
        return table


def _replayed_layers(parts: dict[Name, Part]) -> dict[Name, int]:
    """Return the calls that each layer would have had in a replayed step, which calls kernels only."""
    layers: dict[Name, int] = {}
    for name, part in parts.items():
        if _is_kernel(name) and name[:-1] not in parts:
            layers[name[:-1]] = max(part.calls, layers.get(name[:-1], 0))
    return layers


def _is_kernel(name: Name) -> bool:
    """Return whether this is ``library.function`` within a layer."""
    return len(name) > 1 and "." in name[-1]


@dataclass(slots=True)
class Row:
    title: str
    part: Part

    def cells(self, num_steps: int, total_s: float) -> list[str]:
        part = self.part
        rates = [
            f"{amount / part.seconds / 1e9:.1f}" if amount and part.seconds else ""
            for amount in (part.bytes, part.operations)
        ]
        share = f"{100 * part.seconds / total_s:.1f} %"
        return [self.title, f"{1e3 * part.seconds / num_steps:.3f}", share, f"{part.calls / num_steps:.0f}", *rates]
