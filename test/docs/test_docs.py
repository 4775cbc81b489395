"""The documentation is true: its commands and snippets run, its flags, files and links exist.

A fenced block after a line ``<!-- test: run -->`` is executed, with ``DIR`` replaced by the embedded model; after
``run text`` and ``run seeing`` it is a tiny model that reads, or one that sees. In every other ``bash`` block, each
command must exist, and so must each of its long flags. A block after ``<!-- test: model x -->`` is a model file, or a
``diff`` that gives one: it is served and compared with transformers. One after ``<!-- test: from FILE -->`` stands in
that file, line by line. The block after ``<!-- test: external -->`` is run up to the launch, and the class of the one
after ``<!-- test: config -->`` is given a config.json. Other marks are of ``test_snippets_in_packages.py``.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from rtp_llm import Engine, ModelRegistry
from rtp_llm.srt.configs.own_config import OwnConfigError, make_config
from rtp_llm.srt.configs.server_args import DEMO_MODEL, ServerArgs
from rtp_llm.srt.models.registry import PACKAGE_VARIABLE
from tiny_models import assert_same_ids, make_tiny, random_prompts, reference
from tiny_seeing import make_seeing
from warm_python import run_python

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "supported_models" / "support_new_models.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"(?:<!-- test: (?P<mark>[\w ./]+) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)\n```", re.DOTALL)
SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 88} | {
    "num_hidden_layers": 3,
    "vocab_size": 131,
    "max_position_embeddings": 256,
}
MODELS = {
    "model olmo": ("OlmoForCausalLM", SIZES | {"clip_qkv": 1.5}),
    "model mamba": (
        "MambaForCausalLM",
        {"hidden_size": 48, "intermediate_size": 96, "state_size": 10, "num_hidden_layers": 3, "vocab_size": 131},
    ),
    "model helium": ("HeliumForCausalLM", SIZES | {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
}
CHECKPOINTS: dict[str, Callable[[Path], str]] = {  # what DIR is in blocks that are run, by their mark
    "run": lambda directory: DEMO_MODEL,
    "run text": lambda directory: make_tiny("Qwen2ForCausalLM", directory),
    "run seeing": make_seeing,
}
SNIPPETS = {"state ours", "state reference", "sizes processor", "sizes model", "split"}  # test_snippets_in_packages.py
VARIABLES = {PACKAGE_VARIABLE, "ONLY_RUN", "RTP_LLM_CPU_ISA"}  # that commands may be preceded by


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


def run_anew(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """By an interpreter of its own, as a reader would; ``run_python`` has most things imported already."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, env=environment)


@cache
def help_of(*command: str) -> str:
    done = run_python([*command, "--help"])
    assert done.returncode == 0, f"{' '.join(command)} --help: {done.stderr}"
    return done.stdout


