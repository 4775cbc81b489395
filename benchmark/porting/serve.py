"""Serve ported files, chosen by a draw, through the real server, and compare their texts with transformers'.

    python benchmark/porting/sweep.py --vllm WHEEL --out ported --json results.json
    python benchmark/porting/serve.py --ported ported --results results.json --count 10 --seed 1

Of the files that agree, so many are drawn. Each is put into a package outside of this one, and served with a tiny
checkpoint and its tokenizer over HTTP, in float32; the last but one on two ranks, the last one with weights of eight
bits, whose texts may part.
"""

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import torch
import transformers

from checkpoints import as_published
from examine import AGREES
from rtp_llm.tools.tiny_check import load_reference
from rtp_llm.tools.tiny_checkpoint import make_tiny_checkpoint, model_class_of

PROMPT = "Once upon a time"
NEW_TOKENS = 16
START_SECONDS = 180
TWO_RANKS, QUANTIZED = ["--tp-size", "2"], ["--quantization", "int8"]
PACKAGE = "ported_models"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ported", type=Path, required=True, help="folder with ported files, as the sweep's --out")
    parser.add_argument("--results", type=Path, required=True, help="the sweep's --json")
    parser.add_argument("--count", type=int, default=10, help="files to draw")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    args = parser.parse_args(argv)
    rows = [row for row in json.loads(args.results.read_text()) if row["outcome"] == AGREES]
    drawn = random.Random(args.seed).sample(rows, min(args.count, len(rows)))
    extras = [[]] * (len(drawn) - 2) + [TWO_RANKS, QUANTIZED]
    print("| file | architecture | options | text |\n|---|---|---|---|")
    results = [serve_one(args.ported, row, extra) for row, extra in zip(drawn, extras[-len(drawn) :], strict=True)]
    return 0 if all(results) else 1


def serve_one(ported: Path, row: dict[str, Any], options: list[str]) -> bool:
    """Serve a file, print how its text compares, and return whether it is what it should be."""
    compared = row["compared"][0]
    architecture = compared["architecture"]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, package = Path(folder, "checkpoint"), Path(folder, "packages", PACKAGE)
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        shutil.copy(ported / f"{row['file']}.py", package)
        make_tiny_checkpoint(architecture, checkpoint, overrides=compared["fields"], tokenizer=True)
        expected = expected_text(checkpoint, architecture)
        if compared["unlike"] and as_published(checkpoint, Path(folder, "published"), compared["unlike"]):
            checkpoint = Path(folder, "published")
        rename_architecture(checkpoint, architecture)
        with server(checkpoint, package.parent, options) as url:
            text = complete(url)
    same = sum(1 for _ in common_prefix(text, expected))
    agrees = text == expected if "--quantization" not in options else len(text) == len(expected)
    verdict = "equal" if text == expected else f"the first {same} of {len(expected)} characters are equal"
    print(f"| {row['file']} | {architecture} | {' '.join(options)} | {verdict} |", flush=True)
    return agrees


def rename_architecture(checkpoint: Path, architecture: str) -> None:
    """Name the class as the ported file does; transformers may write it in another case."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))


def expected_text(checkpoint: Path, architecture: str) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert model_class_of(architecture) is not None
    model = load_reference(checkpoint, architecture)
    model.generation_config.eos_token_id = None
    marks = {"token_type_ids": torch.ones_like(ids)} if getattr(model.config, "prefix_lm", False) else {}
    with torch.inference_mode():
        output = model.generate(ids, **marks, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@contextmanager
def server(checkpoint: Path, packages: Path, options: Sequence[str]) -> Iterator[str]:
    """Yield the address of a server in a process of its own, which ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rtp_llm.launch_server", "--model-path", str(checkpoint), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--context-length", "256"]
    command += ["--max-total-tokens", "1024", "--model-impl", "rtp_llm", "--log-level", "error"]
    command += ["--served-model-name", PACKAGE, *options]
    environment = os.environ | {
        "RTP_LLM_EXTERNAL_MODEL_PACKAGE": PACKAGE,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]),
    }
    process = subprocess.Popen(command, env=environment)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise TimeoutError(f"the server was not ready within {START_SECONDS} s")


def complete(url: str) -> str:
    """Return what the server adds to the prompt."""
    body = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "model": PACKAGE}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["text"]


def common_prefix(one: str, other: str) -> Iterator[str]:
    for mine, yours in zip(one, other, strict=False):
        if mine != yours:
            return
        yield mine


if __name__ == "__main__":
    sys.exit(main())
