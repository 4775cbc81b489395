"""Compare a model, or a model file that lies anywhere, with transformers on a tiny random checkpoint."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.models.registry import ModelImportError
from rtp_llm.tools.model_file import served_by_file
from rtp_llm.tools.schedules import ON_ONE_RANK, Question, ScheduleResult, Teacher, random_questions, run_schedules
from rtp_llm.tools.tiny_checkpoint import make_tiny_checkpoint, model_class_of
from rtp_llm.tools.tiny_config import VOCAB_SIZE

LENGTHS = (1, 18, 40, 70)  # of the prompts; two are longer than the windows, three than any chunk
CONTEXT_LENGTH = 256


@dataclass(frozen=True)
class TinyCheck:
    """What became of a comparison. ``failure``: why there was none; ``error``: what was raised then."""

    architecture: str
    results: list[ScheduleResult] = field(default_factory=list)
    failure: str = ""
    error: BaseException | None = field(default=None, compare=False, repr=False)

    @property
    def agrees(self) -> bool:
        return not self.failure and all(result.agrees for result in self.results)

    def lines(self) -> list[str]:
        """Return the report, a line for each schedule."""
        if self.failure:
            return [f"{self.architecture} cannot be compared: {self.failure}"]
        return [_line(result) for result in self.results]


def _line(result: ScheduleResult) -> str:
    if result.failure:
        return f"{result.schedule:12} fails: {result.failure}"
    if result.agrees:
        return f"{result.schedule:12} agrees ({result.difference:.0e})"
    return f"{result.schedule:12} differs by {result.difference:.3g} in log-probability ({result.question})"


def check_file(
    path: str | Path,
    architecture: str,
    given: Mapping[str, Any] | None = None,
    schedules: Sequence[str] = ON_ONE_RANK,
    class_name: str | None = None,
    lengths: Sequence[int] = LENGTHS,
) -> TinyCheck:
    """Make a tiny checkpoint of an architecture, and compare a model file's answers with transformers'.

    Args:
        path: of the model file.
        given: the contents of a config.json whose structure the checkpoint has; None: of transformers' defaults.
        class_name: the class in the file; None: that of the architecture, or the only one.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_tiny_checkpoint(architecture, folder, given)
        except ValueError as error:
            return TinyCheck(architecture, failure=str(error), error=error)
        return check_checkpoint(folder, schedules, path, class_name, lengths)


def check_checkpoint(
    directory: str | Path,
    schedules: Sequence[str] = ON_ONE_RANK,
    path: str | Path | None = None,
    class_name: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    reference: str | Path | None = None,
) -> TinyCheck:
    """Compare the answers about a tiny checkpoint.

    Args:
        path: of the model file; None: the registered one.
        reference: a variant of the checkpoint, which transformers gets, perhaps of another architecture; None: the
            same.
    """
    answering = reference or directory
    config = AutoConfig.from_pretrained(answering)
    architectures = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))["architectures"]
    served: Any = nullcontext() if path is None else served_by_file(path, architectures, class_name)
    try:
        with served:
            results = run_schedules(
                tiny_server_args(directory),
                Teacher(load_reference(answering, config.architectures[0])),
                _questions(config, lengths),
                schedules,
            )
    except ModelImportError as error:
        return TinyCheck(architectures[0], failure=str(error), error=error)
    return TinyCheck(architectures[0], results)


def _questions(config: Any, lengths: Sequence[int]) -> list[Question]:
    """Return random prompts; for a prefix language model, transformers is told what is the prompt."""
    questions = random_questions(getattr(config.get_text_config(), "vocab_size", VOCAB_SIZE), lengths)
    if not getattr(config, "prefix_lm", False):
        return questions
    marks = {question.name: torch.ones(1, len(question.ids), dtype=torch.long) for question in questions}
    return [replace(each, extras={"token_type_ids": marks[each.name]}, is_cached=False) for each in questions]


def load_reference(directory: str | Path, architecture: str) -> Any:
    """Return transformers' model of a checkpoint, in float32, with plain attention.

    Raises:
        ValueError: transformers has no such class.
    """
    model_class = model_class_of(architecture)
    if model_class is None:
        raise ValueError(f"transformers has no model class {architecture}")
    return model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def tiny_server_args(directory: str | Path, **options: Any) -> ServerArgs:
    """Return the options of an engine that serves a tiny checkpoint, without a tokenizer, in float32."""
    return ServerArgs.from_dict(
        {
            "model_path": str(directory),
            "dtype": "float32",
            "device": "cpu",
            "skip_tokenizer_init": True,
            "context_length": CONTEXT_LENGTH,
            "max_total_tokens": 2048,
            "log_level": "error",
        }
        | options
    )
