"""The workers alone: ``python -m rtp_llm.bench_one_batch --model-path DIR``. No server, no scheduler, no prefix cache.

With ``--correct`` it shows logits and texts, to be compared with those of ``scripts/playground/reference_hf.py``.
Without, it times batches of random prompts: each combination of ``--batch-size``, ``--input-len`` and ``--output-len``.
"""

import argparse
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any, Self

import torch

from rtp_llm.srt.checkpoint import prompts_with_pictures, read_model_config, read_tokenizer
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.options import ArgumentParser, add_field_flags
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.capacity import DEFAULT_MEM_FRACTION, Capacity, auto_max_tokens, plan_capacity
from rtp_llm.srt.engine.core import DEFAULT_DIST_TIMEOUT_S, DEFAULT_MAX_RUNNING_REQUESTS
from rtp_llm.srt.engine.executor import make_executor
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.plan import Admission, PaddedPrompt, PageWrite, RowWork, StepPlan, StepResult
from rtp_llm.srt.platform import choose_device, memory_bytes
from rtp_llm.srt.request_spec import RequestSpec
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.utils.logging import configure_logging
from rtp_llm.srt.worker.worker import LoadedModel, WorkerConfig
from rtp_llm.tools.reference import (
    MAX_NEW_TOKENS,
    PICTURE_PROMPTS,
    chat_text,
    encode,
    logits_text,
    read_pictures,
    read_prompts,
    whole_text,
)

logger = logging.getLogger(__name__)

EXIT_ERROR = 2
WARMUP_OUTPUT_LEN = 32
NUM_SHOWN_DECODES = 5
NUM_RANDOM_IDS = 10000  # ids of random prompts lie below this
GREEDY = RequestSpec(SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=0), seed=0)
# Options of ServerArgs that only a scheduler heeds. Those that only the HTTP server heeds are marked so in ServerArgs.
SCHEDULER_OPTIONS = (
    "chunked_prefill_size", "max_prefill_tokens", "schedule_policy", "disable_radix_cache", "disable_overlap_schedule",
    "max_running_requests", "swa_full_tokens_ratio", "decode_log_interval", "watchdog_timeout", "random_seed",
)  # fmt: skip
CORRECTNESS_OPTIONS = ("cut_len", "prompt_filename", "model_type", "image")
LATENCY_OPTIONS = (
    "run_name", "input_len", "result_filename", "log_decode_step", "profile", "profile_record_shapes",
    "profile_activities", "profile_stage", "profile_prefix", "profile_start_step", "profile_steps",
)  # fmt: skip


class OneBatchError(ValueError):
    """The options do not go together, or not with the model."""


def _option(default: Any, help: str, *, choices: Sequence[str] = (), low: int | None = None) -> Any:
    """A field. Numbers are at least ``low``."""
    return field(default=default, metadata=_metadata(help, choices, low))


def _metadata(help: str, choices: Sequence[str] = (), low: int | None = None) -> dict[str, Any]:
    return {"help": help, "choices": tuple(choices), "low": low}


