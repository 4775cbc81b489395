"""The page's state of one's own: put into what ``rtp-llm new`` writes, model file and reference agree, states too."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from remote_code import fresh_code
from rtp_llm import ModelRegistry
from rtp_llm.cli import main
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.reference import TransformersModel
from rtp_llm.tools.schedules import BATCHED, Teacher, random_questions, run_schedules
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.run import verify

PAGE = Path(__file__).resolve().parents[2] / "docs" / "supported_models" / "layers.md"
MODULE, STEM = "model_with_peaks", "ModelWithPeaks"


def snippet(mark: str) -> str:
    [body] = re.findall(rf"<!-- test: {mark} -->\n```python\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    return str(body).replace("Zeta", STEM)


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for before, after in changes:
        assert text.count(before) == 1, f"{path.name}: {before!r}"
        text = text.replace(before, after)
    path.write_text(text)


def write_package(root: Path) -> None:
    """Write a new architecture, whose layers add the peaks of their inputs before anything else."""
    assert main(["new", MODULE, "--directory", str(root)]) == 0
    norm, layer = "        self.post_attention_layernorm = ", f"class {STEM}DecoderLayer("
    edit(
        root / MODULE / f"{MODULE}.py",
        (layer, f"{snippet('state ours')}\n\n\n{layer}"),
        (norm, f"        self.peak = {STEM}Peak(config.hidden_size, layer_id)\n{norm}"),
        (
            "        hidden_states = hidden_states + self.self_attn(",
            "        hidden_states = hidden_states + self.peak(hidden_states, forward_batch)\n"
            "        hidden_states = hidden_states + self.self_attn(",
        ),
    )
    edit(
        root / MODULE / "reference" / f"modeling_{MODULE}.py",
        (layer, f"{snippet('state reference')}\n\n\n{layer}"),
        (norm, f"        self.peak = {STEM}Peak(config.hidden_size, layer_idx)\n{norm}"),
        ("        x = x + self.self_attn(", "        x = x + self.peak(x, cache)\n        x = x + self.self_attn("),
        ("DynamicCache()", "DynamicCache(config=self.config)"),
    )
    config = f"{STEM}Config(vocab_size=len(tokenizer)"
    edit(root / MODULE / "reference" / "make_tiny.py", (config, f'{config}, layer_types=["hybrid"] * 3'))


def test_a_state_of_ones_own_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path / "package")
    monkeypatch.syspath_prepend(tmp_path / "package")
    fresh_code(tmp_path / "cache", monkeypatch)
    checkpoint = import_module(f"{MODULE}.reference.make_tiny").make_tiny(tmp_path / "tiny")
    entry = import_module(f"{MODULE}.{MODULE}").EntryClass
    monkeypatch.setitem(ModelRegistry.models.overrides, entry.__name__, entry)
    args = ServerArgs(
        model_path=checkpoint, dtype="float32", device="cpu", max_total_tokens=1024, trust_remote_code=True
    )
    report = verify(args, VerifyOptions(max_new_tokens=4, long_len=0))
    assert report.agrees, report.failure or report.finding
    for result in report.results:
        assert result.states is not None and result.states.num == 6  # in three layers, at both boundaries
        assert result.states.error < 1e-4
    # Batched steps, whose decode steps are replayed.
    reference = TransformersModel(checkpoint, "float32", "cpu", trust_remote_code=True)
    questions = random_questions(reference.model.config.vocab_size, (1, 18))
    [result] = run_schedules(args, Teacher(reference.model), questions, [BATCHED])
    assert result.agrees, result
