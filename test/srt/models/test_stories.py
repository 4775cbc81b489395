"""A trained model end to end: stories260K tells the story that an independent program tells."""

import json
from pathlib import Path
from typing import Any

import pytest

from rtp_llm import Engine
from tiny_models import tiny_model
from warm_python import run_python

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> Path:
    folder = data_dir / "models" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip(f"no trained model: {folder} does not exist")
    return folder


@pytest.fixture(scope="module")
def golden(stories: Path) -> dict[str, Any]:
    """``greedy_ids`` begins with ``prompt_ids``; ``text`` is that of the whole."""
    return json.loads((stories / "golden_greedy.json").read_text())


@pytest.mark.parametrize("chunked_prefill_size", [-1, 16])
def test_the_golden_story(stories: Path, golden: dict[str, Any], chunked_prefill_size: int) -> None:
    prompt, story = golden["prompt_ids"], golden["greedy_ids"][len(golden["prompt_ids"]) :]
    params = {"temperature": 0, "max_new_tokens": len(story), "ignore_eos": True}
    with Engine(
        model_path=str(stories), dtype="float32", max_total_tokens=1024, chunked_prefill_size=chunked_prefill_size
    ) as engine:
        told = engine.generate(input_ids=prompt, sampling_params=params)
        # The same story told from its middle on, so that most of it is a prompt (and comes from the cache).
        rest = engine.generate(
            input_ids=golden["greedy_ids"][:100], sampling_params=params | {"max_new_tokens": len(story) - 99}
        )
    assert told["output_ids"] == story
    assert told["text"] == golden["text"]
    assert rest["output_ids"] == golden["greedy_ids"][100:]


def test_the_command_line_tells_a_story(stories: Path, golden: dict[str, Any]) -> None:
    prompt = "Once upon a time"
    command = ["-m", "rtp_llm", "generate", "--model-path", str(stories), "--prompt", prompt]
    command += ["--max-new-tokens", "60", "--max-total-tokens", "1024"]
    done = run_python(command)
    assert done.returncode == 0, done.stderr
    assert golden["text"].removeprefix(prompt)[:100] in done.stdout
    assert "tokens" in done.stderr.splitlines()[-1]  # the line of statistics


def test_a_checkpoint_without_tokenizer_takes_ids_only(caplog: pytest.LogCaptureFixture) -> None:
    with Engine(model_path=tiny_model("llama-default"), max_total_tokens=100, log_level="warning") as engine:
        result = engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 2, "temperature": 0})
        assert len(result["output_ids"]) == 2 and result["text"] == ""
        with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
            engine.generate("Once")