@dataclass(frozen=True, kw_only=True)
class OneBatchArgs:
    """The options beside those of ServerArgs. Construction checks them and raises OneBatchError."""

    correctness_test: bool = _option(False, "show logits and texts instead of measuring latencies")
    cut_len: int = _option(4, "correctness: tokens that are computed first, the rest after them; unset: 4", low=0)
    prompt_filename: str = _option("", "correctness: file with one prompt per line; unset: built-in ones")
    model_type: str | None = _option(
        None,
        "correctness: whether prompts are texts, or messages with pictures (vlm is another name of mllm); unset: mllm "
        "if the model takes pictures",
        choices=("text", "mllm", "vlm"),
    )
    image: list[str] = field(
        default_factory=list,
        metadata=_metadata("correctness: pictures that stand before every prompt; unset: a drawn one"),
    )
    run_name: str = _option("default", "latency: name of this run in the result; unset: default")
    batch_size: list[int] = field(
        default_factory=list,
        metadata=_metadata("latency: numbers of prompts; unset: 1. correctness: only so many; unset: all", low=1),
    )
    input_len: list[int] = field(
        default_factory=lambda: [1024], metadata=_metadata("latency: lengths of the prompts; unset: 1024", low=1)
    )
    output_len: list[int] = field(
        default_factory=lambda: [MAX_NEW_TOKENS],
        metadata=_metadata(f"numbers of new tokens; unset: {MAX_NEW_TOKENS}", low=1),
    )
    result_filename: str = _option(
        "result.jsonl", "latency: file that results are appended to, '' for none; unset: result.jsonl"
    )
    log_decode_step: int = _option(
        0, f"latency: show each so many decodes, beside the first {NUM_SHOWN_DECODES}; unset: 0, no others", low=0
    )
    profile: bool = _option(False, "latency: write traces of torch.profiler; figures then include its cost")
    profile_record_shapes: bool = _option(False, "profile: with the shapes of inputs")
    profile_activities: list[str] = field(
        default_factory=lambda: ["CPU", "GPU"],
        metadata=_metadata("profile: what is recorded; unset: CPU, and GPU if there is one", choices=("CPU", "GPU")),
    )
    profile_stage: str = _option("all", "profile: which stage; unset: all", choices=("all", "prefill", "decode"))
    profile_prefix: str = _option("profile", "profile: what file names begin with; unset: profile")
    profile_start_step: int | None = _option(
        None, "profile: the decode from which on is recorded, counted from 0; unset: the middle one", low=0
    )
    profile_steps: int = _option(1, "profile: number of decodes that are recorded; unset: 1", low=1)

    def __post_init__(self) -> None:
        for item in fields(self):
            value, low = getattr(self, item.name), item.metadata["low"]
            for number in value if isinstance(value, list) else [value]:
                if low is not None and number is not None and number < low:
                    raise OneBatchError(f"{_flag(item.name)} must be at least {low}, not {number}")
        if self.correctness_test and max(len(self.batch_size), len(self.output_len)) > 1:
            raise OneBatchError("--correctness-test takes one --batch-size and one --output-len")
        if self.image and self.model_type == "text":
            raise OneBatchError("--image means nothing with --model-type text")
        if self.profile and self.profile_stage == "prefill" and self.profile_start_step is not None:
            raise OneBatchError("--profile-start-step counts decodes, which --profile-stage prefill leaves out")
        if (self.profile and self.profile_stage == "decode") or self.profile_start_step is not None:
            num_decodes, start = min(self.output_len) - 1, self.profile_start_step or 0
            if start >= num_decodes:
                raise OneBatchError(
                    f"there is no decode {start} to profile: --output-len {min(self.output_len)} has {num_decodes}, "
                    "since the first token comes from the prefill"
                )

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """From a parser with the flags of ``add_cli_args``. Refuses what the chosen mode would not heed."""
        names = [item.name for item in fields(cls)]
        given = {name: value for name in names if (value := getattr(args, name)) is not None}
        foreign, other = (LATENCY_OPTIONS, "without") if args.correctness_test else (CORRECTNESS_OPTIONS, "with")
        for name in given:
            if name in foreign:
                raise OneBatchError(f"{_flag(name)} means something only {other} --correctness-test")
            if name.startswith("profile_") and not args.profile:
                raise OneBatchError(f"{_flag(name)} means something only with --profile")
        return cls(**given)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    add_field_flags(parser, OneBatchArgs, unset=True)
    ServerArgs.add_cli_args(parser.add_argument_group("engine"))
    parser.set_defaults(log_level="warning")


