"""Port one of vLLM's files, and compare what results with transformers. Runs in a process of its own."""

import tempfile
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import NO_LEAST_STEP, as_published, with_shorter_steps, with_window
from published import published_fields, switches
from rounding import own_parting, own_rounding
from rtp_llm.port.porter import port
from rtp_llm.port.report import Remark
from rtp_llm.port.source import PortError
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.registry import ModelImportError
from rtp_llm.srt.models.weight_loading import WeightLoadError
from rtp_llm.tools.model_file import served_by_file
from rtp_llm.tools.schedules import BATCHED, CHUNKED, TOLERANCE, WARM
from rtp_llm.tools.tiny_check import LENGTHS, TinyCheck, check_checkpoint, tiny_server_args
from rtp_llm.tools.tiny_checkpoint import NotMadeError, make_tiny_checkpoint, model_class_of
from rtp_llm.tools.tiny_config import tiny_config
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.run import Report, verify
from stand_in import StandIn
from stand_ins import STAND_INS
from vllm_files import Entry, ModelFile

AGREES, IN_PART, DIFFERS, NOT_PORTED, NO_CHECKPOINT = (
    "agrees",
    "agrees in part",
    "differs",
    "not ported",
    "no tiny checkpoint",
)
IMPORT, BUILD, LOAD, COMPUTE = "does not import", "does not build", "does not load", "does not compute"
OTHER_WINDOW = "agrees with another window"
OTHER_STEP = "agrees without a least step"
AS_ANOTHER = "agrees with another class"
NO_CLASS, PART = "no class in transformers", "part of other models"
MOST_ROUNDING = 0.01  # of log-probabilities; more is a difference, whatever its cause
SCHEDULES = (BATCHED, CHUNKED, WARM)


@dataclass
class Compared:
    """What became of one architecture.

    Args:
        fields: of its configuration, beside transformers' defaults.
        like: the class of transformers that stood in for it, where transformers has none of its own.
        unlike: what loading said about the tensors that transformers saves, where published ones were compared about.
    """

    architecture: str
    outcome: str
    detail: str = ""
    difference: float | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    like: str = ""
    unlike: str = ""


@dataclass
class Row:
    """What became of one file.

    Args:
        outcome: of its architectures, the one furthest from agreeing; without any to compare, why there is none.
        left: places that the porter left to a person, with their lines in the output.
    """

    file: str
    architectures: list[str]
    outcome: str
    detail: str = ""
    compared: list[Compared] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Row":
        return cls(**values | {"compared": [Compared(**each) for each in values["compared"]]})


def examine(file: ModelFile, out: Path) -> Row:
    """Port a file to ``out/NAME.py``, and compare each of its architectures that transformers has a class for; if there
    is none, each that another class stands in for."""
    row = Row(file.name, [entry.architecture for entry in file.entries], "")
    target = out / f"{file.name}.py"
    entries = comparable(file) or replaceable(file)
    if not entries:
        row.outcome = _why_not_compared(file)
    try:
        remarks = write_port(file.path, target)
    except Exception as error:  # a refusal or a fault of the porter: it is one of the results
        row.detail = f"{type(error).__name__}: {error}{'' if isinstance(error, PortError) else _place(error)}"
        row.outcome = row.outcome or (f"needs {', '.join(file.needs())}" if file.needs() else NOT_PORTED)
        return row
    row.left = [f"{remark.line}: {remark.text}" for remark in remarks]
    if not entries:
        return row
    row.compared = [_compared(entry, target) for entry in entries]
    worst = max(row.compared, key=lambda each: _ORDER.index(each.outcome))
    row.outcome, row.detail = worst.outcome, worst.detail
    if worst.outcome != AGREES and any(each.outcome == AGREES for each in row.compared):
        row.outcome, row.detail = IN_PART, f"{worst.architecture} {worst.outcome}: {worst.detail}"
    elif worst.outcome in _STOPPED and file.needs():
        row.outcome, row.detail = f"needs {', '.join(file.needs())}", f"{worst.outcome}: {worst.detail}"
    return row


def _compared(entry: Entry, path: Path) -> Compared:
    if model_class_of(entry.architecture) is not None:
        return compare(entry, path)
    return compare_with_another(entry, path, STAND_INS[entry.architecture])


