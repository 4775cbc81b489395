"""The script that a machine with a GPU runs goes through all of its parts, tried on a device that behaves like one."""

import re

import pytest

from warm_python import ROOT, run_python

pytestmark = pytest.mark.slow
SCRIPT = str(ROOT / "scripts" / "gpu_check.py")


def test_the_whole_check_runs() -> None:
    done = run_python([SCRIPT, "--dry-run"])
    assert done.returncode == 0, done.stderr + done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| 20")]
    assert not any("WRONG" in row for row in rows)
    parts = [row.split("|")[3].strip() for row in rows]
    assert list(dict.fromkeys(parts)) == ["a", "b", "c", "d", "e", "f"]
    assert "left out" not in done.stdout
    for what in (
        r"attention, bfloat16 \| largest error",
        r"llama-llama3-tied, float32 \| ids of 2 prompts equal transformers'",
        r"graphs on and off \| equal to the last bit",
        r"copy of \d+ MiB, read and written \| \d+ GB/s",
        r"\| decode attention, .* \| \d+ GB/s, \d+% of copying",
        r"prefill, tiny, .* tokens/s, \d+% of the rate of products",
        r"decode, tiny, .* of the bound by memory; device busy \d+%, host [\d.]+ ms a step",
        r"read once beside read for each, tiny \| [\d.]+ times as fast",
        r"ours, tiny, .* tokens/s of output",
        r"adjusted logits \| equal to the last bit",
        r"products of fp8 with fp8, \[70, 384\] by 128 \| (largest error|the device has none)",
        r"two ranks on 0 GPUs, sums \| the ranks do not reach each other's memory",
        r"vLLM, tiny, .* \| did not run: RuntimeError: \['peers need a GPU'\]",
    ):
        assert re.search(what, done.stdout), f"no row like {what}:\n{done.stdout}"


def test_a_part_that_is_not_there() -> None:
    done = run_python([SCRIPT, "--dry-run", "g"])
    assert done.returncode == 2 and "there is no part 'g'; have a, b, c, d, e, f" in done.stderr
