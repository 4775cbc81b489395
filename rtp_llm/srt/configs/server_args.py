"""The engine's options: each declared once, with its help text; flags, checks and documentation follow from that."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rtp_llm.srt.configs.options import (
    ArgumentParser,
    ServerArgsError,
    add_field_flags,
    check_options,
    markdown_rows,
    nearest,
    option,
)
from rtp_llm.srt.utils.logging import LOG_LEVELS

DEMO_MODEL = str(Path(__file__).resolve().parents[2] / "assets" / "demo")
DEMO_NAME = "rtp-llm-demo"
MEDIA_KINDS = ("image", "video", "audio")
DEFAULT_MEDIA_LIMITS = {"image": 64, "video": 4}  # of a request
QUANTIZATIONS = ("int8", "int4", "gptq", "awq", "compressed-tensors", "mxfp4")  # as in layers.quantization.registry


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """All options of an engine. Construction checks them and raises ServerArgsError."""

    model_path: str = option(
        DEMO_MODEL,
        help="checkpoint directory, or Hugging Face hub id",
        aliases=("--model",),
        default_text="the embedded demo model",
    )
    tokenizer_path: str | None = option(None, help="directory or hub id of the tokenizer; unset: the model's")
    skip_tokenizer_init: bool = option(False, help="load no tokenizer: prompts and results are token ids")
    load_format: str = option(
        "auto",
        help="which weight files to read; auto: safetensors, else pt; dummy: random weights, no files",
        choices=("auto", "safetensors", "pt", "dummy"),
    )
    model_impl: str = option(
        "auto",
        help="whose code the model runs by; rtp_llm: a model file of ours; transformers: the library's, with our cache "
        "and batching; auto: ours where there is one, else the library's",
        choices=("auto", "rtp_llm", "transformers"),
    )
    trust_remote_code: bool = option(False, help="run Python code that comes with the checkpoint")
    context_length: int | None = option(None, help="most tokens of a request; unset: the model's", low=1)
    revision: str | None = option(None, help="branch, tag or commit on the hub")
    download_dir: str | None = option(None, help="where hub downloads are kept; unset: the hub's cache")
    dtype: str = option(
        "auto",
        help="type of weights and activations; auto: the checkpoint's; half is float16, float is float32",
        choices=("auto", "float32", "bfloat16", "float16", "half", "float"),
    )
    quantization: str | None = option(
        None,
        help="scheme of the weights; int8 and int4 quantize any checkpoint while it is loaded; unset: the checkpoint's "
        "own, if it has one",
        choices=QUANTIZATIONS,
    )
    json_model_override_args: str = option("{}", help="JSON object that overrides entries of the model's config.json")
    device: str | None = option(None, help="unset: cuda where there is a GPU, else cpu", choices=("cpu", "cuda"))
    tp_size: int = option(
        1,
        help="tensor parallelism: number of workers that share each layer",
        choices=(1, 2),
        aliases=("--tensor-parallel-size",),
    )
    mem_fraction_static: float | None = option(
        None, help="fraction of the free memory for weights and cache; unset: 0.6 on CPU, 0.88 on GPU", low=0.01, high=1
    )
    max_total_tokens: int | None = option(None, help="tokens in the cache; unset: what memory allows", low=1)
    max_running_requests: int | None = option(None, help="most requests running at once; unset: 256", low=1)
    chunked_prefill_size: int | None = option(
        None,
        help="prompt tokens per step; longer prompts are cut; unset: 2048 on CPU, 8192 on GPU; -1: never cut",
        low=-1,
    )
    max_prefill_tokens: int = option(16384, help="prompt tokens of all requests in one step", low=1)
    schedule_policy: str = option(
        "fcfs",
        help="who is admitted next: first come; longest cached prefix; or lowest priority number, then first come, "
        "where a request may wait for as long as more urgent ones come",
        choices=("fcfs", "lpm", "priority"),
    )
    page_size: int = option(1, help="tokens per cache page", low=1)
    kv_cache_dtype: str = option(
        "auto",
        help="type that keys and values are stored in; auto: the model's; int8: with a scale for each token and head; "
        "on a CPU alone",
        choices=("auto", "bf16", "int8"),
    )
    swa_full_tokens_ratio: float = option(
        0.8, help="tokens in the cache of sliding-window layers, relative to full-attention layers", low=0.01, high=1
    )
    disable_radix_cache: bool = option(False, help="do not reuse cached prefixes")
    attention_backend: str | None = option(
        None, help="unset: the fastest that works here", choices=("cpu", "torch_native")
    )
    disable_prefix_sharing: bool = option(
        False,
        help="read a cached prefix that running requests have in common once for each of them, not once for all; what "
        "else runs then changes nothing in a request's results, not even their last digits",
    )
    disable_cpu_graph: bool = option(
        False, help="run a decode step's layers in Python each time, rather than record them once and replay them"
    )
    enable_multimodal: bool = option(
        True, help="take images and videos where the model does; otherwise it is served as a language model"
    )
    limit_mm_data_per_request: str = option(
        "{}",
        help='JSON object: most images, videos, sounds of a request, such as {"image": 4, "video": 0}; for a kind that '
        f"is not named: {DEFAULT_MEDIA_LIMITS['image']} images, {DEFAULT_MEDIA_LIMITS['video']} videos",
    )
    media_url_max_file_size_mb: float = option(
        64.0, help="largest image or video to fetch or decode, in MiB", low=2**-20, default_text="64"
    )
    media_memory_budget_mb: float = option(
        2048.0,
        help="MiB that the images and videos of all requests may take in the server's process while they are fetched, "
        "decoded and prepared; what finds no room waits, and what needs more than there is by itself is refused",
        low=1,
        default_text="2048",
    )
    media_io_timeout: float = option(30.0, help="seconds until a URL must have been fetched", low=0.001)
    allowed_media_domains: list[str] | None = option(  # noqa: RUF009
        None,
        help="hosts that URLs of media may name, addresses of private networks included; unset: all but those",
    )
    mm_embedding_cache_size_mb: int = option(
        512, help="MiB for what the encoders of a multimodal model made of images and videos; 0: none is kept", low=0
    )
    disable_overlap_schedule: bool = option(False, help="plan a step only after the one before has ended")
    random_seed: int | None = option(
        None, help="makes the seeds of requests without one reproducible", low=0, high=2**63 - 1
    )
    log_level: str = option("info", help="least severe messages to log", choices=LOG_LEVELS)
    decode_log_interval: int = option(40, help="steps between two status lines of a busy core", low=1)
    watchdog_timeout: float = option(
        300.0, help="seconds of silence after which the core counts as dead and is restarted", low=1
    )
    dist_timeout: float | None = option(None, help="seconds until a silent worker is an error; unset: 600", low=1)
    host: str = option("127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine's", server=True)
    port: int = option(30000, help="port to listen on; 0: any free one", low=0, high=65535, server=True)
    header_timeout: float = option(
        10.0, help="seconds in which a request's headers must have come", low=0.001, server=True
    )
    body_timeout: float = option(
        30.0,
        help="seconds in which a request's body must have come; a body of which much has come, 16 KiB for each further "
        "second, may take longer",
        low=0.001,
        server=True,
    )
    send_timeout: float = option(
        120.0, help="seconds in which a client must take what has been written to it", low=0.001, server=True
    )
    keep_alive_timeout: float = option(
        30.0, help="seconds that a connection may wait for its next request", low=0.001, server=True
    )
    max_connections: int = option(
        4096,
        help="most connections at once; where there are as many, one that only waits for a request is closed, else the "
        "new one is told so",
        low=1,
        server=True,
    )
    api_key: str | None = option(
        None,
        help="key that clients must show (Authorization: Bearer KEY), /health and /metrics excepted; other users of "
        "this machine can read it in the list of processes: rather use --api-key-file, or set RTP_LLM_API_KEY",
        server=True,
    )
    api_key_file: str | None = option(None, help="file with such keys, one in each line", server=True)
    admin_api_key: str | None = option(
        None,
        help="key for what changes the server (/flush_cache, aborting all requests), and for all else; unset: "
        "RTP_LLM_ADMIN_API_KEY, else what clients have is enough",
        server=True,
    )
    admin_api_key_file: str | None = option(None, help="file with such keys, one in each line", server=True)
    allowed_hosts: list[str] | None = option(  # noqa: RUF009
        None,
        help="names by which clients may call this server (Host), such as llm.example.com, or .example.com for all "
        "below; *: any; unset: any, but on a loopback address without a key no name with a dot in it, as pages from "
        "elsewhere have",
        server=True,
    )
    ssl_certfile: str | None = option(None, help="certificate, with its chain, in PEM: HTTPS is spoken", server=True)
    ssl_keyfile: str | None = option(
        None, help="the certificate's key in PEM; unset: it is in --ssl-certfile", server=True
    )
    ssl_keyfile_password: str | None = option(None, help="password of the key's file", server=True)
    allowed_origins: list[str] | None = option(  # noqa: RUF009
        None,
        help="origins of web pages whose scripts may ask this server (CORS), such as https://chat.example.com; *: any; "
        "unset: none",
        server=True,
    )
    served_model_name: str | list[str] | None = option(  # noqa: RUF009
        None,
        help="the model's name in the API, or several, of which answers give the first; unset: the model path, or "
        f"{DEMO_NAME} for the embedded one",
        server=True,
    )
    accept_any_model_name: bool = option(
        False, help="answer requests whatever model they name; otherwise another name is a 404", server=True
    )
    allowed_local_media_path: str | None = option(
        None, help="directory below which requests may name files of media; unset: none may", server=True
    )
    chat_template: str | None = option(
        None,
        help="what makes a prompt of messages: a .jinja file, a .json file, or the name of a registered conversation "
        "or of one of the tokenizer's templates; unset: the tokenizer's own, else what the model's name suggests",
        server=True,
    )
    sampling_defaults: str = option(
        "model",
        help="sampling parameters that a /v1 request does not give; model: as generation_config.json advises; "
        "openai: as OpenAI documents them",
        choices=("model", "openai"),
        server=True,
    )
    max_queued_requests: int | None = option(
        4096,
        help="most sequences (a request has one for each prompt and choice) beyond those that may run at once, before "
        "new requests get a 503",
        low=0,
        server=True,
    )
    max_sequences_per_request: int = option(
        1024, help="most sequences of one request: its prompts times its n", low=1, server=True
    )
    max_body_size: int = option(32 * 2**20, help="bytes of the largest request body", low=1024, server=True)
    template_timeout: float = option(
        10.0, help="seconds that the chat template may take for a request's messages", low=0.001, server=True
    )
    strict_requests: bool = option(
        False,
        help="refuse fields that are not supported even where their value asks for nothing, and hints",
        server=True,
    )
    shutdown_timeout: float = option(
        60.0, help="seconds that running requests have to finish after SIGTERM or Ctrl-C", low=0, server=True
    )
    log_requests: bool = option(False, help="log every request when it comes and when it ends", server=True)
    log_requests_level: int = option(
        2,
        help="what is logged of a request; 0: ids and counts; 1: and sampling parameters; 2: and the beginnings of "
        "prompt and output; 3: and all of both",
        choices=(0, 1, 2, 3),
        server=True,
    )
    log_level_http: str | None = option(
        None, help="least severe messages of the HTTP layer to log; unset: --log-level", choices=LOG_LEVELS, server=True
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not self.model_path.strip():
            raise ServerArgsError("model_path is empty; give a checkpoint directory or a hub id")
        if self.chunked_prefill_size == 0:
            raise ServerArgsError("chunked_prefill_size must be positive, or -1 to never cut prompts; not 0")
        if self.allowed_local_media_path is not None and not Path(self.allowed_local_media_path).is_dir():
            raise ServerArgsError(f"allowed_local_media_path: there is no directory {self.allowed_local_media_path!r}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ServerArgsError("ssl_keyfile is given without ssl_certfile; give the certificate, too")
        for name in ("api_key_file", "admin_api_key_file", "ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ServerArgsError(f"{name}: there is no file {path!r}")
        _media_limits(self.limit_mm_data_per_request)

    @property
    def is_demo(self) -> bool:
        """Whether the model is the embedded one, which is served when none is named."""
        return self.model_path == DEMO_MODEL

    @property
    def model_names(self) -> list[str]:
        """The model's names in the API, at least one."""
        given = self.served_model_name
        return [given] if isinstance(given, str) else list(given or [DEMO_NAME if self.is_demo else self.model_path])

    @property
    def model_name(self) -> str:
        """The model's name in answers."""
        return self.model_names[0]

    @property
    def media_limits(self) -> dict[str, int]:
        """How many of a kind of media a request may hold; kinds without a limit are not there."""
        return DEFAULT_MEDIA_LIMITS | _media_limits(self.limit_mm_data_per_request)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From keyword arguments. Unknown ones are an error that names the nearest option."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ServerArgsError(f"unknown engine argument {name!r}{nearest(name, names)}")
        return cls(**values)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """From what a parser with ``add_cli_args`` has parsed; attributes of other flags are left alone."""
        names = [field.name for field in dataclasses.fields(cls) if hasattr(args, field.name)]
        return cls(**{name: getattr(args, name) for name in names})

    @staticmethod
    def add_cli_args(parser: argparse._ActionsContainer, server: bool = True) -> None:
        """All flags, or without ``server`` those only that an engine without HTTP has a use for."""
        fields = dataclasses.fields(ServerArgs)
        add_field_flags(parser, ServerArgs, [field.name for field in fields if server or not field.metadata["server"]])


