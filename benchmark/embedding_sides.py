"""The engines of embedding_speed.py, each in a process of its own: one line of JSON each way.

    -> {"texts": [...], "times": 3}      <- {"seconds": [0.01, 0.009, 0.009], "vector": the first text's}

The first answer, {"about": ...} or {"missing": why}, comes unasked once the engine is loaded. An engine gets texts and
returns all vectors, of length one, as an array: tokens, model, pooling and conversion are in the time.
"""

import argparse
import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

READY_WITHIN_S = 300
MAX_TOKENS = 512
BATCH = 32  # texts at once, for engines that pad: sentence-transformers' own default
LLAMA_CPP_BATCH_TOKENS = 512  # a larger one costs it more: each token attends to all of the batch, under a mask


class Missing(Exception):
    """The engine is not installed here, or cannot do this; the message says why."""


class Side(ABC):
    """An engine with a model loaded."""

    about = ""

    @abstractmethod
    def embed(self, texts: list[str]) -> Any:
        """Return [N, size] vectors of length one."""

    def close(self) -> None:
        """End what the side has started."""
        return


class Ours(Side):
    def __init__(self, args: argparse.Namespace) -> None:
        from rtp_llm import Engine

        self._engine = Engine(
            model_path=args.model, device="cpu", dtype=args.dtype, context_length=MAX_TOKENS, cpu_threads=args.threads
        )

    def embed(self, texts: list[str]) -> Any:
        return np.stack([np.asarray(result["embedding"]) for result in self._engine.encode(texts)])


class Served(Side):
    """A server in a process of its own, asked for base64 by one connection."""

    def __init__(self, command: Sequence[str], port: int) -> None:
        self._process = subprocess.Popen(command, stdout=sys.stderr)
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        deadline = time.monotonic() + READY_WITHIN_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            time.sleep(0.2)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _is_ready(self) -> bool:
        try:
            self._connection.request("GET", "/health")
            answer = self._connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return False
        return answer.status == 200

    def embed(self, texts: list[str]) -> Any:
        body = json.dumps({"input": texts, "encoding_format": "base64"})
        self._connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        read = json.loads(answer.read())
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {read}")
        ordered = sorted(read["data"], key=lambda item: item["index"])
        return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in ordered])


class OursServed(Served):
    def __init__(self, args: argparse.Namespace) -> None:
        port = free_port()
        options = {"--dtype": args.dtype, "--context-length": str(MAX_TOKENS), "--cpu-threads": str(args.threads)}
        command = [sys.executable, "-m", "rtp_llm", "serve", "--model-path", args.model, "--port", str(port)]
        super().__init__([*command, "--device", "cpu", *(word for pair in options.items() for word in pair)], port)


class SentenceTransformers(Side):
    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import torch
            from sentence_transformers import SentenceTransformer, __version__
        except ImportError as error:
            raise Missing(f"pip install sentence-transformers ({error})") from None
        torch.set_num_threads(args.threads)
        self._model = SentenceTransformer(args.model, device="cpu", model_kwargs={"dtype": getattr(torch, args.dtype)})
        self._model.max_seq_length = MAX_TOKENS
        self.about = __version__

    def embed(self, texts: list[str]) -> Any:
        return self._model.encode(texts, batch_size=BATCH, normalize_embeddings=True)


