"""The options of ``bench_one_batch`` beside those of an engine."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from rtp_llm.srt.configs.options import add_field_flags
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.reference import MAX_NEW_TOKENS

NUM_SHOWN_DECODES = 5
CORRECTNESS_OPTIONS = ("cut_len", "prompt_filename", "model_type", "image")
LATENCY_OPTIONS = (
    "run_name", "input_len", "result_filename", "log_decode_step", "profile", "profile_record_shapes",
    "profile_activities", "profile_stage", "profile_prefix", "profile_start_step", "profile_steps",
)  # fmt: skip


class OneBatchError(ValueError):
    """The options do not fit each other, or the model."""


def _option(default: Any, help: str, *, choices: Sequence[str] = (), low: int | None = None) -> Any:
    """Return a field. Numbers are at least ``low``."""
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
        "correctness: whether prompts are texts, or messages with images (vlm is another name of mllm); unset: mllm "
        "if the model takes images",
        choices=("text", "mllm", "vlm"),
    )
    image: list[str] = field(
        default_factory=list,
        metadata=_metadata("correctness: images that stand before every prompt; unset: a drawn one"),
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
                    raise OneBatchError(f"{flag_of(item.name)} must be at least {low}, not {number}")
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
        """Make options from a parser with the flags of ``add_cli_args``. Raise for flags that the mode ignores."""
        names = [item.name for item in fields(cls)]
        given = {name: value for name in names if (value := getattr(args, name)) is not None}
        foreign, other = (LATENCY_OPTIONS, "without") if args.correctness_test else (CORRECTNESS_OPTIONS, "with")
        for name in given:
            if name in foreign:
                raise OneBatchError(f"{flag_of(name)} means something only {other} --correctness-test")
            if name.startswith("profile_") and not args.profile:
                raise OneBatchError(f"{flag_of(name)} means something only with --profile")
        return cls(**given)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    add_field_flags(parser, OneBatchArgs, unset=True)
    ServerArgs.add_cli_args(parser.add_argument_group("engine"))
    parser.set_defaults(log_level="warning")
