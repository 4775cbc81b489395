"""``rtp-llm port``: what it writes, prints and returns."""

from pathlib import Path

import pytest
from vllm_file import HEAD, WHOLE

from rtp_llm.cli import main


@pytest.fixture
def source(models: Path) -> Path:
    path = models / "boats.py"
    path.write_text(HEAD + WHOLE)
    return path


def test_a_complete_port_is_written_and_reported(source: Path, tmp_path: Path, capsys):
    output = tmp_path / "ours.py"
    assert main(["port", str(source), "-o", str(output)]) == 0
    said = capsys.readouterr().out
    assert "EntryClass = BoatForCausalLM" in output.read_text()
    assert "BoatForCausalLM" in said and "Nothing is left" in said and f"--model-class {output}:" in said


def test_a_place_that_is_left_is_commented_listed_and_told_by_the_status(source: Path, tmp_path: Path, capsys):
    text = source.read_text().replace("q, k, v = qkv.chunk(3, dim=-1)", "q, k, v = chop(qkv)")
    source.write_text("from vllm.somewhere import chop\n" + text)
    output = tmp_path / "ours.py"
    assert main(["port", str(source), "-o", str(output)]) == 1
    lines = output.read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "# PORT: chop of vllm.somewhere" in line)
    assert f"{output}:{number}: chop of vllm.somewhere has no equivalent" in capsys.readouterr().out


def test_an_output_that_exists_is_refused_without_force(source: Path, tmp_path: Path, capsys):
    output = tmp_path / "ours.py"
    output.write_text("mine")
    assert main(["port", str(source), "-o", str(output)]) == 2
    assert output.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert main(["port", str(source), "-o", str(output), "--force"]) == 0
    assert output.read_text() != "mine"


def test_the_source_is_never_overwritten(source: Path, capsys):
    before = source.read_text()
    assert main(["port", str(source), "-o", str(source), "--force"]) == 2
    assert source.read_text() == before


def test_nothing_is_written_when_the_file_cannot_be_ported(models: Path, tmp_path: Path, capsys):
    (models / "bad.py").write_text("from vllm import x\ndef f(:\n")
    assert main(["port", str(models / "bad.py"), "-o", str(tmp_path / "out.py")]) == 2
    assert not (tmp_path / "out.py").exists()
    assert "not Python" in capsys.readouterr().err


def test_stdout_takes_the_file_and_stderr_the_report(source: Path, capsys):
    assert main(["port", str(source), "-o", "-"]) == 0
    said = capsys.readouterr()
    compile(said.out, "ours", "exec")
    assert "Nothing is left" in said.err
