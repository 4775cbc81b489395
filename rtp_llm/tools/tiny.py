"""``rtp-llm tiny``: write a tiny random checkpoint of an architecture that transformers has, to try a model file on."""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_FACTOR = re.compile(r"scal|multiplier|factor|alpha")


class TinyError(ValueError):
    """An argument that names nothing to make, or nowhere to write it."""


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "architecture", metavar="ARCHITECTURE", help="a class of transformers that reads text, such as LlamaForCausalLM"
    )
    parser.add_argument("directory", metavar="DIR", help="a folder without a checkpoint; it is made if need be")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a config.json whose structure is kept: kinds of layers, experts, shared heads, windows, switches and "
        "factors; sizes become small. Default: the class's own defaults",
    )
    parser.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="a field of the configuration, with its value in JSON or as plain text; may be given several times",
    )
    parser.set_defaults(log_level="warning")


def run_tiny(args: argparse.Namespace) -> int:
    """Run the command; return the exit status.

    Raises:
        TinyError: see there.
        NotMadeError: transformers has no such class, or makes no small model of it.
    """
    from rtp_llm.tools.tiny_checkpoint import make_tiny_checkpoint, model_class_of  # torch, only needed here

    _check_reads_text_alone(args.architecture, model_class_of(args.architecture))
    directory = Path(args.directory)
    if (directory / "config.json").exists():
        raise TinyError(f"{directory} has a config.json already, and nothing is overwritten")
    given = _read_config(args.config) if args.config else None
    overrides = dict(_setting(text) for text in args.set)
    make_tiny_checkpoint(args.architecture, directory, given, overrides, tokenizer=True)
    made = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    print(f"wrote {directory}: random weights, and a tokenizer with a token for each character of ASCII")
    print_neutral(made)
    print(f"\nNext:\n    rtp-llm verify {directory}")
    return 0


def _check_reads_text_alone(architecture: str, model_class: Any) -> None:
    parts = getattr(getattr(model_class, "config_class", None), "sub_configs", {})
    others = sorted(name for name in parts if re.match(r"vision|image|audio|speech", name))
    if others:
        raise TinyError(
            f"{architecture} takes more than text ({', '.join(others)}), and only the checkpoint has its processor: "
            "take a small published one; for an architecture of your own, rtp-llm new --sees writes a maker"
        )


def _read_config(name: str) -> dict[str, Any]:
    config = json.loads(Path(name).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise TinyError(f"{name} holds no JSON object, which a config.json is")
    return config


def _setting(text: str) -> tuple[str, Any]:
    """Return the name and the value of ``FIELD=VALUE``."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise TinyError(f"--set {text}: FIELD=VALUE is expected, such as --set num_hidden_layers=2")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def print_neutral(config: Mapping[str, Any]) -> None:
    """Print which factors of a configuration are one: a mistake in what they multiply changes nothing."""
    names = list(_neutral(config))
    if names:
        print(f"These factors are one, so a mistake in their use goes unseen: {', '.join(names)}. --set gives others.")


def _neutral(config: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _neutral(value, f"{before}{name}.")
        numbers = value if isinstance(value, list) and value else [value]
        is_one = all(isinstance(number, (int, float)) and number == 1 and number is not True for number in numbers)
        if is_one and _FACTOR.search(name):
            yield f"{before}{name}"
