"""Servers for tests, in this process or in one of their own, and a tiny checkpoint with a tokenizer for them."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rtp_llm.srt.checkpoint import read_model_config, read_tokenizer
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.core import EngineCore
from rtp_llm.srt.entrypoints.access import Access
from rtp_llm.srt.entrypoints.asgi import Gate
from rtp_llm.srt.entrypoints.connections import Uvicorn
from rtp_llm.srt.entrypoints.engine import ThreadRunner
from rtp_llm.srt.entrypoints.http_server import make_app, open_listener, with_cors
from rtp_llm.srt.managers.engine_client import EngineClient
from rtp_llm.srt.messages import CoreInfo, CoreStats
from rtp_llm.srt.utils.ipc import QueueLink
from warm_python import WarmPython

ROOT = Path(__file__).resolve().parents[2]
CONTEXT_LENGTH = 512
START_TIMEOUT_S = 120.0
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' + suffix|default('') }}{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CORPUS = ["the cat sat on the mat", "a dog is not a cat", "größer als 東京 und 🙂", "hello hello world"] * 8


def make_checkpoint(folder: Path) -> str:
    """A two-layer llama whose greedy answers are of some variety, and a byte-level tokenizer with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=SPECIAL[1:]
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(fast),
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@dataclass
class ThreadCore:
    """A core on a thread of this process, as the server sees a core."""

    client: EngineClient
    info: CoreInfo
    core: EngineCore
    is_ready: bool = True

    @property
    def stats(self) -> CoreStats:
        return self.client.stats


@contextmanager
def thread_core(args: ServerArgs) -> Iterator[ThreadCore]:
    link = QueueLink()
    client = EngineClient(link.client)
    runner = ThreadRunner(partial(EngineCore, args, read_model_config(args), link.core), client, link)
    try:
        yield ThreadCore(client, runner.core.info, runner.core)
    finally:
        runner.stop()


@dataclass
class InProcess:
    """A server in this process: where it listens, and its insides."""

    url: str
    core: ThreadCore
    gate: Gate
    app: Any
    uvicorn: Uvicorn
    loop: asyncio.AbstractEventLoop


@contextmanager
def in_process(model_path: str, **options: Any) -> Iterator[InProcess]:
    """The application behind uvicorn, on a thread of this process."""
    defaults = {"served_model_name": "tiny", "device": "cpu", "max_total_tokens": 4096, "log_level": "error", "port": 0}
    args = ServerArgs(model_path=model_path, **(defaults | options))
    with thread_core(args) as core, serving(args, core) as running:
        yield running


@contextmanager
def serving(args: ServerArgs, core: Any) -> Iterator[InProcess]:
    """The application over a core, behind uvicorn, on a thread of this process."""
    config = read_model_config(args)
    started = threading.Event()
    with open_listener(args.host, args.port) as listener:
        parts: list[Any] = []

        async def serve() -> None:
            gate = Gate(Access.from_server_args(args))
            server = Uvicorn(with_cors(gate, args.allowed_origins), args)
            gate.app = make_app(args, config, read_tokenizer(args, config), core, asyncio.get_running_loop())
            parts.extend((gate, server, asyncio.get_running_loop()))
            started.set()
            await server.serve([listener])

        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        assert started.wait(START_TIMEOUT_S)
        try:
            yield InProcess(url, core, parts[0], parts[0].app, parts[1], parts[2])
        finally:
            parts[1].should_exit = True
            thread.join()


@dataclass
class Process:
    """A server in a process of its own. ``log`` holds what it writes to stderr."""

    process: subprocess.Popen[bytes] | WarmPython
    url: str
    log: Path

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(httpx.TransportError):  # it does not listen yet
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready after {START_TIMEOUT_S} s: {self.log.read_text()}")

    def children(self) -> list[int]:
        """Process ids of what it started."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]

    def stats(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/server_info", timeout=10).json()["stats"]


@contextmanager
def own_process(
    folder: Path, model_path: str, *flags: str, modules: Path | None = None, anew: bool = False
) -> Iterator[Process]:
    """``python -m rtp_llm.launch_server``, killed at the end if it still runs. The rest as in ``python_process``."""
    port = free_port()
    command = ["-m", "rtp_llm.launch_server", "--model-path", model_path, "--port", str(port)]
    command += ["--device", "cpu", "--max-total-tokens", "4096", "--served-model-name", "tiny", *flags]
    with python_process(folder, command, port, modules, anew) as running:
        yield running


@contextmanager
def python_process(
    folder: Path, command: list[str], port: int, modules: Path | None = None, anew: bool = False
) -> Iterator[Process]:
    """``python COMMAND`` in ``folder``, which is to serve at ``port``; killed at the end if it still runs.

    Args:
        modules: a folder of them.
        anew: by a new interpreter, as users start it, rather than a warm one (see ``warm_python``).
    """
    log = folder / "server.log"
    path = os.pathsep.join(map(str, (ROOT, modules) if modules else (ROOT,)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process: subprocess.Popen[bytes] | WarmPython
    with log.open("wb") as file:
        if anew:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=file, stderr=file, env=environment, cwd=folder
            )
        else:
            process = WarmPython(command, folder, environment, file.fileno(), file.fileno())
    try:
        yield Process(process, f"http://127.0.0.1:{port}", log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Any, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


@cache
def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(["the", "cat", "dog", "mat", "world", "hello"]) for _ in range(count))