_ORDER = (
    AGREES,
    AS_ANOTHER,
    OTHER_WINDOW,
    OTHER_STEP,
    DIFFERS,
    COMPUTE,
    LOAD,
    BUILD,
    IMPORT,
    NO_CHECKPOINT,
    NOT_PORTED,
)
_STOPPED = (COMPUTE, LOAD, BUILD, IMPORT)


def write_port(source: Path, target: Path) -> list[Remark]:
    """Port a file, and return what is left in it for a person."""
    ported = port(source)
    target.write_text(ported.text, encoding="utf-8")
    return [*ported.report.not_portable, *ported.report.review]


def comparable(file: ModelFile) -> list[Entry]:
    """Return the architectures that generate text and that transformers has, each of its classes once."""
    found: dict[Any, Entry] = {}
    for entry in file.entries:
        model_class = model_class_of(entry.architecture) if entry.task == "text generation" else None
        if model_class is not None:
            found.setdefault(model_class, entry)
    return list(found.values())


def replaceable(file: ModelFile) -> list[Entry]:
    """Return the architectures that another class of transformers stands in for, each once."""
    entries = {entry.architecture: entry for entry in file.entries if entry.architecture in STAND_INS}
    return list(entries.values())


def _why_not_compared(file: ModelFile) -> str:
    if not file.entries:
        return PART
    return NO_CLASS if "text generation" in file.tasks() else file.tasks()[0]


def compare(entry: Entry, path: Path) -> Compared:
    """Compare a ported file with transformers: about a checkpoint of transformers' defaults, or where its weights and
    the file's do not fit, about one with the switches that published ones have on."""
    model_class: Any = model_class_of(entry.architecture)
    try:
        usual = tiny_config(model_class.config_class)
    except Exception as error:  # whatever transformers raises over a small configuration
        return Compared(entry.architecture, NO_CHECKPOINT, f"{type(error).__name__}: {error}")
    fields = published_fields(usual, path.read_text())
    found = _compare(entry.architecture, path, fields)
    more = switches(usual, found.detail) if found.outcome == LOAD else {}
    return _compare(entry.architecture, path, fields | more) if more else found


def compare_with_another(entry: Entry, path: Path, stand_in: StandIn) -> Compared:
    """Compare a ported file with another class of transformers, each about a checkpoint of its own form."""
    name, like = entry.architecture, stand_in.like
    with tempfile.TemporaryDirectory() as folder:
        reference, directory = Path(folder, "reference"), Path(folder, "published")
        try:
            stand_in.make(name, reference, directory)
        except NotMadeError as error:
            return Compared(name, NO_CHECKPOINT, str(error), like=like)
        found = check_checkpoint(directory, SCHEDULES, path, name, LENGTHS, reference=reference)
    problem = _first_failure(found)
    if problem is not None:
        return Compared(name, *problem, like=like)
    difference = _difference(found)
    if found.agrees:
        return Compared(name, AS_ANOTHER, difference=difference, like=like)
    worst = max(found.results, key=lambda result: result.difference)
    return Compared(name, DIFFERS, f"{worst.schedule}: {difference:.2g}", difference, like=like)


