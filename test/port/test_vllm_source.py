"""vLLM's own files, where its source is at hand: ``RTP_LLM_VLLM_SOURCE`` names the unpacked folder, or a wheel."""

import ast
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from rtp_llm.port.porter import port

VARIABLE = "RTP_LLM_VLLM_SOURCE"
MODELS = Path("vllm", "model_executor", "models")
# Files of different kinds that come over whole: dense, with windows, with experts, with a base in another file.
WHOLE = ("llama", "qwen2", "mistral", "mixtral", "gemma2", "olmoe", "gpt_j", "bloom", "opt", "nemotron")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of vLLM's model files."""
    source = os.environ.get(VARIABLE)
    if not source:
        pytest.skip(f"needs vLLM's source: set {VARIABLE} to its unpacked folder, or to a wheel")
    if source.endswith(".whl"):
        folder = tmp_path_factory.mktemp("vllm")
        with zipfile.ZipFile(source) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
        source = str(folder)
    found = next((root / MODELS for root in (Path(source), Path(source).parent) if (root / MODELS).is_dir()), None)
    assert found is not None, f"{VARIABLE}={source} has no folder {MODELS}"
    return found


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_comes_over_whole(models: Path, name: str):
    if not (models / f"{name}.py").is_file():
        pytest.skip(f"this vLLM has no {name}.py")
    ported = port(models / f"{name}.py")
    assert ported.report.is_complete, (ported.report.review, ported.report.not_portable)
    tree = ast.parse(ported.text)
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    tops = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
    assert tops <= {"torch", "transformers", "rtp_llm"}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_file_that_sees_leaves_only_its_processor(models: Path, name: str):
    if not (models / f"{name}.py").is_file():
        pytest.skip(f"this vLLM has no {name}.py")
    ported = port(models / f"{name}.py")
    ast.parse(ported.text)
    places = "that the checkpoint's processor gives these inputs|other engine's placeholders|expands placeholders"
    left = [remark.text for remark in (*ported.report.review, *ported.report.not_portable)]
    assert left and all(re.search(places, text) for text in left), left


def test_renaming_every_class_of_a_file_changes_nothing_else(models: Path, tmp_path: Path):
    """No rule knows a class by its name."""
    folder = tmp_path / MODELS
    folder.mkdir(parents=True)
    for sibling in ("utils.py", "interfaces.py"):
        shutil.copy(models / sibling, folder)
    text = (models / "llama.py").read_text()
    classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    new = {name: f"Zq{number}Thing" for number, name in enumerate(sorted(classes))}
    (folder / "llama.py").write_text(text)
    plain = port(folder / "llama.py", "LlamaForCausalLM").text
    (folder / "other.py").write_text(re.sub(rf"\b({'|'.join(classes)})\b", lambda match: new[match[0]], text))
    renamed = port(folder / "other.py", new["LlamaForCausalLM"]).text
    for name, other in new.items():
        renamed = renamed.replace(other, name)
    assert renamed == plain