def prepare_server_args(argv: Sequence[str]) -> ServerArgs:
    """ServerArgs from a command line; exits with a message if it is wrong."""
    parser = ArgumentParser(prog="rtp-llm")
    ServerArgs.add_cli_args(parser)
    try:
        return ServerArgs.from_cli_args(parser.parse_args(argv))
    except ServerArgsError as error:
        parser.error(str(error))


def _media_limits(text: str) -> dict[str, int]:
    """What ``limit_mm_data_per_request`` says."""
    name = "limit_mm_data_per_request"
    try:
        limits = json.loads(text)
    except ValueError as error:
        raise ServerArgsError(f"{name} is not JSON: {error}; got {text!r}") from None
    if not isinstance(limits, dict):
        raise ServerArgsError(f'{name} must be an object such as {{"image": 4}}, not {text!r}')
    for kind, limit in limits.items():
        if kind not in MEDIA_KINDS:
            raise ServerArgsError(f"{name} names {kind!r}; kinds of media are {', '.join(MEDIA_KINDS)}")
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ServerArgsError(f"{name}: the limit of {kind} must be a whole number from 0 on, not {limit!r}")
    return limits


def markdown() -> str:
    """The page on the engine's options (docs/server_arguments.md)."""
    head = [
        "# Engine and server arguments",
        "",
        "Written by `python -m rtp_llm.srt.configs.server_args`; do not edit by hand. Every flag of the command line",
        "is an argument of `Engine(...)` and a field of `ServerArgs`, with underscores for dashes. Flags may be",
        "shortened as long as they stay unambiguous.",
        "",
        "| flag | type | default | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join(head + markdown_rows(ServerArgs)) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
