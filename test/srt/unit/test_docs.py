"""The documentation is true: its commands and snippets run, its flags, files and links exist.

A fenced block after a line ``<!-- test: run -->`` is executed, with ``DIR`` replaced by a trained checkpoint. In every
other ``bash`` block, each command must exist, and so must each of its long flags. A block after
``<!-- test: model x -->`` is a model file: it is served and compared with transformers.
"""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rtp_llm import Engine, ModelRegistry
from tiny_models import assert_same_ids, random_prompts, reference

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"(?:<!-- test: (?P<mark>[\w ]+) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)\n```", re.DOTALL)
OLMO = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 88} | {
    "num_hidden_layers": 3,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "clip_qkv": 1.5,
}


def blocks(language: str, mark: str | None) -> list[Any]:
    """(page, body) of every fenced block of a language that is so marked, as pytest parameters."""
    found = []
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            if match["language"] == language and match["mark"] == mark:
                found.append(pytest.param(page, match["body"], id=f"{page.relative_to(ROOT)}-{number}"))
    return found


def commands(body: str) -> list[str]:
    lines = body.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, env=environment)


@cache
def help_of(*command: str) -> str:
    done = run([sys.executable, *command, "--help"])
    assert done.returncode == 0, f"{' '.join(command)} --help: {done.stderr}"
    return done.stdout


def flags_of(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def check_command(command: str) -> None:
    words = shlex.split(command)
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "rtp-llm":
        known = help_of("-m", "rtp_llm", *arguments[:1])
        assert not {flag for flag in flags_of(arguments) if flag not in known}
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        paths = [word for word in arguments[2:] if word.startswith("test/")]
        assert paths and all((ROOT / path).exists() for path in paths)
    elif program == "python" and arguments[0].endswith(".py"):
        known = help_of(arguments[0])
        assert not {flag for flag in flags_of(arguments) if flag not in known}
    elif program == "pip":
        assert arguments == ["install", "-e", ".", "-c", "constraints.txt"]
    else:
        raise AssertionError(f"no way to check the command {command!r}; mark its block or teach this test")


@pytest.mark.parametrize(("page", "body"), blocks("bash", None))
def test_commands_exist(page: Path, body: str) -> None:
    for command in commands(body):
        check_command(command)


@pytest.fixture(scope="module")
def checkpoint(data_dir: Path) -> str:
    folder = data_dir / "models" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip(f"no trained model: {folder} does not exist")
    return str(folder)


@pytest.mark.parametrize(("page", "body"), blocks("bash", "run"))
def test_commands_run(page: Path, body: str, checkpoint: str) -> None:
    for command in commands(body):
        words = [word.replace("DIR", checkpoint) for word in shlex.split(command)]
        assert words[0] == "rtp-llm", f"only rtp-llm commands are run, not {command!r}"
        done = run([sys.executable, "-m", "rtp_llm", *words[1:]])
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize(("page", "body"), blocks("python", "run"))
def test_snippets_run(page: Path, body: str, checkpoint: str) -> None:
    done = run([sys.executable, "-c", body.replace("DIR", checkpoint)])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "body"), blocks("python", "model olmo"))
def test_the_model_file_is_right(page: Path, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "olmo_of_the_docs.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ModelRegistry.models, "OlmoForCausalLM", import_module("olmo_of_the_docs").EntryClass)
    torch.manual_seed(0)
    model = transformers.OlmoForCausalLM(transformers.OlmoConfig(initializer_range=0.3, **OLMO))
    model.save_pretrained(tmp_path / "checkpoint")
    model_dir = str(tmp_path / "checkpoint")
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    with Engine(
        model_path=model_dir, dtype="float32", device="cpu", skip_tokenizer_init=True, max_total_tokens=512
    ) as engine:
        for prompt in random_prompts(OLMO["vocab_size"], (5, 60)):
            result = engine.generate(input_ids=prompt, sampling_params=params)
            assert_same_ids(result["output_ids"], reference(model_dir, tuple(prompt), 12), "the documentation's OLMo")


def test_every_mark_is_known() -> None:
    marks = {match["mark"] for page in PAGES for match in BLOCK.finditer(page.read_text())}
    assert marks == {None, "run", "model olmo"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    broken = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_have_titles(page: Path) -> None:
    assert page.read_text().startswith("# ")


def test_rooms_marked_now_exist() -> None:
    """Every path of the layout table that is said to exist does."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Layout", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if re.search(r"\| now \|$", line)]
    paths = [path for line in lines for path in re.findall(r"`([\w./]+/[\w./]*)`", line.split("|")[1])]
    assert len(paths) > 15
    assert not [path for path in paths if not (ROOT / path).exists()]
