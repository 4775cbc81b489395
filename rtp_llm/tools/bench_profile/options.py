"""The flags of ``rtp-llm bench --profile``. No torch: every command line reads them."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any, Self

from rtp_llm.srt.configs.options import add_field_flags
from rtp_llm.srt.configs.server_args import ServerArgs


class ProfileError(ValueError):
    """The options of the profile are invalid."""


def _option(default: int, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ProfileArgs:
    """Options of the profiled batch. Construction checks them and raises ProfileError."""

    batch_size: int = _option(1, "number of prompts")
    input_len: int = _option(128, "tokens of each prompt")
    output_len: int = _option(32, "new tokens of each prompt; the first of them comes from the prefill")

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 1:
                flag = "--" + item.name.replace("_", "-")
                raise ProfileError(f"{flag} must be at least 1, not {getattr(self, item.name)}")

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        return cls(**{item.name: getattr(args, item.name) for item in fields(cls)})


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    add_field_flags(parser, ProfileArgs)
    ServerArgs.add_cli_args(parser.add_argument_group("engine"), server=False)
    parser.set_defaults(log_level="warning")