def flags_of(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def words_of(command: str) -> list[str]:
    """Without variables and the path of the environment; python3 is python."""
    words = shlex.split(command)
    while words and "=" in words[0]:
        assert words[0].split("=")[0] in VARIABLES, f"{command!r} sets a variable that nothing reads"
        words = words[1:]
    program = words[0].removeprefix(".venv/bin/")
    return ["python" if program == "python3" else program, *words[1:]]


def check_command(command: str) -> None:
    program, *arguments = words_of(command)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "rtp-llm":
        mode = ["--profile"] if arguments[:2] == ["bench", "--profile"] else []  # takes other options than bench
        known = help_of("-m", "rtp_llm", *arguments[:1], *mode)
        assert not {flag for flag in flags_of(arguments) if flag not in known}
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        paths = [word for word in arguments[2:] if word.startswith("test/")]
        assert paths and all((ROOT / path).exists() for path in paths)
    elif program == "cd":
        assert (ROOT / arguments[0]).is_dir()
    elif program == "python" and arguments[:2] == ["-m", "unittest"]:
        check_unittest(arguments[2])
    elif program == "python" and arguments[0] == "-m":
        known = help_of(*arguments[:2])
        assert not {flag for flag in flags_of(arguments) if flag not in known}
    elif program == "python" and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file()
        subcommand = [word for word in arguments[1:2] if not word.startswith("-")]
        known = help_of(arguments[0], *subcommand) if arguments[1:] else ""
        assert not {flag for flag in flags_of(arguments) if flag not in known}
    elif program == "pip":
        is_download = arguments[:2] == ["download", "--no-deps"] and len(arguments) == 3
        assert is_download or arguments == ["install", "-e", ".", "-c", "constraints.txt"]
    elif program in ("ruff", "mypy"):
        assert f"$(BIN)/{' '.join([program, *arguments])}\n" in (ROOT / "Makefile").read_text(), "as make runs it"
    else:
        raise AssertionError(f"no way to check the command {command!r}; mark its block or teach this test")


def check_unittest(name: str) -> None:
    """``file.Class.test`` of a file among the model tests."""
    module, class_name, function = name.split(".")
    tree = ast.parse((ROOT / "test" / "srt" / "models" / f"{module}.py").read_text())
    [test_class] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    assert function in {node.name for node in test_class.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("page", "body"), blocks("bash", None))
def test_commands_exist(page: Path, body: str) -> None:
    for command in commands(body):
        check_command(command)


def run_blocks(language: str) -> list[Any]:
    """(page, body, its mark); those of the README and of the guide to new models are run by every change."""
    return [
        pytest.param(
            *block.values, mark, id=block.id, marks=[] if block.values[0] in (README, GUIDE) else [pytest.mark.slow]
        )
        for mark in CHECKPOINTS
        for block in blocks(language, mark)
    ]


@pytest.mark.parametrize(("page", "body", "mark"), run_blocks("bash"))
def test_commands_run(page: Path, body: str, mark: str, tmp_path: Path) -> None:
    checkpoint, run = CHECKPOINTS[mark](tmp_path), run_anew if page == README else run_python
    for command in commands(body):
        program, *arguments = [word.replace("DIR", checkpoint) for word in words_of(command)]
        assert program in ("rtp-llm", "python"), f"only commands of rtp-llm and Python are run, not {command!r}"
        done = run([*(["-m", "rtp_llm"] if program == "rtp-llm" else []), *arguments])
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize(("page", "body", "mark"), run_blocks("python"))
def test_snippets_run(page: Path, body: str, mark: str, tmp_path: Path) -> None:
    done = run_anew(["-c", body.replace("DIR", CHECKPOINTS[mark](tmp_path))])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mark", MODELS)
def test_the_model_file_is_right(mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, config = MODELS[mark]
    module = f"{mark.split()[1]}_of_the_docs"
    (tmp_path / f"{module}.py").write_text(model_file(mark))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ModelRegistry.models.overrides, architecture, import_module(module).EntryClass)
    model_dir = make_tiny(architecture, tmp_path / "checkpoint", **config)
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    with Engine(
        model_path=model_dir, dtype="float32", device="cpu", skip_tokenizer_init=True, max_total_tokens=512
    ) as engine:
        for prompt in random_prompts(config["vocab_size"], (5, 60)):
            result = engine.generate(input_ids=prompt, sampling_params=params)
            assert_same_ids(result["output_ids"], reference(model_dir, tuple(prompt), 12), f"the page's {mark}")


def model_file(mark: str) -> str:
    """The file that the block so marked is, or, if it is a ``diff``, leads to."""
    for parameter in blocks("python", mark):
        return parameter.values[1]
    [parameter] = blocks("diff", mark)
    return side_of_diff(parameter.values[1], "+")


def side_of_diff(body: str, sign: str) -> str:
    return "\n".join(line[1:] for line in body.splitlines() if line[:1] in (" ", sign, "")) + "\n"


def test_the_example_of_porting_begins_at_vllm_and_leaves_it() -> None:
    [parameter] = blocks("diff", "model helium")
    before, after = side_of_diff(parameter.values[1], "-"), side_of_diff(parameter.values[1], "+")
    ast.parse(before)
    assert "vllm" not in after.lower()
    names = "vllm_config", "cache_config", "intermediate_tensors", "load_weights", "compute_logits", "maybe_prefix"
    assert not [name for name in names if name not in before or name in after]


@pytest.mark.parametrize(("page", "body"), blocks("python", "external"))
def test_external_models_are_registered_as_told(page: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        pass

    launched: list[ServerArgs] = []
    monkeypatch.setattr("rtp_llm.srt.entrypoints.http_server.launch_server", launched.append)
    names = {"model_name": "SomeForCausalLM", "model_class": Model, "server_args": ServerArgs(model_path=DEMO_MODEL)}
    with patch.dict(ModelRegistry.models.overrides):
        exec(body.replace("    ...", '    model_arch_name_to_cls["OtherForCausalLM"] = model_class'), names)
        assert ModelRegistry.resolve_model_cls("SomeForCausalLM") == (Model, "SomeForCausalLM")
        assert ModelRegistry.resolve_model_cls("OtherForCausalLM") == (Model, "OtherForCausalLM")
    assert launched == [names["server_args"]]


@pytest.mark.parametrize(("page", "body"), blocks("python", "config"))
def test_a_configuration_is_made_as_told(page: Path, body: str) -> None:
    names: dict[str, Any] = {"__name__": __name__, "dataclass": dataclass, "LlamaForCausalLM": object}
    exec(body, names)
    given = {"vocab_size": 7, "hidden_size": 4, "num_hidden_layers": 1, "rope_theta": 5e5}
    config = make_config(names["ZetaForCausalLM"].config_class, given)
    assert (config.num_stripes, config.tie_word_embeddings, config.rope_theta) == (4, True, 5e5)
    with pytest.raises(OwnConfigError, match="`vocab_size`, which ZetaConfig needs"):
        make_config(names["ZetaForCausalLM"].config_class, {"hidden_size": 4, "num_hidden_layers": 1})


def excerpts() -> list[Any]:
    """(file, body) of every block that says which file it is from."""
    return [
        pytest.param(match["mark"].removeprefix("from "), match["body"], id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, match in enumerate(BLOCK.finditer(page.read_text()))
        if (match["mark"] or "").startswith("from ")
    ]


@pytest.mark.parametrize(("file", "body"), excerpts())
def test_excerpts_are_what_the_file_says(file: str, body: str) -> None:
    assert f"\n{body}\n" in (ROOT / file).read_text()


def test_every_mark_is_known() -> None:
    marks = {match["mark"] for page in PAGES for match in BLOCK.finditer(page.read_text())}
    assert {mark for mark in marks if not (mark or "").startswith("from ")} == {
        None,
        "external",
        "config",
        *CHECKPOINTS,
        *MODELS,
        *SNIPPETS,
    }
    assert len(re.findall("<!-- test:", "".join(page.read_text() for page in PAGES))) == sum(
        match["mark"] is not None for page in PAGES for match in BLOCK.finditer(page.read_text())
    )  # none is misspelt


def test_files_of_models_that_are_named_exist() -> None:
    """Checks the pages that mention model files by name alone."""
    named = set(re.findall(r"`(\w+\.py)`", GUIDE.read_text())) - {"your_model.py"}
    assert len(named) > 10
    assert not {name for name in named if not (ROOT / "rtp_llm" / "models_py" / name).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    broken = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_have_titles(page: Path) -> None:
    assert page.read_text().startswith("# ")


def test_rooms_exist() -> None:
    """Every path in the page on architecture does, and every room of the package is in it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## Rooms", 1)[1].split("\n## ", 1)[0]
    srt = ROOT / "rtp_llm" / "srt"
    paths = re.findall(r"`([\w./*-]+(?:/|\.py))`", section)
    assert len(paths) > 30
    places = (ROOT, srt.parent, srt)
    assert not [path for path in paths if not any(list(place.glob(path)) for place in places)]
    rooms = {entry.name for entry in srt.iterdir() if entry.is_dir() and list(entry.glob("*.py"))}
    assert rooms <= {path.rstrip("/") for path in paths}


def test_the_page_on_architecture_is_short() -> None:
    assert len((ROOT / "docs" / "architecture.md").read_text().split()) <= 2000