def _compare(name: str, path: Path, fields: dict[str, Any]) -> Compared:
    """Compare about a tiny checkpoint with these fields in its configuration; say where they part."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_tiny_checkpoint(name, folder, overrides=fields)
        except NotMadeError as error:
            return Compared(name, NO_CHECKPOINT, str(error))
        found = check_checkpoint(folder, SCHEDULES, path, name, LENGTHS)
        problem = _first_failure(found)
        unlike = ""
        if problem is not None and problem[0] == LOAD:
            as_published_ones = _check_published(Path(folder), problem[1], path, name)
            unlike = problem[1] if as_published_ones else ""
            found = as_published_ones or found
            problem = _first_failure(found)
        if found.agrees:
            return Compared(name, AGREES, difference=_difference(found), fields=fields, unlike=unlike)
        if problem is not None:
            return Compared(name, *problem)
        detail = _other_window(Path(folder), path, name)
        if detail:
            return Compared(name, OTHER_WINDOW, detail, fields=fields)
        without_limit = _shorter_steps(Path(folder), path, name, fields)
        if without_limit is not None:
            return without_limit
        worst = max(found.results, key=lambda result: result.difference)
        if worst.difference < MOST_ROUNDING and worst.difference <= (rounding := own_rounding(Path(folder))):
            detail = (
                f"within {worst.difference:.2g}, where transformers moves by {rounding:.2g} with its weights' last bits"
            )
            return Compared(name, AGREES, detail, worst.difference, fields)
        with served_by_file(path, [type_name(folder)], name):
            detail = f"{worst.schedule}: {worst.difference:.2g}; {_explained(folder)}"
        return Compared(name, DIFFERS, detail, worst.difference)


def _difference(found: TinyCheck) -> float:
    return max(result.difference for result in found.results)


def _check_published(directory: Path, problem: str, path: Path, name: str) -> TinyCheck | None:
    """Compare about the tensors that published checkpoints have; None: they have the same."""
    with tempfile.TemporaryDirectory() as folder:
        if not as_published(directory, Path(folder), problem):
            return None
        return check_checkpoint(folder, SCHEDULES, path, name, LENGTHS, reference=directory)


def _other_window(directory: Path, path: Path, name: str) -> str:
    """Say whether the file agrees with transformers where the latter's window is a token longer or shorter; "" if it
    does not. Then the file itself takes the configuration's window otherwise."""
    for change, word in ((1, "longer"), (-1, "shorter")):
        with tempfile.TemporaryDirectory() as folder:
            if not with_window(directory, Path(folder), change):
                return ""
            found = check_checkpoint(directory, SCHEDULES, path, name, LENGTHS, reference=folder)
        if found.agrees:
            return f"where transformers' window is one token {word}, within {_difference(found):.0e}"
    return ""


def _shorter_steps(directory: Path, path: Path, name: str, fields: dict[str, Any]) -> Compared | None:
    """Compare about a checkpoint whose state-space layers may make steps as short as they come; None if the file does
    not agree then either.

    Where transformers limits the steps of prompts alone, it parts from itself, by whether it computes a token with
    others or from its cache. Then the checkpoint without a limit is the one to compare about. Otherwise the file passes
    the limit over.
    """
    with tempfile.TemporaryDirectory() as folder:
        variant = Path(folder)
        if not with_shorter_steps(directory, variant):
            return None
        found = check_checkpoint(variant, SCHEDULES, path, name, LENGTHS)
        parting, of_variant = own_parting(directory), own_parting(variant)
    if not found.agrees:
        return None
    difference = _difference(found)
    if parting > TOLERANCE >= of_variant:
        detail = f"without a least step: with one, transformers parts from itself by {parting:.2g}"
        return Compared(name, AGREES, detail, difference, fields | NO_LEAST_STEP)
    detail = f"where transformers' steps have no least size, within {difference:.0e}"
    return Compared(name, OTHER_STEP, detail, difference, fields)


def type_name(directory: str) -> str:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory).architectures[0]


def _first_failure(found: TinyCheck) -> tuple[str, str] | None:
    """Return where it stopped, and why, if it did."""
    failed = [result for result in found.results if result.failure]
    if not found.failure and not failed:
        return None
    error = found.error if found.failure else failed[0].error
    text = found.failure or failed[0].failure
    return _stage(error), text.strip() + _place(error)


def _stage(error: BaseException | None) -> str:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__
    for kind, stage in ((ModelImportError, IMPORT), (ModelBuildError, BUILD), (WeightLoadError, LOAD)):
        if any(isinstance(each, kind) for each in chain):
            return stage
    return COMPUTE


def _place(error: BaseException | None) -> str:
    """Return the innermost line of an error and its causes that belongs to the ported file or to this project."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    ported = [frame for frame in frames if "rtp_llm_served_file" in frame.filename]
    place = (ported or list(frames))[-1:]
    deepest = frames[-1] if frames else None
    text = "".join(f" [line {frame.lineno}: {frame.line}]" for frame in place)
    if deepest is not None and place and deepest is not place[0]:
        text += f" [{Path(deepest.filename).name}:{deepest.lineno}: {deepest.line}]"
    return text


def _explained(directory: str) -> str:
    """Return the module that differs first, and the likely cause, by ``rtp-llm verify``."""
    args = tiny_server_args(directory)
    try:
        report: Report = verify(args, VerifyOptions(max_new_tokens=2, long_len=40))
    except Exception as error:  # it is only an explanation
        return f"verify fails: {type(error).__name__}: {error}"
    if report.finding is None:
        return report.note or report.failure or "verify finds no difference"
    causes = "; ".join(report.finding.causes) or "no cause found"
    return f"{report.finding.module or '(model)'} {report.finding.part}: {causes}"
