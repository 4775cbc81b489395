"""``rtp-llm new``: what it writes passes at once, outside and inside; and what it refuses."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import httpx
import pytest

import supported_models
from remote_code import fresh_code
from rtp_llm import ModelRegistry
from rtp_llm.cli import main
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.gguf.form import declared_forms
from rtp_llm.srt.models.registry import PACKAGE_VARIABLE
from rtp_llm.tools.new.names import Name, NewModelError
from rtp_llm.tools.new.sources import ARCHITECTURE, sources
from rtp_llm.tools.reference import TransformersModel, drawn_image
from rtp_llm.tools.verify.all_schedules import image_question
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.run import verify
from tiny_server import own_process

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"text": [], "sees": ["--sees"], "like": ["--like", "gemma2"], "sees_like": ["--sees", "--like", "qwen3"]}


def new(*arguments: str) -> None:
    assert main(["new", *arguments]) == 0


def run(command: list[str], folder: Path, *path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path or (ROOT,)))} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_agrees_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is changed, and with clean code; its own test is run by ``make test-all``."""
    module = f"{kind}_model_of_test"
    new(module, *KINDS[kind], "--directory", str(tmp_path / "package"))
    check = ["check", "--quiet", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
    assert run([sys.executable, "-m", "ruff", *check], ROOT).stdout == ""
    monkeypatch.syspath_prepend(tmp_path / "package")
    fresh_code(tmp_path / "cache", monkeypatch)
    checkpoint = import_module(f"{module}.reference.make_tiny").make_tiny(tmp_path / "tiny")
    entry = import_module(f"{module}.{module}").EntryClass
    assert [form.architecture for form in declared_forms(entry)] == ([module] if kind == "like" else [])
    monkeypatch.setitem(ModelRegistry.models, entry.__name__, entry)
    args = ServerArgs(model_path=checkpoint, dtype="float32", device="cpu", trust_remote_code=True)
    report = verify(args, VerifyOptions(max_new_tokens=4, long_len=0))
    assert report.agrees, report.failure or report.finding
    assert report.class_name == entry.__name__
    assert any(result.prompt.media is not None for result in report.results) == kind.startswith("sees")
    if kind == "text":  # the reference's own code on our cache
        plain = verify(replace(args, model_impl="transformers"), VerifyOptions(max_new_tokens=4, long_len=0))
        assert plain.agrees and plain.class_name == "TransformersForCausalLM", plain.failure
    if kind.startswith("sees"):
        their_model = TransformersModel(checkpoint, "float32", "cpu", trust_remote_code=True).model
        question = image_question(args, their_model, "What is it?", [drawn_image()] * 2)
        assert question.extras["pixel_values"].shape[0] == len(question.call["image_data"]) == 2


def test_what_is_written_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "here"
    new("My-Model2", "--directory", str(root))
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "pyproject.toml",
        "test_my_model2.py",
        "my_model2/__init__.py",
        "my_model2/my_model2.py",
        "my_model2/reference/__init__.py",
        "my_model2/reference/configuration_my_model2.py",
        "my_model2/reference/make_tiny.py",
        "my_model2/reference/modeling_my_model2.py",
    }
    said = capsys.readouterr().out
    assert said.count("wrote ") == len(files)
    commands = said.partition("Next:\n")[2].splitlines()[:5]
    path = "PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}"
    assert commands[0].strip().startswith(f"cd {root} && export {path} {PACKAGE_VARIABLE}=my_model2 ")
    assert [command.split()[0] for command in commands[1:]] == ["python", "python", "rtp-llm", "curl"]
    assert "verify needs --trust-remote-code: " in said
    text = "".join((root / file).read_text() for file in files)
    assert "zeta" not in text.lower() and "class MyModel2ForCausalLM(" in text
    assert main(["new", "My-Model2", "--directory", str(root)]) == 2
    assert "exists already, and nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama"], "transformers knows the model type 'llama': choose another name"),
        (["3d"], "cannot be the name of an architecture"),
        (["class"], "is a word of Python"),
        (["json"], "Python finds a module json already"),
        (["some_new", "--like", "nothing"], "there is no model file nothing.py; have "),
        (["some_new", "--like", "qwen2_vl"], "qwen2_vl.py takes images: begin with --sees"),
        (
            ["some_new", "--like", "gpt2", "--sees"],
            "--sees needs a language model of Llama's frame, and GPT2",
        ),
        (["some_new", "--like", "granite", "--sees"], "but its GraniteForCausalLM has __init__ besides: begin with"),
        (["some_new", "--like", "transformers"], "transformers has no causal language model TransformersForCausalLM"),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", *arguments, "--directory", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "module", "stem"),
    [
        ("zeta", "zeta", "Zeta"),
        ("MyModel", "my_model", "MyModel"),
        ("my-model", "my_model", "MyModel"),
        ("MoE2_fast", "mo_e2_fast", "MoE2Fast"),
        ("GPTNext", "gpt_next", "GPTNext"),
    ],
)
def test_names(text: str, module: str, stem: str) -> None:
    assert Name.of(text) == Name(module, stem)


