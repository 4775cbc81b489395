"""Decode steps beside reading the weights."""

import re
import shutil

import pytest
from transformers import AutoConfig

from benchmark.decode_bound import main, weights_of
from rtp_llm import Engine
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.layers.quantization.base import stored_bytes
from tiny_models import make_tiny


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_not_the_head_is_left_out(tmp_path, tied):
    directory = make_tiny("LlamaForCausalLM", tmp_path, tie_word_embeddings=tied)
    config = AutoConfig.from_pretrained(directory)
    with Engine(directory, inline=True, dtype="float32", max_total_tokens=64) as engine:
        model = engine._runner.core.executor.worker.runner.model
        read = sum(weights_of(model).values())
        left_out = stored_bytes(model) - read
    assert read > 0
    assert left_out == (0 if tied else config.vocab_size * config.hidden_size * 4)


@pytest.mark.slow
@pytest.mark.skipif(not kernels_work() or shutil.which("c++") is None, reason="needs a C++ compiler")
def test_shares_are_printed(tmp_path, capsys):
    directory = make_tiny("LlamaForCausalLM", tmp_path)
    main(["--model-path", directory, "--rounds", "2", "--output-len", "8", "--input-len", "8", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [
        bool(re.match(r"round \d: reading [\d.]+ ms .*, a step [\d.]+ ms, [\d.]+ of the bound", x))
        for x in lines[-3:-1]
    ] == [True, True]
    assert lines[-1].startswith("median ")