class OpenVino(Side):
    """The model as openvino.convert_model has it; batches by length, as sentence-transformers makes them."""

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import openvino
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise Missing(f"pip install openvino ({error})") from None
        self._tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModel.from_pretrained(args.model).eval()
        example = dict(self._tokenizer(["a b c", "d e"], return_tensors="pt", padding=True))
        converted = openvino.convert_model(model, example_input=example)
        del model
        properties = {
            "INFERENCE_NUM_THREADS": args.threads,
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[args.dtype],
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._model = openvino.Core().compile_model(converted, "CPU", properties)
        self._pools_first = is_pooled_by_first(args.model)
        self.about = openvino.__version__

    def embed(self, texts: list[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: list[Any] = [None] * len(texts)
        for start in range(0, len(texts), BATCH):
            some = order[start : start + BATCH]
            for i, vector in zip(some, self._of_batch([texts[i] for i in some]), strict=True):
                vectors[i] = vector
        return np.stack(vectors)

    def _of_batch(self, texts: list[str]) -> Any:
        inputs = self._tokenizer(texts, return_tensors="np", padding=True, truncation=True, max_length=MAX_TOKENS)
        states, mask = self._model(dict(inputs))[0], inputs["attention_mask"][..., None]
        vectors = states[:, 0] if self._pools_first else (states * mask).sum(1) / mask.sum(1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class LlamaCppServed(Served):
    def __init__(self, args: argparse.Namespace) -> None:
        file, port = gguf_file(args), free_port()
        server = Path(args.llama_cpp) / "llama.cpp" / "bin" / "llama-server"
        if not server.exists():
            raise Missing(f"{server} is missing: python benchmark/peers/setup.py llama.cpp makes it")
        tokens, threads = str(LLAMA_CPP_BATCH_TOKENS), str(args.threads)
        command = [str(server), "-m", str(file), "--embeddings", "--port", str(port), "-t", threads, "-tb", threads]
        sizes = ["-c", str(4 * LLAMA_CPP_BATCH_TOKENS), "-b", tokens, "-ub", tokens, "-np", str(16)]
        super().__init__([*command, *sizes], port)


class LlamaCpp(Side):
    """By llama-cpp-python, in its own environment: many texts in a batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise Missing(f"python benchmark/peers/setup.py llama.cpp makes it ({error})") from None
        self._model = llama_cpp.Llama(
            str(gguf_file(args)), embedding=True, n_ctx=LLAMA_CPP_BATCH_TOKENS, n_batch=LLAMA_CPP_BATCH_TOKENS,
            n_ubatch=LLAMA_CPP_BATCH_TOKENS, n_threads=args.threads, n_threads_batch=args.threads, verbose=False,
        )  # fmt: skip
        self.about = llama_cpp.__version__

    def embed(self, texts: list[str]) -> Any:
        return np.asarray(self._model.embed(texts, normalize=True, truncate=True), dtype=np.float32)


SIDES: dict[str, type[Side]] = {
    "ours": Ours,
    "ours-http": OursServed,
    "sentence-transformers": SentenceTransformers,
    "openvino": OpenVino,
    "llama.cpp": LlamaCpp,
    "llama.cpp-http": LlamaCppServed,
}


def is_pooled_by_first(model: str) -> bool:
    settings = json.loads((Path(model) / "1_Pooling" / "config.json").read_text())
    return bool(settings.get("pooling_mode_cls_token")) or settings.get("pooling_mode") == "cls"


def gguf_file(args: argparse.Namespace) -> Path:
    """Return the model as llama.cpp's own converter made it (embedding_speed.py runs it)."""
    file = Path(args.gguf_folder) / f"{Path(args.model).name}-{args.dtype}.gguf"
    if not file.exists():
        raise Missing(f"{file} is missing: llama.cpp's converter has not made it")
    return file


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve one engine to embedding_speed.py.")
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--llama-cpp", required=True, help="the folder of its environment")
    parser.add_argument("--gguf-folder", required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what engines print goes to standard error
    try:
        side = SIDES[args.side](args)
    except Missing as error:
        print(json.dumps({"missing": str(error)}), file=answers)
        return
    print(json.dumps({"about": side.about}), file=answers)
    try:
        for line in sys.stdin:
            print(json.dumps(timed(side, **json.loads(line))), file=answers)
    finally:
        side.close()


def timed(side: Side, texts: list[str], times: int) -> dict[str, Any]:
    seconds, vectors = [], []
    for _ in range(times):
        start_s = time.perf_counter()
        vectors = side.embed(texts)
        seconds.append(time.perf_counter() - start_s)
    if len(vectors) != len(texts):
        raise RuntimeError(f"{len(vectors)} vectors of {len(texts)} texts")
    return {"seconds": seconds, "vector": [float(x) for x in vectors[0]]}


if __name__ == "__main__":
    main()