class OneBatch:
    """A loaded model, and one batch of requests at a time in it, each in the pages that lie at its place.

    Args:
        server_args: those for a server or a scheduler mean nothing here, and a warning names them.

    Raises:
        ValueError, OSError, RuntimeError: what is wrong with the options, the checkpoint or the machine.
    """

    def __init__(self, server_args: ServerArgs, model_config: ModelConfig) -> None:
        _warn_of_unused(server_args)
        self._args = server_args
        self.model_config = model_config
        device = choose_device(server_args.device)
        free_bytes, _ = memory_bytes(device)
        self._executor = make_executor(
            WorkerConfig(server_args, model_config, device),
            depth=0,
            dist_timeout_s=server_args.dist_timeout or DEFAULT_DIST_TIMEOUT_S,
        )
        try:
            loaded = self._executor.load()
            self._groups = loaded.layout.groups
            self._capacity = self._plan_capacity(loaded, device, free_bytes)
        except BaseException:
            self._executor.shutdown()
            raise
        self._step_id = 0
        self._lens: list[int] = []  # computed tokens of each row
        self._next = StepPlan(0)  # what the next step brings beside its work

    def _plan_capacity(self, loaded: LoadedModel, device: str, free_bytes: int) -> Capacity:
        """Windows get as many pages as the others: nothing slides here."""
        fraction = self._args.mem_fraction_static or DEFAULT_MEM_FRACTION[device]
        ranks_sharing = self._args.tp_size if device == "cpu" else 1
        return plan_capacity(
            loaded.layout.groups,
            self.model_config.context_length,
            None,
            max(0, int(free_bytes * fraction) // ranks_sharing - loaded.weight_bytes),
            self._args.max_total_tokens,
            auto_max_tokens(self.model_config.context_length, DEFAULT_MAX_RUNNING_REQUESTS),
            window_ratio=1.0,
        )

    @property
    def max_total_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self._capacity.max_total_tokens

    def why_not(self, batch_size: int, num_tokens: int) -> str | None:
        """Why there is no room for so many requests of so many tokens; None if there is."""
        if num_tokens > self.model_config.context_length:
            return f"{num_tokens} tokens exceed the context length of {self.model_config.context_length}"
        page_size = self._args.page_size
        if batch_size > self.max_total_tokens // (-(-num_tokens // page_size) * page_size):
            return f"{batch_size} x {num_tokens} tokens exceed the {self.max_total_tokens} that the cache holds"
        return None

    def reserve(self, max_batch_size: int, max_len: int) -> None:
        """Reserves the cache. To be called once, before the first batch."""
        self._executor.init_cache(list(self._capacity.num_pages), max_batch_size, max_len)

    def padded(self, prompt_ids: list[int], media: bytes) -> PaddedPrompt:
        """A prompt with media as the model wants it. Raises OneBatchError."""
        prompt: PaddedPrompt = self._executor.rpc("pad_input_ids", prompt_ids, media)[0]
        if prompt.problem is not None:
            raise OneBatchError(f"the media cannot be placed in the prompt: {prompt.problem}")
        return prompt

    def start(self, prompts: list[list[int]], num_new: int, media: Sequence[bytes | None] | None = None) -> None:
        """Puts a batch in the place of the one before.

        Args:
            num_new: tokens that each prompt may be continued by.
            media: what goes with each prompt, as ``padded`` returns both.
        """
        reason = self.why_not(len(prompts), max(map(len, prompts)) + num_new)
        if reason is not None:
            raise OneBatchError(reason)
        num_pages = -(-(max(map(len, prompts)) + num_new) // self._args.page_size)
        releases = list(range(len(self._lens)))
        admissions = [
            Admission(row, str(row), ids, [], replace(GREEDY, media=None if media is None else media[row]))
            for row, ids in enumerate(prompts)
        ]  # fmt: skip
        writes = [
            PageWrite(row, group, 0, list(range(1 + row * num_pages, 1 + (row + 1) * num_pages)))  # 0 is the dummy
            for row in range(len(prompts))
            for group in range(len(self._groups))
        ]
        self._next = StepPlan(0, releases, admissions, writes)
        self._lens = [0] * len(prompts)

    def step(self, num_tokens: list[int]) -> list[int]:
        """Computes so many further tokens of each row; returns the most probable token after them."""
        return _token_ids(self._executor.submit(self._plan(num_tokens)).result())

    def step_with_logits(self, num_tokens: list[int]) -> tuple[list[int], torch.Tensor]:
        """As ``step``, and the logits [batch_size, vocab_size], float32 on the host."""
        result, logits = self._executor.rpc("step_with_logits", self._plan(num_tokens))[0]
        return _token_ids(result), logits

    def _plan(self, num_tokens: list[int]) -> StepPlan:
        """Every row is asked for a token, even within its prompt, whose logits nobody would see otherwise."""
        plan, self._next = self._next, StepPlan(0)
        self._step_id += 1
        work = [
            RowWork(row, start, num, sample=True)
            for row, (start, num) in enumerate(zip(self._lens, num_tokens, strict=True))
        ]
        self._lens = [start + num for start, num in zip(self._lens, num_tokens, strict=True)]
        return replace(plan, step_id=self._step_id, work=work)

    def start_profile(self, activities: list[str], record_shapes: bool) -> None:
        self._executor.rpc("start_profile", activities, record_shapes)

    def stop_profile(self, path_prefix: str) -> list[str]:
        """The paths of the traces, one of each rank."""
        return self._executor.rpc("stop_profile", path_prefix)

    def shutdown(self) -> None:
        self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()


def _warn_of_unused(args: ServerArgs) -> None:
    unused = [
        _flag(item.name)
        for item in fields(args)
        if (item.metadata["server"] or item.name in SCHEDULER_OPTIONS) and getattr(args, item.name) != item.default
    ]
    if unused:
        logger.warning("without a server and a scheduler these do nothing: %s", ", ".join(unused))


def _token_ids(result: StepResult) -> list[int]:
    for row, answer in enumerate(result.rows):
        if answer.error is not None:
            raise RuntimeError(f"prompt {row}: {answer.error}")
    return [answer.token_ids[0] for answer in result.rows]


# --correctness-test


@dataclass(frozen=True)
class Correctness:
    """Logits [number of prompts, vocab_size] after the first tokens of each prompt, and after all of it."""

    first_half: torch.Tensor | None  # None if nothing was computed before the rest
    final: torch.Tensor
    output_ids: list[list[int]]


def run_correctness(
    batch: OneBatch,
    prompts: list[list[int]],
    cut_len: int,
    output_len: int,
    media: Sequence[bytes | None] | None = None,
) -> Correctness:
    """Computes ``cut_len`` tokens of each prompt, then the rest beside what is in the cache, then decodes."""
    batch.start(prompts, output_len, media)
    first_half = batch.step_with_logits([cut_len] * len(prompts))[1] if cut_len else None
    token_ids, final = batch.step_with_logits([len(ids) - cut_len for ids in prompts])
    outputs = [[token_id] for token_id in token_ids]
    for _ in range(output_len - 1):
        for output, token_id in zip(outputs, batch.step([1] * len(prompts)), strict=True):
            output.append(token_id)
    return Correctness(first_half, final, outputs)


def correctness_test(server_args: ServerArgs, args: OneBatchArgs) -> None:
    if server_args.skip_tokenizer_init:
        raise OneBatchError("--correctness-test works on text: it cannot run with --skip-tokenizer-init")
    model_config = read_model_config(server_args)
    tokenizer = read_tokenizer(server_args, model_config)
    if tokenizer is None:
        raise OneBatchError(f"{server_args.model_path} has no tokenizer; name one with --tokenizer-path")
    texts, unplaced = _prompts(server_args, args, model_config, tokenizer)
    output_len = args.output_len[0]
    with OneBatch(server_args, model_config) as batch:
        padded = [
            PaddedPrompt(prompt.input_ids) if prompt.media is None else batch.padded(prompt.input_ids, prompt.media)
            for prompt in unplaced
        ]
        for text, prompt in zip(texts, padded, strict=True):
            _check_cut(args.cut_len, text, prompt)
        prompts, media = [prompt.prompt_ids for prompt in padded], [prompt.media or None for prompt in padded]
        print(f"max_total_num_tokens={batch.max_total_tokens}")
        batch.reserve(len(prompts), max(map(len, prompts)) + output_len)
        print(f"\ninput_ids={prompts}\n")
        found = run_correctness(batch, prompts, args.cut_len, output_len, media)
    if found.first_half is not None:
        print(f"prefill logits (first half): {logits_text(found.first_half)} \n")
    print(f"prefill logits (final): {logits_text(found.final)} \n")
    for i, (prompt_ids, output_ids) in enumerate(zip(prompts, found.output_ids, strict=True)):
        print(f"========== Prompt {i} ==========")
        print(whole_text(tokenizer, prompt_ids, output_ids), "\n")


def _prompts(
    server_args: ServerArgs, args: OneBatchArgs, model_config: ModelConfig, tokenizer: Any
) -> tuple[list[str], list[Prompt]]:
    """Texts, and what they are as ids and media."""
    model_type = args.model_type or ("mllm" if model_config.is_multimodal or args.image else "text")
    num_prompts = args.batch_size[0] if args.batch_size else None
    if model_type == "text":
        texts = read_prompts(args.prompt_filename)[:num_prompts]
        return texts, [Prompt(input_ids=encode(tokenizer, text)) for text in texts]
    if not model_config.is_multimodal:
        name = ", ".join(model_config.architectures)
        raise OneBatchError(f"{server_args.model_path} ({name}) takes no pictures; use --model-type text")
    texts, pictures = read_prompts(args.prompt_filename, PICTURE_PROMPTS)[:num_prompts], read_pictures(args.image)
    chats = [chat_text(model_config.model_path, tokenizer, text, len(pictures)) for text in texts]
    return texts, prompts_with_pictures(server_args, model_config, tokenizer, chats, pictures)


def _check_cut(cut_len: int, text: str, prompt: PaddedPrompt) -> None:
    num_tokens = len(prompt.prompt_ids)
    if num_tokens <= cut_len:
        raise OneBatchError(f"--cut-len {cut_len} leaves nothing of the prompt {text!r}, which has {num_tokens} tokens")
    for first, last in prompt.atomic_spans:
        if first < cut_len <= last:
            raise OneBatchError(
                f"--cut-len {cut_len} cuts a picture, tokens {first} to {last} of {text!r}, which this model computes "
                f"at once; {first} and less, or {last + 1} and more, do not"
            )


# Latency


def latency_test(server_args: ServerArgs, args: OneBatchArgs) -> None:
    with OneBatch(server_args, read_model_config(server_args)) as batch:
        print(f"max_total_num_tokens={batch.max_total_tokens}")
        settings = _settings_that_fit(batch, args)
        batch.reserve(max(setting[0] for setting in settings), max(sum(setting[1:]) for setting in settings))
        batch_size, input_len, output_len = settings[0]
        print("Warmup ...")
        warmup = replace(args, log_decode_step=0, profile=False)
        LatencyRun(batch, warmup, batch_size, input_len, min(output_len, WARMUP_OUTPUT_LEN)).measure()
        print("Benchmark ...")
        for batch_size, input_len, output_len in settings:
            figures = LatencyRun(batch, args, batch_size, input_len, output_len).measure()
            if args.result_filename:
                with open(args.result_filename, "a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")


def _settings_that_fit(batch: OneBatch, args: OneBatchArgs) -> list[tuple[int, int, int]]:
    """(batch size, input length, output length) of each run; says which are left out."""
    settings = []
    for batch_size, input_len, output_len in product(args.batch_size or [1], args.input_len, args.output_len):
        reason = batch.why_not(batch_size, input_len + output_len)
        if reason is None:
            settings.append((batch_size, input_len, output_len))
        else:
            print(f"skipping ({batch_size}, {input_len}, {output_len}): {reason}")
    if not settings:
        raise OneBatchError("no combination of --batch-size, --input-len and --output-len fits; see above")
    return settings


class LatencyRun:
    """One batch of random prompts, computed in one step, and its decodes."""

    def __init__(self, batch: OneBatch, args: OneBatchArgs, batch_size: int, input_len: int, output_len: int) -> None:
        self._batch = batch
        self._args = args
        self._batch_size = batch_size
        self._input_len = input_len
        self._num_decodes = output_len - 1

    def measure(self) -> dict[str, Any]:
        """Runs, prints as it goes, and returns the figures: seconds, and tokens per second."""
        self._batch.start(self._random_prompts(), self._num_decodes + 1)
        prefill_s = self._timed_prefill()
        prefill_rate = self._rate(self._input_len, prefill_s)
        print(f"Prefill. latency: {prefill_s:.5f} s, throughput: {prefill_rate:.2f} token/s")
        decodes_s = self._timed_decodes()
        median_s = statistics.median(decodes_s) if decodes_s else None
        median_rate = None if median_s is None else self._rate(1, median_s)
        if median_s is not None:
            print(f"Decode.  median latency: {median_s:.5f} s, median throughput: {median_rate:.2f} token/s")
        total_s = prefill_s + sum(decodes_s)
        overall_rate = self._rate(self._input_len + self._num_decodes + 1, total_s)
        print(f"Total. latency: {total_s:.3f} s, throughput: {overall_rate:.2f} token/s")
        return {
            "run_name": self._args.run_name,
            "batch_size": self._batch_size,
            "input_len": self._input_len,
            "output_len": self._num_decodes + 1,
            "prefill_latency": prefill_s,
            "prefill_throughput": prefill_rate,
            "median_decode_latency": median_s,
            "median_decode_throughput": median_rate,
            "total_latency": total_s,
            "overall_throughput": overall_rate,
        }

    def _random_prompts(self) -> list[list[int]]:
        num_ids = min(NUM_RANDOM_IDS, self._batch.model_config.vocab_size)
        draw = random.Random(0)
        return [[draw.randrange(num_ids) for _ in range(self._input_len)] for _ in range(self._batch_size)]

    def _rate(self, num_tokens: int, seconds: float) -> float:
        return num_tokens * self._batch_size / seconds

    def _timed_prefill(self) -> float:
        profiled = self._args.profile and self._args.profile_stage != "decode"
        if profiled:
            self._start_profile()
        seconds = self._timed_step(self._input_len)
        if profiled:
            self._stop_profile("prefill")
        return seconds

    def _timed_decodes(self) -> list[float]:
        profiled = self._profiled_decodes()
        seconds = []
        for i in range(self._num_decodes):
            if profiled and i == profiled[0]:
                self._start_profile()
            seconds.append(self._timed_step(1))
            if profiled and i == profiled[-1]:
                self._stop_profile("decode")
            if i < NUM_SHOWN_DECODES or (self._args.log_decode_step and i % self._args.log_decode_step == 0):
                rate = self._rate(1, seconds[-1])
                print(
                    f"Decode {i}. Batch size: {self._batch_size}, "
                    f"latency: {seconds[-1]:.5f} s, throughput: {rate:.2f} token/s"
                )
        return seconds

    def _timed_step(self, num_tokens: int) -> float:
        start_s = time.perf_counter()
        self._batch.step([num_tokens] * self._batch_size)
        return time.perf_counter() - start_s

    def _profiled_decodes(self) -> range:
        if not self._args.profile or self._args.profile_stage == "prefill":
            return range(0)
        start = self._args.profile_start_step
        start = self._num_decodes // 2 if start is None else start
        return range(start, self._num_decodes)[: self._args.profile_steps]

    def _start_profile(self) -> None:
        self._batch.start_profile(self._args.profile_activities, self._args.profile_record_shapes)

    def _stop_profile(self, stage: str) -> None:
        lens = f"batch{self._batch_size}_input{self._input_len}_output{self._num_decodes + 1}"
        for path in self._batch.stop_profile(f"{self._args.profile_prefix}_{lens}_{stage}"):
            print(f"profile of {stage}: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: this process's); returns the exit status: 2 after an error, told on stderr."""
    parser = ArgumentParser(prog="bench_one_batch", description="Run the workers without server and scheduler.")
    add_cli_args(parser)
    parsed = parser.parse_args(argv)
    try:
        args, server_args = OneBatchArgs.from_cli_args(parsed), ServerArgs.from_cli_args(parsed)
        configure_logging(server_args.log_level)
        mode: Callable[[ServerArgs, OneBatchArgs], None] = correctness_test if args.correctness_test else latency_test
        mode(server_args, args)
    except (ValueError, OSError, RuntimeError) as error:
        if parsed.log_level == "debug":
            raise
        print(f"bench_one_batch: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
