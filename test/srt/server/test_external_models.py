"""Model classes from outside reach the processes that compute: from scripts, the environment, installed packages."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

from rtp_llm.srt.models.registry import PACKAGE_VARIABLE
from tiny_server import ROOT, Process, free_port, own_process, python_process

pytestmark = pytest.mark.xdist_group("server-process")

ARCHITECTURE = "EchoForCausalLM"
PROMPT = "the cat sat"
# Says the last token that it has read, over and over: no built-in model does.
ECHO = """
from rtp_llm.models_py.llama import LlamaForCausalLM

class EchoForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        output = super().forward(input_ids, positions, forward_batch, input_embeds)
        rows = range(len(output.next_token_logits))
        output.next_token_logits[rows, input_ids[forward_batch.sample_rows]] = 1e4
        return output
"""
IMPORTS = """
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.entrypoints.http_server import launch_server

server_args = ServerArgs(**{options})
"""
SCRIPTS = {
    "class in a guarded script": ECHO
    + """
{imports}
if __name__ == "__main__":
    ModelRegistry.models["EchoForCausalLM"] = EchoForCausalLM
    launch_server(server_args)
""",
    "class in a module, one line": """
{imports}
from external_models.echo import EchoForCausalLM as model_class

model_name = "EchoForCausalLM"
ModelRegistry.models[model_name] = model_class
launch_server(server_args)
""",
    "class in the script, many at once": ECHO
    + """
{imports}
from functools import lru_cache

@lru_cache()
def import_new_model_classes():
    model_arch_name_to_cls = {}
    for model_class in [EchoForCausalLM]:
        model_arch_name_to_cls[model_class.__name__] = model_class
    return model_arch_name_to_cls

ModelRegistry.models.update(import_new_model_classes())

launch_server(server_args)
""",
    "a registered package": """
{imports}
ModelRegistry.register("external_models")
launch_server(server_args)
""",
}


def checkpoint_of(tiny_checkpoint: str, folder: Path, architecture: str) -> str:
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    config_file = folder / "checkpoint" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"architectures": [architecture]}))
    return str(folder / "checkpoint")


@pytest.fixture
def echo_checkpoint(tiny_checkpoint: str, tmp_path: Path) -> str:
    return checkpoint_of(tiny_checkpoint, tmp_path, ARCHITECTURE)


def write_package(folder: Path, **files: str) -> None:
    package = folder / "external_models"
    package.mkdir()
    for name, source in {"__init__": "", **files}.items():
        (package / f"{name}.py").write_text(source)


def script_command(folder: Path, body: str, **options: Any) -> tuple[list[str], int]:
    port = free_port()
    options = {"device": "cpu", "max_total_tokens": 1024, "dtype": "float32", "port": port} | options
    (folder / "script.py").write_text(body.replace("{imports}", IMPORTS).replace("{options}", repr(options)))
    return [str(folder / "script.py")], port


def assert_echoes(server: Process) -> None:
    server.wait_ready()
    body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 5}}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    last_id = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}, timeout=60).json()["tokens"][-1]
    assert answer["output_ids"] == [last_id] * 5
    assert answer["text"] and answer["text"] == PROMPT[-len(answer["text"]) // 5 :] * 5


@pytest.mark.parametrize(
    ("name", "tp_size"),
    [
        ("class in the script, many at once", 1),
        pytest.param("class in the script, many at once", 2, marks=pytest.mark.slow),
        pytest.param("class in a guarded script", 1, marks=pytest.mark.slow),
        pytest.param("class in a module, one line", 2, marks=pytest.mark.slow),
        pytest.param("a registered package", 1, marks=pytest.mark.slow),
    ],
)
def test_a_script(echo_checkpoint: str, tmp_path: Path, name: str, tp_size: int) -> None:
    write_package(tmp_path, echo=ECHO + "\nEntryClass = EchoForCausalLM\n")
    command, port = script_command(tmp_path, SCRIPTS[name], model_path=echo_checkpoint, tp_size=tp_size)
    with python_process(tmp_path, command, port) as server:
        assert_echoes(server)


@pytest.mark.slow
def test_a_package_that_the_environment_names(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class is taken in place of the built-in one of the same name."""
    class_source = ECHO.replace("import LlamaForCausalLM", "import LlamaForCausalLM as BuiltIn")
    class_source = class_source.replace("EchoForCausalLM(LlamaForCausalLM)", "LlamaForCausalLM(BuiltIn)")
    write_package(tmp_path, llama=class_source + "\nEntryClass = [LlamaForCausalLM]\n")
    monkeypatch.setenv(PACKAGE_VARIABLE, "external_models")
    with own_process(tmp_path, tiny_checkpoint) as server:
        assert_echoes(server)


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", ["1", "2"])
def test_an_installed_package(echo_checkpoint: str, tmp_path: Path, tp_size: str) -> None:
    write_package(tmp_path, echo=ECHO)
    info = tmp_path / "external_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: external-models\nVersion: 1.0\n")
    lines = ["[rtp_llm.models]", f"{ARCHITECTURE} = external_models.echo:{ARCHITECTURE}"]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    with own_process(tmp_path, echo_checkpoint, "--tp-size", tp_size, modules=tmp_path) as server:
        assert_echoes(server)


