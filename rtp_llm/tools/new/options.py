"""The flags of ``rtp-llm new``."""

import argparse

DEFAULT_LIKE = "llama"


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the architecture, such as zeta, MyModel or my-model")
    parser.add_argument(
        "--like",
        default=DEFAULT_LIKE,
        metavar="FILE",
        help="the model file of ours to begin with: a name in rtp_llm/models_py, such as qwen3, but not of a model "
        "that takes images; with --sees, its language model. Default: llama, every part of which is written out",
    )
    parser.add_argument("--sees", action="store_true", help="the model takes images: it begins with an eye of its own")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--directory",
        metavar="DIR",
        help="write here: NAME, the package itself, and its test beside it; default: ./NAME, so "
        "that the package is NAME/NAME",
    )
    place.add_argument(
        "--inside", action="store_true", help="write into the checkout of RTP-LLM that this command is run from"
    )
    parser.set_defaults(log_level="warning")
