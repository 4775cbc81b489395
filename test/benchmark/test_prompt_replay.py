"""The benchmark of replayed prompts."""

import re

import pytest

from benchmark.prompt_replay import main
from rtp_llm.srt.devices.cpu.build import kernels_work
from tiny_models import tiny_model

pytestmark = pytest.mark.skipif(not kernels_work(), reason="there is no C++ compiler")


def test_lengths_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model-path", tiny_model("llama-default"), "--lens", "5", "40", "--turns", "2", "--threads", "1"])
    _, *lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"(\d+) tokens: replayed [\d.]+ ms, with Python [\d.]+ ms, [\d.]+ times", line) for line in lines]
    assert [line.split()[0] for line in lines] == ["5", "40"]
