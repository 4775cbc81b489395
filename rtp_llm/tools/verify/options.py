"""The flags of ``rtp-llm verify``."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from rtp_llm.srt.configs.options import add_field_flags
from rtp_llm.srt.configs.server_args import ServerArgs

MIN_LONG_LEN = 128
ENGINE_FLAGS = (
    "tokenizer_path", "model_impl", "trust_remote_code", "context_length", "revision", "download_dir",
    "dtype", "device", "page_size", "attention_backend", "log_level",
)  # fmt: skip


class VerifyError(ValueError):
    """The two sides cannot be compared."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The options beside those of ServerArgs. Construction checks them and raises VerifyError."""

    model_class: str | None = _option(
        None, "verify this class of ours, module:Class or FILE.py:Class; unset: the registered one"
    )
    prompt_filename: str | None = _option(None, "file with one prompt per line; unset: three prompts")
    image: list[str] | None = _option(  # noqa: RUF009
        None, "images that stand before a prompt, for a model that sees; unset: a drawn one"
    )
    long_len: int | None = _option(
        None,
        f"tokens of one more prompt, 0 for none; unset: {MIN_LONG_LEN}, or beyond the model's sliding window",
    )
    cut_len: int = _option(4, "tokens that ours computes first, the rest beside them in the cache; 0: all at once")
    max_new_tokens: int = _option(16, "greedy tokens after each prompt")
    schedules: bool = _option(
        False,
        "ask the engine instead: one by one, batched, in chunks, from a warm cache, for a second turn, on two ranks",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value, low = getattr(self, item.name), 1 if item.name == "max_new_tokens" else 0
            if isinstance(value, int) and value < low:
                raise VerifyError(f"--{item.name.replace('_', '-')} must be at least {low}, not {value}")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_path", metavar="MODEL", help="checkpoint directory, or hub id")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_field_flags(parser, VerifyOptions)
    add_field_flags(parser.add_argument_group("engine"), ServerArgs, ENGINE_FLAGS)
    parser.set_defaults(log_level="error", dtype="float32")