@pytest.mark.slow
def test_registered_before_an_engine_of_two_ranks(echo_checkpoint: str, tmp_path: Path) -> None:
    body = """
{imports}
from rtp_llm import Engine
ModelRegistry.register("external_models")
with Engine(server_args=server_args) as engine:
    print(engine.generate("the cat sat", {"temperature": 0, "max_new_tokens": 5})["text"])
"""
    write_package(tmp_path, echo=ECHO + "\nEntryClass = EchoForCausalLM\n")
    command, _ = script_command(tmp_path, body, model_path=echo_checkpoint, tp_size=2, log_level="error")
    done = run(tmp_path, command)
    assert done.returncode == 0, done.stderr
    word = done.stdout.rstrip("\n")
    assert word and PROMPT.endswith(word[: len(word) // 5]) and word == word[: len(word) // 5] * 5


def run(folder: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_the_example(tiny_checkpoint: str, tmp_path: Path) -> None:
    """The probabilities of what it says are those of transformers' logits with roots in place of positive ones."""
    port = free_port()
    command = [str(ROOT / "examples/external_model/serve.py"), "--model-path", tiny_checkpoint, "--port", str(port)]
    command += ["--device", "cpu", "--max-total-tokens", "1024", "--dtype", "float32"]
    body = {"text": PROMPT, "return_logprob": True, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    with python_process(tmp_path, command, port) as server:
        server.wait_ready()
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    ids = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)(PROMPT)["input_ids"]
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for logprob, token_id, *_ in answer["meta_info"]["output_token_logprobs"]:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1].tolist()
        roots = [math.sqrt(value) if value > 0 else value for value in logits]
        assert token_id == max(range(len(roots)), key=roots.__getitem__)
        total = math.log(sum(math.exp(value) for value in roots))
        assert logprob == pytest.approx(roots[token_id] - total, abs=1e-3)
        ids.append(token_id)


@pytest.mark.slow
def test_what_the_author_of_a_broken_class_is_told(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the file ends the start; one in forward() fails the request, and the log says how."""
    monkeypatch.setenv(PACKAGE_VARIABLE, "external_models")
    write_package(tmp_path, llama="import nothing_of_this_name\nEntryClass = LlamaForCausalLM\n")
    done = run(tmp_path, ["-m", "rtp_llm", "serve", "--model", tiny_checkpoint, "--port", str(free_port())])
    path = tmp_path / "external_models" / "llama.py"
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "RTP_LLM_EXTERNAL_MODEL_PACKAGE names external_models: external_models.llama cannot be imported: "
        f"ModuleNotFoundError: No module named 'nothing_of_this_name' ({path}, line 1)"
    )
    path.write_text(
        "from rtp_llm.models_py import llama\n"
        "class LlamaForCausalLM(llama.LlamaForCausalLM):\n"
        "    def forward_batch(self, batch):\n"
        "        return self.logits_procesor(batch)\n"
        "EntryClass = LlamaForCausalLM\n"
    )
    with own_process(tmp_path, tiny_checkpoint) as server:
        server.wait_ready()
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT}, timeout=120)
        assert refused.status_code == 500
        assert "has no attribute 'logits_procesor'" in server.log.read_text()
