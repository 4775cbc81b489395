"""The engine's options, each declared once with its help text; flags, checks and documentation are made from it."""

# long: each option is declared once, here

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from rtp_llm.srt.configs.cpu_affinity import parse_cpu_affinity
from rtp_llm.srt.configs.grammar_backends import GRAMMAR_BACKENDS, LLGUIDANCE, missing_package
from rtp_llm.srt.configs.kv_events import parse_kv_events_config
from rtp_llm.srt.configs.media_limits import DEFAULT_MEDIA_LIMITS, parse_media_limits
from rtp_llm.srt.configs.options import (
    ArgumentParser,
    ServerArgsError,
    add_field_flags,
    check_options,
    markdown_rows,
    nearest,
    option,
)
from rtp_llm.srt.device.registry import ATTENTION_BACKENDS, DEVICES
from rtp_llm.srt.parser.tables import REASONING_PARSERS, TOOL_CALL_PARSERS
from rtp_llm.srt.utils.logging import LOG_LEVELS

DEMO_MODEL = str(Path(__file__).resolve().parents[2] / "assets" / "demo")
HF = "hf"  # of answers: as the tokenizer's response_template has it
DEMO_NAME = "rtp-llm-demo"
QUANTIZATIONS = (  # as in layers.quantization.registry
    "int8", "fp8", "int4", "gptq", "awq", "compressed-tensors", "modelopt", "fbgemm_fp8", "bitsandbytes",
    "mxfp4", "gguf",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """All options of an engine. Construction checks them and raises ServerArgsError."""

    model_path: str = option(
        DEMO_MODEL,
        help="The model: a directory with its checkpoint, a GGUF file (of a split one, any part), or a name on the "
        "Hugging Face hub, for a GGUF with its quantization or file: owner/name:Q4_K_M, owner/name/file.gguf.",
        aliases=("--model",),
        default_text="the embedded demo model",
    )
    tokenizer_path: str | None = option(
        None, help="Directory or hub name of the tokenizer. If unset, the model's own is used, also that in a GGUF."
    )
    skip_tokenizer_init: bool = option(False, help="Load no tokenizer. Prompts and answers are then token ids.")
    load_format: str = option(
        "auto",
        help="Which weight files to read. auto reads safetensors files and, where there are none, pt files "
        "(.bin). gguf takes a directory's or repository's GGUF file although it has others, too. dummy reads no "
        "files and fills the model with random weights.",
        choices=("auto", "safetensors", "pt", "gguf", "dummy"),
    )
    model_impl: str = option(
        "auto",
        help="Which implementation computes the model. rtp_llm is a model file of this engine; transformers is "
        "the code of the transformers library, with this engine's cache and batching; auto takes rtp_llm "
        "where there is a model file, otherwise transformers.",
        choices=("auto", "rtp_llm", "transformers"),
    )
    convert: str = option(
        "auto",
        help="What a model that generates text gives in place of text, or beside it. embed: vectors of inputs, beside "
        "text if the checkpoint has a head; classify: probabilities of labels, and reward: numbers, of a checkpoint "
        "with a layer `score`; score: how well texts fit each other, by the probabilities of the tokens yes and no, or "
        "of those under classifier_from_token in config.json, beside text; none: text alone. auto goes by the "
        "checkpoint: embed where sentence-transformers' modules.json is, classify for a ...ForSequenceClassification, "
        "score for named tokens.",
        choices=("auto", "none", "embed", "classify", "reward", "score"),
    )
    pooling: str | None = option(
        None,
        help="Which hidden states make the vector of an input: the first token's (cls), the last one's, or a mean, "
        "weighted mean or maximum of all. splade: no vector, but weights of the vocabulary (the output sparse), of a "
        "model with a head for masked tokens. If unset, as the checkpoint says; else cls for encoders, else last.",
        choices=("cls", "last", "mean", "mean_sqrt", "weighted_mean", "max", "splade"),
    )
    trust_remote_code: bool = option(
        False, help="Run the Python code that comes with the checkpoint. Use it only for checkpoints that you trust."
    )
    context_length: int | None = option(
        None,
        help="Largest number of tokens of a request, prompt and answer together. If unset, the model's own limit.",
        low=1,
    )
    revision: str | None = option(None, help="Branch, tag or commit of the model on the hub.")
    download_dir: str | None = option(
        None, help="Directory that keeps models downloaded from the hub. If unset, the hub library's own cache."
    )
    dtype: str = option(
        "auto",
        help="Number type of weights and activations. auto is the checkpoint's own type; half means float16 and "
        "float means float32.",
        choices=("auto", "float32", "bfloat16", "float16", "half", "float"),
    )
    quantization: str | None = option(
        None,
        help="How the weights are stored in memory. int8, fp8 and int4 quantize any checkpoint while it is "
        "loaded; the others read checkpoints that are stored so. If unset, the checkpoint's own scheme is used, if "
        "it has one.",
        choices=QUANTIZATIONS,
    )
    packed_cache: bool = option(
        False,
        help="On a CPU, keep the weights as kernels read them, quantized and packed, in ~/.cache/rtp_llm/packed, and "
        "read them from there at later starts of the same checkpoint with the same options. RTP_LLM_PACKED_CACHE names "
        "another folder.",
    )
    json_model_override_args: str = option(
        "{}",
        help="JSON object whose entries replace those of the model's config.json.",
        aliases=("--hf-overrides", "--hf_overrides"),
    )
    device: str | None = option(
        None, help="Where the model runs. If unset, cuda where there is a GPU, otherwise cpu.", choices=DEVICES.names
    )
    tp_size: int = option(
        1,
        help="Tensor parallelism: the number of worker processes that share the computation of each layer. It must "
        "divide the model's heads and sizes; fewer key/value heads than processes must divide their number.",
        low=1,
        aliases=("--tensor-parallel-size",),
    )
    pp_size: int = option(
        1,
        help="Pipeline parallelism: the number of stages, each with a part of the layers, of --tp-size processes each. "
        "As many steps are computed at once as there are stages.",
        low=1,
        aliases=("--pipeline-parallel-size",),
    )
    pp_split: str = option(
        "layers",
        help="How layers are divided into stages: layers gives each as many, bytes about as many bytes of weights, the "
        "head's included.",
        choices=("layers", "bytes"),
    )
    ep_size: int = option(
        1,
        help="Expert parallelism: into how many parts the experts of a model are divided. It must divide --tp-size, "
        "and the number of experts; --tp-size / --ep-size processes share each part.",
        low=1,
        aliases=("--expert-parallel-size",),
    )
    enable_dp_attention: bool = option(
        False,
        help="The --tp-size processes divide requests in place of heads: each has the cache of its own, and all layers "
        "whole but the experts, which are divided among all. For models with experts whose cache is the same for all "
        "heads (DeepSeek's).",
    )
    moe_a2a_backend: str = option(
        "auto",
        help="How, with --enable-dp-attention, tokens come to the experts of other ranks: all_to_all sends a token to "
        "the ranks of its experts only, none to all ranks. auto is all_to_all on CPUs and none on GPUs.",
        choices=("auto", "all_to_all", "none"),
    )
    dp_size: int = option(
        1,
        help="Data parallelism: the number of cores with the whole model behind one server, of --tp-size times "
        "--pp-size processes each. A request goes to the core that holds its prefix, else to the least loaded one.",
        low=1,
        aliases=("--data-parallel-size",),
        server=True,
    )
    distributed_executor_backend: str = option(
        "mp",
        help="What runs the ranks: mp, processes of this machine; ray, actors that Ray places on one machine or "
        "several (experimental; pip install 'rtp-llm[ray]').",
        choices=("mp", "ray"),
    )
    cpu_threads: int | None = option(
        None,
        help="Number of threads that compute on a CPU, of all ranks together. If unset, one for each physical core, "
        "of a hybrid processor for each fast one, as far as this process may use them; OMP_NUM_THREADS limits it.",
        low=1,
    )
    pin_cpu_threads: bool = option(
        False,
        help="Bind each thread that computes to a core of its own: for a machine that does nothing else. Otherwise "
        "the system may move them when another program takes a core.",
    )
    cpu_affinity: str | None = option(
        None,
        help="Processors on which ranks compute: numa divides the machine's NUMA nodes and their cores among them; "
        "0-3;4-7 names those of each rank, of all that --dp-size, --pp-size and --tp-size make. A rank then has a "
        "thread for each of its cores, or its part of --cpu-threads.",
    )
    mem_fraction_static: float | None = option(
        None,
        help="Fraction of the free memory that weights and cache may take. If unset, 0.6 on a CPU and 0.88 on a GPU.",
        low=0.01,
        high=1,
    )
    max_total_tokens: int | None = option(
        None, help="Number of tokens that the cache can hold. If unset, as many as the memory allows.", low=1
    )
    max_running_requests: int | None = option(
        None, help="Largest number of requests that are computed at the same time. If unset, 256.", low=1
    )
    chunked_prefill_size: int | None = option(
        None,
        help="Number of prompt tokens computed in one step; longer prompts are cut into chunks of this size. -1 "
        "never cuts a prompt. If unset, 2048 on a CPU and 8192 on a GPU.",
        low=-1,
    )
    max_prefill_tokens: int = option(
        16384, help="Largest number of prompt tokens that all requests together compute in one step.", low=1
    )
    schedule_policy: str = option(
        "fcfs",
        help="Which waiting request runs next. fcfs takes the one that came first; lpm the one with the longest "
        "cached prefix; priority the one with the lowest priority number, and among equal ones the first. "
        "Under priority, a request can wait as long as more urgent ones keep coming.",
        choices=("fcfs", "lpm", "priority"),
    )
    page_size: int = option(1, help="Number of tokens in a page of the cache.", low=1)
    kv_cache_dtype: str = option(
        "auto",
        help="Number type of the cached keys and values. auto is the model's own type. int8 stores a scale for "
        "each token and head, and works on a CPU only.",
        choices=("auto", "bf16", "int8"),
    )
    swa_full_tokens_ratio: float = option(
        0.8,
        help="Size of the cache of sliding-window layers, as a fraction of the cache of full-attention layers.",
        low=0.01,
        high=1,
    )
    state_cache_fraction: float | None = option(
        None,
        help="Of a model that keeps recurrent states, the fraction of the cache's memory for checkpoints: states of "
        "prefixes, from which later requests resume. If unset, 0.2, and all that is left in a model without attention.",
        low=0,
        high=1,
    )
    state_checkpoint_interval: int | None = option(
        None,
        help="Of a model that keeps recurrent states, the number of prompt tokens between two checkpoints, rounded up "
        "to a multiple of 64. 0 writes them only where prompts part and end. If unset, 1024 or more, by the memory "
        "that there is.",
        low=0,
    )
    kv_events_config: str | None = option(
        None,
        help="JSON object, as vLLM's: publish over ZeroMQ what the prefix cache holds, for routers and other caches, "
        'such as {"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}. Whoever reaches the address '
        "can read the tokens of all prompts.",
    )
    disable_radix_cache: bool = option(False, help="Do not reuse the cached prefixes of earlier requests.")
    attention_backend: str | None = option(
        None,
        help="Implementation of attention. If unset, the fastest one that works on this machine.",
        choices=ATTENTION_BACKENDS.names,
    )
    disable_prefix_sharing: bool = option(
        False,
        help="Read a cached prefix once for each running request that has it, instead of once for all of them. "
        "Other requests then cannot change a result in its last digits.",
    )
    disable_cpu_graph: bool = option(
        False,
        help="Run the Python code of the layers in each step, instead of recording decode steps and small steps of "
        "prompts once and replaying them.",
    )
    disable_cuda_graph: bool = option(
        False,
        help="On a GPU, launch the layers of each decode step one by one, instead of recording steps at the start "
        "and launching each as a whole.",
    )
    cuda_graph_max_bs: int | None = option(
        None,
        help="On a GPU, the largest number of requests whose decode step is recorded. If unset, 256, or "
        "--max-running-requests if that is less.",
        low=1,
    )
    cuda_graph_bs: list[int] | None = option(  # noqa: RUF009
        None,
        help="On a GPU, the numbers of requests whose decode steps are recorded; others are filled up to the next of "
        "them. If unset, 1, 2, 4, 8 and every eighth number up to the largest.",
        low=1,
    )
    enable_multimodal: bool = option(
        True,
        help="Accept images and videos if the model can take them. Otherwise the model is served as a language model.",
    )
    limit_mm_data_per_request: str = option(
        "{}",
        help='JSON object with the largest number of images, videos and sounds of a request, such as {"image": '
        f"4}}. For a kind that is not named: {DEFAULT_MEDIA_LIMITS['image']} images, "
        f"{DEFAULT_MEDIA_LIMITS['video']} videos.",
    )
    media_url_max_file_size_mb: float = option(
        64.0, help="Largest image or video that is fetched or decoded, in MiB.", low=2**-20, default_text="64"
    )
    media_memory_budget_mb: float = option(
        2048.0,
        help="Memory in MiB that the images and videos of all requests together may take in the server's process"
        " while they are fetched, decoded and prepared. A medium that finds no room waits; one that needs "
        "more than the whole budget is refused.",
        low=1,
        default_text="2048",
    )
    media_io_timeout: float = option(30.0, help="Seconds within which a URL must be fetched.", low=0.001)
    allowed_media_domains: list[str] | None = option(  # noqa: RUF009
        None,
        help="Hosts that the URLs of media may name, even if their addresses are private. If unset, all hosts "
        "with public addresses.",
    )
    mm_embedding_cache_size_mb: int = option(
        512,
        help="Memory in MiB that keeps what a multimodal model's encoders computed from images and videos. 0 "
        "keeps nothing.",
        low=0,
    )
    disable_overlap_schedule: bool = option(False, help="Plan a step only after the one before it has ended.")
    random_seed: int | None = option(
        None, help="Makes the seeds of requests that bring none reproducible.", low=0, high=2**63 - 1
    )
    log_level: str = option("info", help="Least severe messages that are logged.", choices=LOG_LEVELS)
    decode_log_interval: int = option(40, help="Number of steps between two status lines of a busy engine.", low=1)
    grammar_backend: str = option(
        LLGUIDANCE,
        help="Compiler of the grammars of structured output. xgrammar (pip install 'rtp-llm[xgrammar]') keeps fewer "
        "keywords of JSON schemas; grammars that it has no form for are llguidance's there, too.",
        choices=GRAMMAR_BACKENDS,
    )
    watchdog_timeout: float = option(
        300.0,
        help="Seconds without a sign of life after which the engine's core counts as dead and is restarted.",
        low=1,
    )
    dist_timeout: float | None = option(
        None, help="Seconds after which a worker process that does not answer is an error. If unset, 600.", low=1
    )
    host: str = option(
        "127.0.0.1", help="Address to listen on. 0.0.0.0 listens on all addresses of this machine.", server=True
    )
    port: int = option(30000, help="Port to listen on. 0 takes any free port.", low=0, high=65535, server=True)
    header_timeout: float = option(
        10.0, help="Seconds within which all headers of a request must arrive.", low=0.001, server=True
    )
    body_timeout: float = option(
        30.0,
        help="Seconds within which the body of a request must arrive. A large body may take one second more for "
        "each 16 KiB that have arrived.",
        low=0.001,
        server=True,
    )
    send_timeout: float = option(
        120.0,
        help="Seconds within which a client must receive what the server has written to it.",
        low=0.001,
        server=True,
    )
    keep_alive_timeout: float = option(
        30.0, help="Seconds that a connection may stay open without a request.", low=0.001, server=True
    )
    max_connections: int = option(
        4096,
        help="Largest number of open connections. When it is reached, a connection without a running request is "
        "closed to make room; if there is none, the new one is refused with an error.",
        low=1,
        server=True,
    )
    api_key: str | None = option(
        None,
        help="Key that clients must send (Authorization: Bearer KEY), except for /health and /metrics. Other "
        "users of this machine can see it in the list of processes; --api-key-file and the variable "
        "RTP_LLM_API_KEY hide it.",
        server=True,
    )
    api_key_file: str | None = option(None, help="File with such keys, one on each line.", server=True)
    admin_api_key: str | None = option(
        None,
        help="Key for requests that change the server (/flush_cache, ending all requests); it is valid for all "
        "other requests too. If unset, RTP_LLM_ADMIN_API_KEY; if that is unset too, the clients' key is "
        "enough.",
        server=True,
    )
    admin_api_key_file: str | None = option(None, help="File with such keys, one on each line.", server=True)
    allowed_hosts: list[str] | None = option(  # noqa: RUF009
        None,
        help="Host names by which clients may call this server, such as llm.example.com, or .example.com for all"
        " names below it; * allows any name. If unset, any name is allowed, except on a loopback address "
        "without a key: there a name with a dot is refused, because foreign web pages use such names.",
        server=True,
    )
    ssl_certfile: str | None = option(
        None, help="File with the certificate and its chain, in PEM format. The server then speaks HTTPS.", server=True
    )
    ssl_keyfile: str | None = option(
        None,
        help="File with the certificate's key, in PEM format. If unset, the key is in --ssl-certfile.",
        server=True,
    )
    ssl_keyfile_password: str | None = option(None, help="Password of the key file.", server=True)
    allowed_origins: list[str] | None = option(  # noqa: RUF009
        None,
        help="Origins of web pages whose scripts may call this server (CORS), such as https://chat.example.com; "
        "* allows any. If unset, none.",
        server=True,
    )
    served_model_name: str | list[str] | None = option(  # noqa: RUF009
        None,
        help="Name of the model in the API, or several names; answers contain the first. If unset, the model "
        f"path, or {DEMO_NAME} for the embedded model.",
        server=True,
    )
    accept_any_model_name: bool = option(
        False,
        help="Answer requests whatever model they name. Otherwise a request for another model is a 404.",
        server=True,
    )
    allowed_local_media_path: str | None = option(
        None,
        help="Directory whose image and video files requests may name. If unset, requests cannot name files.",
        server=True,
    )
    chat_template: str | None = option(
        None,
        help="Chat template, which turns messages into a prompt: a .jinja file, a .json file, or the name of a "
        "registered conversation or of one of the tokenizer's templates. If unset, the tokenizer's own "
        "template, otherwise the one that belongs to the model's name. Of a model that scores pairs: how a query and "
        "a document become one text.",
        server=True,
    )
    tool_call_parser: str | None = option(
        None,
        help="Form of the model's tool calls, by the names of vLLM and SGLang. none finds no calls; hf reads the "
        "tokenizer's response_template. If unset, that, or else the one that the chat template's text tells.",
        choices=(*TOOL_CALL_PARSERS, HF),
        server=True,
    )
    reasoning_parser: str | None = option(
        None,
        help="Form of the model's thinking, by the names of vLLM and SGLang. none leaves it in the content. If "
        "unset, as --tool-call-parser.",
        choices=(*REASONING_PARSERS, HF),
        server=True,
    )
    sampling_defaults: str = option(
        "model",
        help="Sampling parameters of /v1 requests that do not give them. model takes those of the model's "
        "generation_config.json; openai takes those that OpenAI documents.",
        choices=("model", "openai"),
        server=True,
    )
    max_queued_requests: int | None = option(
        4096,
        help="Largest number of sequences that may wait in addition to the running ones before new requests get "
        "a 503. A request has one sequence for each prompt and each choice.",
        low=0,
        server=True,
    )
    max_sequences_per_request: int = option(
        1024, help="Largest number of sequences of one request: the number of its prompts times n.", low=1, server=True
    )
    max_stored_responses: int = option(
        1024,
        help="Largest number of responses of /v1/responses that are kept for later requests. If there are more, the "
        "least recently used is dropped; 0 keeps none.",
        low=0,
        server=True,
    )
    max_stored_responses_mb: int = option(
        64,
        help="Largest size of these responses with their conversations, in MiB of JSON.",
        low=1,
        server=True,
    )
    max_body_size: int = option(32 * 2**20, help="Largest request body, in bytes.", low=1024, server=True)
    template_timeout: float = option(
        10.0, help="Seconds that the chat template may take for the messages of one request.", low=0.001, server=True
    )
    rerank_format: str = option(
        "jina",
        help="How /v1/rerank answers. jina: an object with results, as Jina, Cohere and vLLM do; sglang: a plain list "
        "of score, document, index and meta_info.",
        choices=("jina", "sglang"),
        server=True,
    )
    strict_requests: bool = option(
        False,
        help="Refuse every field that is not supported, even if it is only a hint or its value asks for nothing.",
        server=True,
    )
    shutdown_timeout: float = option(
        60.0, help="Seconds that running requests get to finish after SIGTERM or Ctrl-C.", low=0, server=True
    )
    vllm_metrics: bool = option(
        False,
        help="Tell in /metrics the server's figures under vLLM's names, too (vllm:num_requests_running, ...), for "
        "dashboards and autoscalers that know those.",
        server=True,
    )
    log_requests: bool = option(False, help="Log every request when it arrives and when it ends.", server=True)
    log_requests_level: int = option(
        2,
        help="What is logged of a request. 0: ids and counts; 1: also the sampling parameters; 2: also the "
        "beginning of prompt and answer; 3: also the whole prompt and answer.",
        choices=(0, 1, 2, 3),
        server=True,
    )
    log_level_http: str | None = option(
        None,
        help="Least severe messages of the HTTP layer that are logged. If unset, the same as --log-level.",
        choices=LOG_LEVELS,
        server=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not self.model_path.strip():
            raise ServerArgsError("model_path is empty; give a checkpoint directory or a hub id")
        if self.chunked_prefill_size == 0:
            raise ServerArgsError("chunked_prefill_size must be positive, or -1 to never cut prompts; not 0")
        if self.allowed_local_media_path is not None and not Path(self.allowed_local_media_path).is_dir():
            raise ServerArgsError(f"allowed_local_media_path: there is no directory {self.allowed_local_media_path!r}")
        if (package := missing_package(self.grammar_backend)) is not None:
            raise ServerArgsError(
                f"grammar_backend {self.grammar_backend}: it is not installed: pip install '{package}'"
            )
        if self.distributed_executor_backend == "ray" and find_spec("ray") is None:
            raise ServerArgsError("distributed_executor_backend ray: it is not installed: pip install 'rtp-llm[ray]'")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ServerArgsError("ssl_keyfile is given without ssl_certfile; give the certificate, too")
        for name in ("api_key_file", "admin_api_key_file", "ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ServerArgsError(f"{name}: there is no file {path!r}")
        parse_media_limits(self.limit_mm_data_per_request)
        if self.tp_size % self.ep_size:
            raise ServerArgsError(f"ep_size {self.ep_size} must divide tp_size, which is {self.tp_size}")
        self._check_dp_attention()
        if parse_kv_events_config(self.kv_events_config) is not None and self.disable_radix_cache:
            raise ServerArgsError("kv_events_config tells of the prefix cache: leave disable_radix_cache out, or it")
        parse_cpu_affinity(self.cpu_affinity, self.num_ranks * self.dp_size)

    def _check_dp_attention(self) -> None:
        if not self.enable_dp_attention:
            if self.moe_a2a_backend == "all_to_all":
                raise ServerArgsError(
                    "moe_a2a_backend all_to_all sends tokens to other ranks, but without enable_dp_attention all ranks "
                    "have all tokens: give both, or leave it out"
                )
            return
        if self.tp_size == 1 or self.pp_size > 1 or self.ep_size not in (1, self.tp_size):
            raise ServerArgsError(
                "enable_dp_attention divides requests and experts among --tp-size processes: give a tp_size above 1, "
                "no pp_size, and as ep_size the tp_size or nothing"
            )
        if parse_kv_events_config(self.kv_events_config) is not None:
            raise ServerArgsError(
                "kv_events_config tells of one cache, but enable_dp_attention makes several: leave one"
            )

    @property
    def is_demo(self) -> bool:
        """Whether the model is the embedded one, the default."""
        return self.model_path == DEMO_MODEL

    @property
    def num_ranks(self) -> int:
        """Processes that compute a model together."""
        return self.tp_size * self.pp_size

    @property
    def num_expert_parts(self) -> int:
        """Parts that experts are divided into."""
        return self.tp_size if self.enable_dp_attention else self.ep_size

    @property
    def num_request_parts(self) -> int:
        """Ranks that have requests, and a cache, of their own; 1: all ranks compute all requests."""
        return self.tp_size if self.enable_dp_attention else 1

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
        """Kind of media -> how many a request may hold; kinds without a limit are left out."""
        return DEFAULT_MEDIA_LIMITS | parse_media_limits(self.limit_mm_data_per_request)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make options from keyword arguments. An unknown one is an error that names the nearest option."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ServerArgsError(f"unknown engine argument {name!r}{nearest(name, names)}")
        return cls(**values)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """Make options from the result of a parser with ``add_cli_args``; other attributes are ignored."""
        names = [field.name for field in dataclasses.fields(cls) if hasattr(args, field.name)]
        return cls(**{name: getattr(args, name) for name in names})

    @staticmethod
    def add_cli_args(parser: argparse._ActionsContainer, server: bool = True) -> None:
        """Add all flags; without ``server``, those that an engine without HTTP uses."""
        fields = dataclasses.fields(ServerArgs)
        add_field_flags(parser, ServerArgs, [field.name for field in fields if server or not field.metadata["server"]])


def prepare_server_args(argv: Sequence[str]) -> ServerArgs:
    """Return ServerArgs from a command line; exit with a message if it is wrong."""
    parser = ArgumentParser(prog="rtp-llm")
    ServerArgs.add_cli_args(parser)
    try:
        return ServerArgs.from_cli_args(parser.parse_args(argv))
    except ServerArgsError as error:
        parser.error(str(error))


def markdown() -> str:
    """Return the page on the engine's options (docs/server_arguments.md)."""
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
