"""Latencies of batches of random prompts: each combination of batch size, input length and output length."""

import json
import statistics
import time
from dataclasses import replace
from itertools import product
from typing import Any

from rtp_llm.srt.checkpoint import read_model_config
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.bench_one_batch.batch import OneBatch
from rtp_llm.tools.bench_one_batch.options import NUM_SHOWN_DECODES, OneBatchArgs, OneBatchError
from rtp_llm.tools.step_driver import random_prompts

WARMUP_OUTPUT_LEN = 32


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
    """Return (batch size, input length, output length) of each run; print those that do not fit."""
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
    """One batch of random prompts: a prefill in one step, then decode steps."""

    def __init__(self, batch: OneBatch, args: OneBatchArgs, batch_size: int, input_len: int, output_len: int) -> None:
        self._batch = batch
        self._args = args
        self._batch_size = batch_size
        self._input_len = input_len
        self._num_decodes = output_len - 1

    def measure(self) -> dict[str, Any]:
        """Run, print progress, and return the figures: seconds, and tokens per second."""
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
        return random_prompts(self._batch_size, self._input_len, self._batch.model_config.vocab_size, seed=0)

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