def test_every_model_file_can_be_begun_with_or_says_why() -> None:
    """Those that transformers has a causal language model for; of the others the error says what to do."""
    begun = []
    for path in sorted((ROOT / "rtp_llm" / "models_py").glob("*.py")):
        if path.stem in ("__init__", "transformers"):
            continue
        try:
            files = sources(path.stem, sees=False)
        except NewModelError as error:
            assert "begin with" in str(error)
            continue
        begun.append(path.stem)
        compile(files["zeta.py"], path.name, "exec")
        assert f"class {ARCHITECTURE}(" in files["zeta.py"] and "config_class = ZetaConfig" in files["zeta.py"]
    assert {"llama", "gemma2", "gpt2", "mixtral", "deepseek_v2", "qwen3_moe"} <= set(begun)


def test_which_language_models_an_eye_takes() -> None:
    """Of those that are refused the error says what to do."""
    taken = []
    for path in sorted((ROOT / "rtp_llm" / "models_py").glob("*.py")):
        if path.stem in ("__init__", "transformers"):
            continue
        try:
            files = sources(path.stem, sees=True)
        except NewModelError as error:
            assert "begin with" in str(error)
            continue
        taken.append(path.stem)
        compile(files["zeta.py"], path.name, "exec")
    assert {"llama", "qwen2", "qwen3", "gemma2", "lfm2", "mixtral", "olmo2", "phi3"} <= set(taken)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_tests_pass(kind: str, tmp_path: Path) -> None:
    new("some-new", *KINDS[kind], "--directory", str(tmp_path / "package"))
    done = run([sys.executable, "-m", "pytest", "-q"], tmp_path / "package", HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def checkout(folder: Path) -> Path:
    """A checkout that shares its files with this one, but for the folders that are written to."""
    written = ("rtp_llm/models_py", "test/helpers", "test/srt/models")
    for name in written:
        (folder / name).mkdir(parents=True)
    for name in ("rtp_llm", *written):
        for entry in (ROOT / name).iterdir():
            if not (folder / name / entry.name).exists() and entry.name != "__pycache__":
                (folder / name / entry.name).symlink_to(entry)
    (folder / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inside_its_tests_pass_and_are_listed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout(tmp_path / "checkout")
    paths = (root, root / "test" / "helpers")
    command = [sys.executable, "-m", "rtp_llm", "new", "some-new", *KINDS[kind], "--inside"]
    done = run(command, tmp_path, *paths)
    assert done.returncode == 0, done.stderr
    test = root / "test" / "srt" / "models" / f"test_{'mm' if kind.startswith('sees') else 'parity'}_some_new.py"
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)], root, *paths)
    assert done.returncode == 0, done.stdout
    check = ["check", "--quiet", "--config", str(ROOT / "pyproject.toml"), *map(str, root.rglob("*some_new*.py"))]
    assert run([sys.executable, "-m", "ruff", *check], ROOT).stdout == ""
    monkeypatch.syspath_prepend(root / "test" / "helpers")
    listed = supported_models.read_test_file(test)
    assert listed.quick == {"SomeNewForConditionalGeneration" if kind.startswith("sees") else "SomeNewForCausalLM": 1}


@pytest.mark.slow
def test_it_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the printed commands: the environment names the package, and no code of the checkpoint runs."""
    package, tiny = tmp_path / "package", tmp_path / "tiny"
    new("some-new", "--directory", str(package))
    made = run([sys.executable, "-m", "some_new.reference.make_tiny", str(tiny)], tmp_path, package, ROOT)
    assert made.returncode == 0, made.stderr
    monkeypatch.setenv(PACKAGE_VARIABLE, "some_new")
    with own_process(tmp_path, str(tiny), modules=package) as server:
        server.wait_ready()
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "tiny", **chat}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] >= 1
