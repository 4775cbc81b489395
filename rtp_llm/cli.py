"""The command line: ``rtp-llm COMMAND ...``. A command is one entry in ``COMMANDS``."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

import rtp_llm
from rtp_llm.port import options as port_options
from rtp_llm.srt.configs.options import ArgumentParser, add_field_flags
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.start import start_core_process
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams
from rtp_llm.srt.utils.transformers_imports import hide_torch
from rtp_llm.tools.bench_profile import options as profile_options
from rtp_llm.tools.bench_serving import options as bench_options
from rtp_llm.tools.chat.command import run_chat
from rtp_llm.tools.chat.engine_backend import announce_demo
from rtp_llm.tools.models import run_models
from rtp_llm.tools.new import options as new_options
from rtp_llm.tools.tiny import add_cli_args as add_tiny_flags
from rtp_llm.tools.tiny import run_tiny
from rtp_llm.tools.verify import options as verify_options

EXIT_ADDRESS = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
PROFILE_FLAG = "--profile"

SAMPLING_FLAGS = (
    "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "ignore_eos",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A subcommand: its flags, and what runs it and returns the exit status."""

    name: str
    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: this process's); returns the exit status.

    0: done; 2: an error, told in one line on stderr (with a traceback if ``--log-level debug``); 1: the error is that
    the server's address is in use; 130: interrupted.
    """
    args = _parser().parse_args(_with_profile(sys.argv[1:] if argv is None else argv))
    try:
        return args.command.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it exits
        return EXIT_ERROR
    except Exception as error:  # the outermost boundary: what a person reads
        if args.log_level == "debug":
            raise
        print(f"rtp-llm: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_ERROR


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="rtp-llm", description="An inference engine for language models.")
    parser.add_argument("--version", action="version", version=f"rtp-llm {rtp_llm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(command.name, help=command.help, description=command.help)
        command.add_flags(subparser)
        subparser.set_defaults(command=command)
    return parser


def _with_profile(argv: Sequence[str]) -> list[str]:
    """``bench --profile`` shares no other flag with ``bench``: it is a command of its own."""
    if argv and argv[0] == "bench" and PROFILE_FLAG in argv:
        return [f"bench {PROFILE_FLAG}", *(arg for arg in argv[1:] if arg != PROFILE_FLAG)]
    return list(argv)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error) in (KeyError, IndexError, AssertionError):  # says what was looked for, but not by whom
        return f"{' '.join([f'{type(error).__name__}:', *lines])} (--log-level debug shows where)"
    return " ".join(lines) if lines else type(error).__name__


# rtp-llm generate


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; - reads it from stdin")
    sampling = parser.add_argument_group("sampling (where not given: as the checkpoint advises)")
    add_field_flags(sampling, SamplingParams, SAMPLING_FLAGS, unset=True)
    ServerArgs.add_cli_args(parser.add_argument_group("engine"), server=False)
    parser.set_defaults(log_level="warning")


def _generate(args: argparse.Namespace) -> int:
    server_args = ServerArgs.from_cli_args(args)
    if server_args.skip_tokenizer_init:
        raise InvalidRequest("generate works on text: it cannot run with --skip-tokenizer-init")
    given = _given_sampling(args)
    SamplingParams.from_dict(given)  # a wrong flag is told before a model is loaded
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    announce_demo(server_args)
    with _loading_bar() as on_progress:
        engine = rtp_llm.Engine(server_args=server_args, on_progress=on_progress)
    with engine:
        if engine.tokenizer is None:
            raise InvalidRequest(f"{server_args.model_path} has no tokenizer; name one with --tokenizer-path")
        params = SamplingParams.from_dict(engine.model_config.generation_defaults | given)
        _print_stream(engine, prompt, params)
    return 0


def _given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in SAMPLING_FLAGS if (value := getattr(args, name)) is not None}


def _print_stream(engine: Any, prompt: str, params: SamplingParams) -> None:
    """Writes the text to stdout as it comes, then a line of statistics to stderr."""
    start_s = time.perf_counter()
    first_s = None
    num_printed = 0
    for result in engine.generate(prompt, params, stream=True):
        if first_s is None and result["output_ids"]:
            first_s = time.perf_counter()
        print(result["text"][num_printed:], end="", flush=True)
        num_printed = len(result["text"])
    print(flush=True)
    end_s = time.perf_counter()
    meta = result["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
        raise RuntimeError(f"the request was ended: {meta['finish_reason']['message']}")
    print(_statistics(meta, start_s, first_s or end_s, end_s), file=sys.stderr)


def _statistics(meta: dict[str, Any], start_s: float, first_s: float, end_s: float) -> str:
    """Tokens per second are those of the tokens after the first, or of all if the first is the only one."""
    num_new = meta["completion_tokens"]
    per_second = (num_new - 1) / max(end_s - first_s, 1e-9) if num_new > 1 else num_new / max(end_s - start_s, 1e-9)
    return (
        f"prompt: {meta['prompt_tokens']} tokens ({meta['cached_tokens']} cached) | new: {num_new} tokens | "
        f"first token: {first_s - start_s:.3f} s | {per_second:.1f} tokens/s"
    )


@contextmanager
def _loading_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, if that is a terminal; gives the function to be called with (done, total) bytes."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = TextColumn("Loading"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Loading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


# rtp-llm serve


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    ServerArgs.add_cli_args(parser)


def _serve(args: argparse.Namespace) -> int:
    server_args = ServerArgs.from_cli_args(args)
    announce_demo(server_args)
    with ExitStack() as stack:
        core_process = start_core_process()  # imports what it needs while this process does
        stack.callback(core_process.discard)
        from rtp_llm.srt.configs.text_only import takes_text_only  # the hub's library, only needed here

        if takes_text_only(server_args):
            hide_torch()  # before transformers is imported: the core alone computes
        from rtp_llm.srt.entrypoints.http_server import AddressError, launch_server  # a web framework, only needed here

        bar = stack.enter_context(ExitStack())
        try:
            launch_server(
                server_args,
                on_progress=bar.enter_context(_loading_bar()),
                launch_callback=bar.close,
                core_process=core_process,
            )
        except AddressError as error:
            print(f"rtp-llm: error: {error}", file=sys.stderr)
            return EXIT_ADDRESS
    return 0


# rtp-llm embed


def _add_embed_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a text on each line, or JSON with --field; - reads stdin")
    parser.add_argument("--output", "-o", required=True, metavar="FILE", help=".npy: float32 [texts, size]; or .jsonl")
    parser.add_argument("--jsonl", action="store_true", help="lines are JSON; unset: if FILE ends in .jsonl")
    parser.add_argument("--field", default="text", help="of JSON objects, the field with the text (text)")
    parser.add_argument("--dimensions", type=int, metavar="N", help="of each vector its first N components")
    parser.add_argument("--prompt-name", metavar="NAME", help="of a text of the checkpoint's, put before each text")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long; otherwise an error")
    parser.add_argument("--batch-size", type=int, default=512, metavar="N", help="texts handed over at once (512)")
    ServerArgs.add_cli_args(parser.add_argument_group("engine"), server=False)
    parser.set_defaults(log_level="warning")


def _embed(args: argparse.Namespace) -> int:
    from rtp_llm.tools.embed import run_embed  # numpy, only needed here

    return run_embed(args, _loading_bar)


# rtp-llm chat, rtp-llm models


def _add_chat_flags(parser: argparse.ArgumentParser) -> None:
    _add_server_flags(parser, "talk to this OpenAI-compatible server instead; --model then names one of its models")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    sampling = parser.add_argument_group("sampling (where not given: as the checkpoint or the server advises)")
    add_field_flags(sampling, SamplingParams, SAMPLING_FLAGS, unset=True)
    engine = parser.add_argument_group("engine")
    ServerArgs.add_cli_args(engine, server=False)
    add_field_flags(engine, ServerArgs, ["chat_template"])
    parser.set_defaults(log_level="warning", model_path=None)  # a server's first model, or the embedded one


def _chat(args: argparse.Namespace) -> int:
    return run_chat(args, _given_sampling(args), _loading_bar)


def _add_models_flags(parser: argparse.ArgumentParser) -> None:
    _add_server_flags(parser, "list what this server serves instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(log_level="warning")


def _add_server_flags(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--url", metavar="URL", help=f"{help} (http://HOST:PORT)")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key")


# rtp-llm bench


def _add_bench_flags(parser: argparse.ArgumentParser) -> None:
    bench_options.add_cli_args(parser)
    text = f"no server: show where a step's time goes, part by part; see rtp-llm bench {PROFILE_FLAG} --help"
    parser.add_argument(PROFILE_FLAG, action="store_true", help=text)


def _bench(args: argparse.Namespace) -> int:
    from rtp_llm.tools.bench_serving.command import run  # an HTTP client and numpy, only needed here

    return run(args)


def _profile(args: argparse.Namespace) -> int:
    from rtp_llm.tools.bench_profile.command import run_profile  # torch, only needed here

    return run_profile(args)


# rtp-llm verify


def _verify(args: argparse.Namespace) -> int:
    from rtp_llm.tools.verify.command import run_verify  # torch and transformers, only needed here

    return run_verify(args)


# rtp-llm port


def _port(args: argparse.Namespace) -> int:
    from rtp_llm.port.command import run_port  # libcst, only needed here

    return run_port(args)


# rtp-llm new


def _new(args: argparse.Namespace) -> int:
    from rtp_llm.tools.new.command import run_new  # transformers, only needed here

    return run_new(args)


COMMANDS = (
    Command("serve", "Serve a model over HTTP: the APIs of OpenAI and SGLang.", _add_serve_flags, _serve),
    Command("generate", "Continue a prompt, and print the text as it comes.", _add_generate_flags, _generate),
    Command("embed", "Write the vectors of a file's texts into a file.", _add_embed_flags, _embed),
    Command("chat", "Talk to a model in the terminal.", _add_chat_flags, _chat),
    Command("models", "List the supported model architectures.", _add_models_flags, run_models),
    Command("bench", "Put load on a server, and print its figures.", _add_bench_flags, _bench),
    Command(
        f"bench {PROFILE_FLAG}", "Show where a step's time goes, part by part.", profile_options.add_cli_args, _profile
    ),
    Command(
        "verify", "Compare our model with transformers', and say where they part.", verify_options.add_cli_args, _verify
    ),
    Command("port", "Turn a model file of vLLM or SGLang into one of ours.", port_options.add_cli_args, _port),
    Command("new", "Write the files of a new architecture, to begin with.", new_options.add_cli_args, _new),
    Command("tiny", "Write a tiny random checkpoint of an architecture.", add_tiny_flags, run_tiny),
)
