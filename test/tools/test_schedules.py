"""Every schedule of the engine agrees for a right model, and each finds the mistake that only it can find."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.models.registry import ModelImportError
from rtp_llm.tools.model_file import served_by_file
from rtp_llm.tools.schedules import (
    BATCHED,
    CHUNKED,
    ON_ONE_RANK,
    ONE_BY_ONE,
    SCHEDULES,
    TWO_RANKS,
    WARM,
    Teacher,
    random_questions,
    run_schedules,
)
from tiny_models import tiny_model

LENGTHS = (1, 18, 40)
FILE = """
from rtp_llm.models_py import llama


class Layer(llama.LlamaDecoderLayer):
    def forward(self, positions, hidden_states, forward_batch, residual):
        {change}
        return super().forward(positions, hidden_states, forward_batch, residual)


class LlamaForCausalLM(llama.LlamaForCausalLM):
    layer_type = Layer


EntryClass = LlamaForCausalLM
"""


def server_args(model_dir: str) -> ServerArgs:
    return ServerArgs(
        model_path=model_dir,
        dtype="float32",
        device="cpu",
        skip_tokenizer_init=True,
        context_length=256,
        max_total_tokens=1024,
        log_level="error",
    )


def teacher(model_dir: str) -> Teacher:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    return Teacher(model.eval())


def run(model_dir: str, schedules: tuple[str, ...] = ON_ONE_RANK) -> dict[str, bool]:
    vocab_size = json.loads(Path(model_dir, "config.json").read_text())["vocab_size"]
    results = run_schedules(
        server_args(model_dir), teacher(model_dir), random_questions(vocab_size, LENGTHS), schedules
    )
    return {result.schedule: result.agrees for result in results}


def write(directory: Path, change: str) -> Path:
    path = directory / "changed.py"
    path.write_text(FILE.format(change=change))
    return path


def test_all_agree_on_one_rank() -> None:
    assert run(tiny_model("mistral-window7")) == dict.fromkeys(ON_ONE_RANK, True)


@pytest.mark.slow
def test_a_file_from_anywhere_runs_on_two_ranks(tmp_path: Path) -> None:
    with served_by_file(write(tmp_path, "pass"), ["LlamaForCausalLM"]):
        assert run(tiny_model("llama-tp"), SCHEDULES) == dict.fromkeys(SCHEDULES, True)
    with served_by_file(write(tmp_path, "hidden_states = hidden_states * 1.01"), ["LlamaForCausalLM"]):
        assert run(tiny_model("llama-tp"), (TWO_RANKS,)) == {TWO_RANKS: False}


def test_a_mistake_shows_where_it_is(tmp_path: Path) -> None:
    """Steps that go on within a prompt are wrong; then long ones are, which prompts asked alone do not need."""
    wrong = "hidden_states = 2 * hidden_states + 1"
    late = write(tmp_path, f"if len(positions) > 3 and positions[0] > 0: {wrong}")
    with served_by_file(late, ["LlamaForCausalLM"]):
        assert run(tiny_model("llama-default"), (ONE_BY_ONE, CHUNKED)) == {ONE_BY_ONE: True, CHUNKED: False}
    with served_by_file(write(tmp_path, f"if len(positions) > 50: {wrong}"), ["LlamaForCausalLM"]):
        assert run(tiny_model("llama-default"), (ONE_BY_ONE, BATCHED)) == {ONE_BY_ONE: True, BATCHED: False}


def test_what_a_model_raises_is_the_failure(tmp_path: Path) -> None:
    model_dir = tiny_model("llama-default")
    with served_by_file(write(tmp_path, "raise ArithmeticError('no sums')"), ["LlamaForCausalLM"]):
        questions = random_questions(100, LENGTHS)
        results = run_schedules(server_args(model_dir), teacher(model_dir), questions, (ONE_BY_ONE, WARM))
    assert all("no sums" in result.failure and not result.agrees for result in results)
    assert [result.schedule for result in results] == [ONE_BY_ONE, WARM]


def test_a_warm_cache_that_holds_nothing_is_a_failure() -> None:
    model_dir = tiny_model("llama-default")
    args = replace(server_args(model_dir), disable_radix_cache=True)
    (result,) = run_schedules(args, teacher(model_dir), random_questions(100, LENGTHS), (WARM,))
    assert "nothing of it was in the prefix cache" in result.failure


def test_unknown_schedules_are_refused() -> None:
    model_dir = tiny_model("llama-default")
    with pytest.raises(ValueError, match="unknown schedules sideways; have one by one"):
        run_schedules(server_args(model_dir), Teacher(None), [], ("sideways",))


def test_a_file_without_the_class_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("EntryClass = []\n")
    with pytest.raises(ModelImportError, match="none of which is XForCausalLM"), served_by_file(path, ["XForCausalLM"]):
        pass
    path.write_text("import nothing_of_this_name\nEntryClass = XForCausalLM\n")
    with pytest.raises(ModelImportError, match="nothing_of_this_name"), served_by_file(path, ["XForCausalLM"]):
        pass


def test_teacher_keeps_to_the_given_answer() -> None:
    model_dir = tiny_model("llama-default")
    (question,) = random_questions(100, (9,))
    rows = teacher(model_dir).log_probs(question, [5, 6, 7])
    assert rows.shape[0] == 9 + 3 - 1
    assert torch.allclose(rows.exp().sum(-1), torch.ones(11), atol=1e-5)
