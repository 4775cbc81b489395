"""The options of ``rtp-llm bench``."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from rtp_llm.srt.configs.options import add_field_flags
from rtp_llm.tools.bench_serving.backends import BACKENDS, Backend

# Options of one kind of data set, with their defaults.
DATASET_OPTIONS: dict[str, dict[str, Any]] = {
    "random": {"random_input_len": 1024, "random_output_len": 1024, "random_range_ratio": 0.0},
    "generated-shared-prefix": {
        "gsp_num_groups": 64,
        "gsp_prompts_per_group": 16,
        "gsp_system_prompt_len": 2048,
        "gsp_question_len": 128,
        "gsp_output_len": 256,
    },
    "mooncake": {
        "dataset_path": None, "trace_scale_lengths": 1.0, "trace_speed": 1.0, "trace_context_len": None,
    },
    "azure": {
        "dataset_path": None, "trace_scale_lengths": 1.0, "trace_speed": 1.0, "trace_context_len": None,
    },
}  # fmt: skip
DEFAULT_NUM_PROMPTS = 1000  # of the random data set; others have a size of their own


class BenchError(Exception):
    """The benchmark cannot be run with these options."""


def _option(
    default: Any, help: str, *, choices: Sequence[str] = (), low: float | None = None, high: float | None = None
) -> Any:
    """Return a field. Numbers lie in ``[low, high]``."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """All options of a run. Construction checks them, fills in the data set's defaults, and raises BenchError."""

    backend: str = _option(
        "rtp-llm",
        "what to talk to: our native /generate (also SGLang's), /v1/completions, or /v1/chat/completions",
        choices=tuple(BACKENDS),
    )
    base_url: str | None = _option(None, "address of the server, such as http://10.0.0.1:8000; unset: host and port")
    host: str | None = _option(None, "address of the server; unset: 127.0.0.1")
    port: int | None = _option(None, "port of the server; unset: 30000", low=1, high=65535)
    api_key: str | None = _option(None, "bearer token")
    model: str | None = _option(None, "the model's name at the server; unset: the first that it serves")
    tokenizer: str | None = _option(None, "directory or hub id with a tokenizer.json; unset: the model's")
    vocab_size: int | None = _option(None, "draw prompts from all ids below this, without a tokenizer", low=1)
    text_prompts: bool = _option(False, "send text even where the server takes token ids")
    dataset_name: str = _option("random", "what is asked", choices=tuple(DATASET_OPTIONS))
    dataset_path: str | None = _option(None, "mooncake, azure: the file of the trace")
    num_prompts: int | None = _option(
        None, f"number of requests, the first ones of the data set; unset: random {DEFAULT_NUM_PROMPTS}, others all",
        low=1,
    )  # fmt: skip
    random_input_len: int | None = _option(None, "random: most tokens of a prompt; unset: 1024", low=1)
    random_output_len: int | None = _option(None, "random: most tokens to generate; unset: 1024", low=1)
    random_range_ratio: float | None = _option(
        None, "random: shortest length as a part of the longest; 1: all equal; unset: 0, from one token on",
        low=0, high=1,
    )  # fmt: skip
    gsp_num_groups: int | None = _option(None, "shared prefix: number of system prompts; unset: 64", low=1)
    gsp_prompts_per_group: int | None = _option(None, "shared prefix: requests with each; unset: 16", low=1)
    gsp_system_prompt_len: int | None = _option(None, "shared prefix: tokens of each; unset: 2048", low=1)
    gsp_question_len: int | None = _option(None, "shared prefix: tokens that follow it; unset: 128", low=1)
    gsp_output_len: int | None = _option(None, "shared prefix: tokens to generate; unset: 256", low=1)
    trace_scale_lengths: float | None = _option(None, "traces: divide lengths by this; unset: 1", low=0.001)
    trace_speed: float | None = _option(None, "traces: divide times by this; unset: 1", low=0.001)
    trace_context_len: int | None = _option(
        None, "traces: leave out requests with more tokens, prompt and output together", low=2
    )
    request_rate: float | None = _option(
        None, "Poisson arrivals per second; inf: all at once; unset: as the trace says, else inf", low=1e-6
    )
    max_concurrency: int | None = _option(None, "most requests at once; those that arrive meanwhile wait", low=1)
    seed: int = _option(1, "of prompts, lengths and arrivals", low=0)
    disable_ignore_eos: bool = _option(False, "let the model end before the asked number of tokens")
    extra_request_body: str = _option("{}", "JSON object whose entries are added to each request, or replace ours")
    request_timeout: float = _option(3600.0, "seconds until an unfinished request counts as failed", low=0.001)
    warmup_requests: int = _option(1, "requests sent before, one by one, and not counted", low=0)
    flush_cache: bool = _option(False, "empty the server's prefix cache (POST /flush_cache) after warming up")
    output_file: str | None = _option(None, "append the result to this file, as a line of JSON")
    output_details: bool = _option(False, "every request's figures and text into that line, too")
    disable_tqdm: bool = _option(False, "no progress bar")

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item.name, getattr(self, item.name), item.metadata)
        if self.base_url is not None and (self.host is not None or self.port is not None):
            raise BenchError("give either --base-url, or --host and --port")
        if self.output_details and self.output_file is None:
            raise BenchError("--output-details needs --output-file")
        self._refuse_options_of_other_datasets()
        if "dataset_path" in DATASET_OPTIONS[self.dataset_name] and self.dataset_path is None:
            raise BenchError(f"--dataset-name {self.dataset_name} needs --dataset-path")
        self.extra_body()

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        return cls(**{item.name: getattr(args, item.name) for item in fields(cls)})

    @property
    def api(self) -> Backend:
        return BACKENDS[self.backend]

    @property
    def root_url(self) -> str:
        """The server's address without ``/v1``."""
        url = self.base_url or f"http://{self.host or '127.0.0.1'}:{self.port or 30000}"
        return url.rstrip("/").removesuffix("/v1")

    @property
    def sends_text(self) -> bool:
        return self.text_prompts or not self.api.takes_ids

    def of_dataset(self, name: str) -> Any:
        """Return an option of the data set, or its default."""
        value = getattr(self, name)
        return DATASET_OPTIONS[self.dataset_name][name] if value is None else value

    def extra_body(self) -> dict[str, Any]:
        try:
            body = json.loads(self.extra_request_body)
        except ValueError as error:
            raise BenchError(f"--extra-request-body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise BenchError(f"--extra-request-body must be a JSON object, not {self.extra_request_body!r}")
        return body

    def to_dict(self) -> dict[str, Any]:
        """Return the options for the record: those that apply, without the key; an infinite rate is "inf"."""
        own = DATASET_OPTIONS[self.dataset_name]
        foreign = {name for options in DATASET_OPTIONS.values() for name in options} - set(own)
        hidden = {"api_key", "host", "port", "base_url", "disable_tqdm", "output_file", "output_details"}
        options = {name: value for name, value in asdict(self).items() if name not in foreign | hidden}
        options |= {name: self.of_dataset(name) for name in own}
        rate = self.request_rate
        return options | {
            "base_url": self.root_url,
            "request_rate": rate if rate is not None and math.isfinite(rate) else "trace" if self._replays else "inf",
        }

    @property
    def _replays(self) -> bool:
        return "trace_speed" in DATASET_OPTIONS[self.dataset_name] and self.request_rate is None

    def _refuse_options_of_other_datasets(self) -> None:
        own = DATASET_OPTIONS[self.dataset_name]
        for dataset, options in DATASET_OPTIONS.items():
            for name in options:
                if name not in own and getattr(self, name) is not None:
                    raise BenchError(f"{_flag(name)} belongs to --dataset-name {dataset}, not {self.dataset_name}")
        if self.trace_speed is not None and self.request_rate is not None:
            raise BenchError("--request-rate replaces the trace's times: --trace-speed would do nothing")


def _check(name: str, value: Any, metadata: Any) -> None:
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if value is None:
        return
    if choices and value not in choices:
        raise BenchError(f"{_flag(name)} cannot be {value!r}; have {', '.join(choices)}")
    # written so that NaN, which compares false with everything, is refused
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise BenchError(
            f"{_flag(name)} must be at least {low}{'' if high is None else f', at most {high}'}; not {value}"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run, one for each field of BenchArgs."""
    add_field_flags(parser, BenchArgs)
    parser.set_defaults(log_level="warning")  # every command has one
