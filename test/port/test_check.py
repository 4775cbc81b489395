"""``rtp-llm port --check``: a file in vLLM's form against transformers."""

import json
import re
from pathlib import Path

import pytest
import transformers

from rtp_llm.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "porting.md"


def vllm_form() -> str:
    """The page's example as it was before it was edited by hand."""
    diff = re.search(r"<!-- test: model helium -->\n```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert diff is not None
    return "".join(f"{line[1:]}\n" for line in diff[1].splitlines() if not line.startswith("+"))


HELIUM = vllm_form()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """What a published checkpoint has."""
    path = tmp_path / "config.json"
    path.write_text(transformers.HeliumConfig(architectures=["HeliumForCausalLM"]).to_json_string(use_diff=False))
    return path


def run(models: Path, text: str, tmp_path: Path, *flags: str) -> int:
    (models / "helium.py").write_text(text)
    return main(["port", str(models / "helium.py"), "-o", str(tmp_path / "out.py"), *flags])


def test_a_right_port_agrees_under_every_schedule(
    models: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models, HELIUM, tmp_path, "--check", str(config)) == 0
    said = capsys.readouterr().out
    lines = said.partition("on a tiny checkpoint\n")[2].splitlines()
    assert [line[:12].strip() for line in lines] == [
        "one by one", "batched", "chunked", "warm cache", "second turn", "pages",
    ]  # fmt: skip
    assert all(" agrees " in line for line in lines)


def test_a_wrong_one_differs_and_the_status_says_so(
    models: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = HELIUM.replace("is_neox_style=False", "is_neox_style=True")
    assert text != HELIUM and run(models, text, tmp_path, "--check", str(config)) == 1
    assert "differs by" in capsys.readouterr().out


def test_a_configuration_that_is_none_is_an_error(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models, HELIUM, tmp_path, "--check", str(tmp_path / "none.json")) == 2
    (tmp_path / "list.json").write_text(json.dumps([]))
    assert run(models, HELIUM, tmp_path, "--force", "--check", str(tmp_path / "list.json")) == 2
    said = capsys.readouterr().err
    assert "cannot be read" in said and "no JSON object" in said


def test_an_architecture_without_a_reference_is_told(
    models: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(json.dumps({"architectures": ["HeliumOfNobodyForCausalLM"]}))
    assert run(models, HELIUM, tmp_path, "--check", str(config)) == 1
    assert "has no model class HeliumOfNobodyForCausalLM" in capsys.readouterr().out
