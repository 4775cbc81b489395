"""Runs ours and transformers' model on the same prompts, and finds out where they part."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtp_llm.models_py.transformers import TransformersForCausalLM
from rtp_llm.srt.checkpoint import prompts_with_pictures, read_model_config, read_processor, read_tokenizer
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import choose_device
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.registry import ModelImportError, ModelRegistry, UnknownArchitectureError, reason
from rtp_llm.srt.models.weight_loading import WeightLoadError
from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.multimodal.placement import MediaPlacementError
from rtp_llm.srt.plan import Admission, PageWrite, RowWork, StepPlan
from rtp_llm.srt.request_spec import PromptMedia, RequestSpec
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker.worker import Worker, WorkerConfig
from rtp_llm.tools.reference import (
    PICTURE_PROMPTS,
    Extras,
    TransformersModel,
    chat_text,
    encode,
    read_pictures,
    read_prompts,
)
from rtp_llm.tools.verify.causes import Evidence, Finding, explain, explain_logits, pass_over_layout
from rtp_llm.tools.verify.feed import extras_for
from rtp_llm.tools.verify.locate import (
    LOGITS_TOLERANCE,
    MODULE_TOLERANCE,
    Difference,
    compare,
    first_difference,
    logits_error,
)
from rtp_llm.tools.verify.options import MIN_LONG_LEN, VerifyError, VerifyOptions
from rtp_llm.tools.verify.recorders import OurRecorder, TheirRecorder
from rtp_llm.tools.verify.trace import Parts, Trace

GREEDY = RequestSpec(SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=0), seed=0)
TOP = 5
TIE_GAP = 1e-4  # logits closer than this are a tie: either token is right
MAX_KEPT_TOKENS = 256  # of a long prompt, so many of its last tokens are recorded (and all keys and values)
NUM_SHOWN = 3  # places shown before and after the first that differs
RANDOM_LENS = (5, 9, 12)  # of prompts where there is no tokenizer


class ForwardError(RuntimeError):
    """Our model cannot compute; the cause is chained."""


@dataclass(frozen=True)
class Prompt:
    """``media`` go with ids that have placeholders; None: text alone."""

    text: str
    ids: list[int]
    media: PromptMedia | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PromptResult:
    """Of the logits after the first tokens, after the prompt and after each new token but the last."""

    prompt: Prompt
    max_difference: float
    mean_difference: float
    error: float  # relative, see ``logits_error``
    top_agreement: float  # part of the five best tokens that are the same
    output_ids: list[int]
    parting: tuple[int, int] | None  # the first token of transformers' that is another: (which one, its id)


@dataclass(frozen=True)
class Report:
    """``finding`` is None if they agree, or where models run through transformers anyway, without modules of ours.

    ``failure``: why ours cannot be loaded or run, in which case ``results`` is empty. ``source``: the method of our
    model file that the finding lies in. ``around``: the places before and after the one that differs, of
    ``num_compared`` places that both sides have.
    """

    model_path: str
    class_name: str
    dtype: str
    tolerance: float
    results: list[PromptResult]
    finding: Finding | None = None
    around: list[Difference] = field(default_factory=list)
    num_compared: int = 0
    source: str = ""
    note: str = ""
    failure: str = ""

    @property
    def agrees(self) -> bool:
        return not self.failure and all(result.error <= self.tolerance for result in self.results)


def verify(args: ServerArgs, options: VerifyOptions) -> Report:
    """Compares ours with transformers.

    That our class cannot be built, filled or run is part of the report; other errors are raised.

    Raises:
        VerifyError: transformers cannot build the model, or the options do not fit it.
    """
    if args.tp_size > 1:
        raise VerifyError("verify runs in one process: leave --tp-size at 1")
    config = read_model_config(args)
    tokenizer = read_tokenizer(args, config)
    prompts = list(_prompts(config, tokenizer, options))
    dtype = config.dtype
    try:
        with _registered(config, options.model_class):
            prompts += _with_pictures(args, config, tokenizer, options)
            ours = OurModel(args, config, max(len(prompt.ids) for prompt in prompts) + options.max_new_tokens)
        theirs = TheirModel(args, config)
        results = [_compare_prompt(ours, theirs, prompt, options) for prompt in prompts]
    except (WeightLoadError, ModelBuildError, ModelImportError, MediaPlacementError, ForwardError) as error:
        name = options.model_class or ", ".join(config.architectures)
        return Report(config.model_path, name, dtype, LOGITS_TOLERANCE[dtype], [], failure=str(error))
    report = Report(config.model_path, type(ours.model).__name__, dtype, LOGITS_TOLERANCE[dtype], results)
    return report if report.agrees else _localise(report, ours, theirs, options)


@contextmanager
def _registered(config: ModelConfig, model_class: str | None) -> Iterator[None]:
    """While a model is loaded, ``model_class`` is the one for its architecture."""
    if model_class is None:
        yield
        return
    cls, overrides = load_class(model_class), ModelRegistry.models.overrides
    before = dict(overrides)
    for arch in config.architectures:
        ModelRegistry.models[arch] = cls
    try:
        yield
    finally:
        overrides.clear()
        overrides.update(before)


def load_class(place: str) -> type[nn.Module]:
    """``module:Class`` or ``path/to/file.py:Class``.

    Raises:
        VerifyError: not written so, or there is no such file or class.
        ModelImportError: the file cannot be imported; the cause is chained.
    """
    module_name, _, name = place.rpartition(":")
    if not module_name or not name:
        raise VerifyError(f"--model-class must be module:Class or FILE.py:Class, not {place!r}")
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise VerifyError(f"--model-class: there is no file {module_name}")
    try:
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else import_module(module_name)
    except Exception as error:  # whatever a model file may raise; the cause is chained
        raise ModelImportError(f"{module_name} cannot be imported: {reason(error)}") from error
    try:
        found = attrgetter(name)(module)
    except AttributeError as error:
        raise VerifyError(f"--model-class: {module_name} has no class {name}") from error
    if not isinstance(found, type):
        raise VerifyError(f"--model-class: {place} is not a class")
    return found


def _import_file(path: Path) -> Any:
    spec = spec_from_file_location(f"verified_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # where the class's processor is looked for
    spec.loader.exec_module(module)
    return module


def _prompts(config: ModelConfig, tokenizer: Any, options: VerifyOptions) -> Iterator[Prompt]:
    """Those of the file or the usual ones, then the long one."""
    room = config.context_length - options.max_new_tokens
    if tokenizer is None:
        if options.prompt_filename:
            raise VerifyError(f"{config.model_path} has no tokenizer, so it cannot read --prompt-filename")
        draw = random.Random(0)
        ids = [draw.randrange(config.vocab_size) for _ in range(max(room, 1))]
        prompts = [Prompt(f"{num} random ids", ids[:num]) for num in RANDOM_LENS]
    else:
        prompts = [Prompt(text, encode(tokenizer, text)) for text in read_prompts(options.prompt_filename)]
        ids = encode(tokenizer, " ".join(prompt.text for prompt in prompts))
    for prompt in prompts:
        _check_len(prompt, room, options)
        yield prompt
    long_len = min(_long_len(config) if options.long_len is None else options.long_len, room)
    if long_len > max(len(prompt.ids) for prompt in prompts):
        yield Prompt(f"({long_len} tokens)", (ids * (long_len // len(ids) + 1))[:long_len])


def _with_pictures(args: ServerArgs, config: ModelConfig, tokenizer: Any, options: VerifyOptions) -> list[Prompt]:
    """For a model that sees: the prompts of the file, or the usual one, after the pictures of ``--image``."""
    if tokenizer is None or not config.is_multimodal or not _has_own_processor(config):
        if options.image:
            reason = (
                "has no tokenizer" if tokenizer is None else f"({', '.join(config.architectures)}) takes no pictures"
            )
            raise VerifyError(f"{config.model_path} {reason}: --image means nothing here")
        return []
    texts, pictures = read_prompts(options.prompt_filename, PICTURE_PROMPTS), read_pictures(options.image or ())
    chats = [picture_prompt(args, config, tokenizer, text, len(pictures)) for text in texts]
    found = prompts_with_pictures(args, config, tokenizer, chats, pictures)
    count = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
    prompts = [Prompt(f"({count}) {text}", p.input_ids, p.media) for text, p in zip(texts, found, strict=True)]
    for prompt in prompts:
        _check_len(prompt, config.context_length - options.max_new_tokens, options)
    return prompts


def _check_len(prompt: Prompt, room: int, options: VerifyOptions) -> None:
    if not options.cut_len < len(prompt.ids) <= room:
        raise VerifyError(
            f"the prompt {prompt.text!r} has {len(prompt.ids)} tokens: it must be more than --cut-len "
            f"({options.cut_len}) and at most {room}, which leaves {options.max_new_tokens} of the context"
        )


def _has_own_processor(config: ModelConfig) -> bool:
    """Whether a file of ours runs the model, and takes media. Raises ModelImportError."""
    try:
        model_cls, _ = ModelRegistry.resolve_model_cls(config.architectures)
    except UnknownArchitectureError:
        return False
    return ModelTraits.of(model_cls).pad_input_ids is not None


def picture_prompt(args: ServerArgs, config: ModelConfig, tokenizer: Any, text: str, num_pictures: int) -> str:
    """In the model's chat template; where it has none, the pictures' placeholders come before the text, a line each."""
    try:
        return chat_text(config.model_path, tokenizer, text, num_pictures)
    except ValueError:
        token = read_processor(args, config, tokenizer, trusted=True).mm_tokens.image_token
        return f"{token}\n" * num_pictures + text


def _long_len(config: ModelConfig) -> int:
    window = getattr(config.hf_text_config, "sliding_window", None)
    return max(MIN_LONG_LEN, 0 if window is None else window + window // 8 + 16)


class OurModel:
    """Ours in this process, one prompt at a time, in pages of its own."""

    def __init__(self, args: ServerArgs, config: ModelConfig, max_len: int) -> None:
        self._worker = Worker(WorkerConfig(args, config, choose_device(args.device)))
        self._num_groups = len(self._worker.loaded().layout.groups)
        self._num_pages = -(-max_len // args.page_size)
        self._worker.init_cache([self._num_pages] * self._num_groups, 1, max_len)
        self._num_steps = 0

    @property
    def model(self) -> nn.Module:
        return self._worker.runner.model

    def cut_of(self, prompt: Prompt, cut_len: int) -> int:
        """``cut_len``, or less where that would cut a picture that the model computes at once."""
        if prompt.media is None or not self._worker.runner.max_media_block:
            return cut_len
        return next((first for first, last in prompt.media.blocks if first < cut_len <= last), cut_len)

    def run(
        self, prompt: Prompt, cut_len: int, num_new: int, trace: Trace | None = None
    ) -> tuple[list[int], torch.Tensor]:
        """``num_new`` ids, and logits [rows, vocab_size] float32: after ``cut_len`` tokens, the prompt, and each id
        but the last. A trace gets what belongs to the prompt. Pictures are encoded anew."""
        self._worker.runner.embedding_cache.clear()
        ids = prompt.ids
        pieces = [(0, cut_len), (cut_len, len(ids))] if cut_len else [(0, len(ids))]
        pieces += [(len(ids) + i, len(ids) + i + 1) for i in range(num_new - 1)]
        output_ids, logits = [], []
        for start, end in pieces:
            with trace.step(start, end - start) if trace and end <= len(ids) else _no_trace():
                token_id, row = self._step(prompt, start, end)
            logits.append(row)
            if end >= len(ids):
                output_ids.append(token_id)
        return output_ids, torch.cat(logits)

    def _step(self, prompt: Prompt, start: int, end: int) -> tuple[int, torch.Tensor]:
        plan = StepPlan(self._num_steps, work=[RowWork(0, start, end - start, sample=True)])
        if start == 0:
            plan.releases = [0] if self._num_steps else []
            admission = Admission(0, "0", prompt.ids, [], replace(GREEDY, media=prompt.media))
            plan.admissions = [admission]
            pages = list(range(1, 1 + self._num_pages))  # 0 is the dummy
            plan.page_writes = [PageWrite(0, group, 0, pages) for group in range(self._num_groups)]
        self._num_steps += 1
        try:
            result, logits = self._worker.step_with_logits(plan)
        except Exception as error:  # whatever a model's forward may raise; the cause is chained
            raise ForwardError(f"{type(self.model).__name__} fails while it computes: {reason(error)}") from error
        if result.rows[0].error is not None:
            return int(logits[0].nan_to_num().argmax()), logits
        return result.rows[0].token_ids[0], logits


@contextmanager
def _no_trace() -> Iterator[None]:
    yield


class TheirModel:
    """Transformers', with its own cache."""

    def __init__(self, args: ServerArgs, config: ModelConfig) -> None:
        try:
            reference = TransformersModel(config.model_path, config.dtype, args.device, args.trust_remote_code)
        except (ValueError, KeyError, AttributeError, ImportError) as error:
            raise VerifyError(
                f"transformers cannot build {', '.join(config.architectures) or 'this model'}, so there is nothing to "
                f"compare with: {str(error).partition(' Model type should be one of')[0]}"
            ) from error
        self.model, self._device = reference.model, reference.device

    @torch.inference_mode()
    def run(self, prompt: Prompt, cut_len: int, output_ids: list[int], trace: Trace | None = None) -> torch.Tensor:
        """Logits as of ``OurModel.run``, if these output ids follow."""
        ids, extras = prompt.ids, {}
        if prompt.media is not None:
            extras = extras_for(self.model, ids, MultimodalInputs.decode(prompt.media.content))
        with trace.step(0, len(ids)) if trace else _no_trace():
            output = self._forward(ids, None, extras)
        rows = [output.logits[:, cut_len - 1], output.logits[:, -1]] if cut_len else [output.logits[:, -1]]
        for token_id in output_ids[:-1]:
            output = self._forward([token_id], output.past_key_values, {})
            rows.append(output.logits[:, -1])
        return torch.cat(rows).float().cpu()

    def _forward(self, ids: list[int], cache: Any, extras: Extras) -> Any:
        input_ids = torch.tensor([ids], device=self._device)
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **extras)


def _compare_prompt(ours: OurModel, theirs: TheirModel, prompt: Prompt, options: VerifyOptions) -> PromptResult:
    cut_len = ours.cut_of(prompt, options.cut_len)
    output_ids, our_logits = ours.run(prompt, cut_len, options.max_new_tokens)
    their_logits = theirs.run(prompt, cut_len, output_ids)[:, : our_logits.shape[1]]
    differences = (our_logits - their_logits).abs()
    return PromptResult(
        prompt,
        float(differences.max()),
        float(differences.mean()),
        logits_error(our_logits, their_logits),
        _top_agreement(our_logits, their_logits),
        output_ids,
        _parting(output_ids, their_logits[-len(output_ids) :]),
    )


def _top_agreement(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    num = min(TOP, ours.shape[1])
    pairs = zip(ours.topk(num).indices.tolist(), theirs.topk(num).indices.tolist(), strict=True)
    return sum(len({*mine} & {*yours}) for mine, yours in pairs) / (num * len(ours))


def _parting(output_ids: list[int], logits: torch.Tensor) -> tuple[int, int] | None:
    for i, (token_id, row) in enumerate(zip(output_ids, logits, strict=True)):
        if float(row.max() - row[token_id]) > TIE_GAP:
            return i, int(row.argmax())
    return None


def _localise(report: Report, ours: OurModel, theirs: TheirModel, options: VerifyOptions) -> Report:
    """The report with what is wrong first, in the shortest prompt, with its text, that differs."""
    if isinstance(ours.model, TransformersForCausalLM):
        note = "The model runs through transformers: its modules are the reference's own, so only logits are compared."
        return _with(report, note=note)
    wrong = [result for result in report.results if result.error > report.tolerance]
    shortest = min(wrong, key=lambda result: len(result.prompt.ids))
    whole = replace(shortest.prompt, ids=[*shortest.prompt.ids, *shortest.output_ids[:-1]])
    evidence, our_logits, their_logits = record(report.dtype, ours, theirs, whole, options.cut_len)
    differences = compare(evidence.ours, evidence.theirs)
    index = first_difference(differences, evidence.tolerance)
    report = _with(report, num_compared=len(differences))
    if index is not None:
        index = pass_over_layout(evidence, differences, index)
        finding = explain(evidence, *differences[index])
        around = differences[max(0, index - NUM_SHOWN) : index + NUM_SHOWN + 1]
        return _with(report, finding=finding, around=around, source=_source(ours.model, finding.module))
    error = logits_error(our_logits, their_logits)
    if error > report.tolerance:
        finding = explain_logits(evidence, our_logits, their_logits, error)
        return _with(report, finding=finding, source=_source(ours.model, ""))
    note = "All modules agree over prompt and text at once: only tokens computed one by one, from the cache, differ."
    return _with(report, note=note)


def _source(model: nn.Module, name: str) -> str:
    """Where the innermost module of a model file that ``name`` is or lies in computes."""
    modules = dict(model.named_modules())
    while name and (name not in modules or type(modules[name]).__module__.startswith(("rtp_llm.srt.", "torch."))):
        name = name.rpartition(".")[0]
    module = modules[name]
    method: Any = type(module).forward
    return f"{type(module).__name__}.forward, {method.__code__.co_filename}:{method.__code__.co_firstlineno}"


def _with(report: Report, **changes: Any) -> Report:
    return Report(**{item.name: getattr(report, item.name) for item in fields(report)} | changes)


def record(
    dtype: str, ours: OurModel, theirs: TheirModel, prompt: Prompt, cut_len: int
) -> tuple[Evidence, torch.Tensor, torch.Tensor]:
    """What both sides compute for a prompt, and the logits [1, vocab_size] that end it."""
    num_tokens, cut_len = len(prompt.ids), ours.cut_of(prompt, cut_len)
    parts = Parts() if prompt.media is None else Parts.of(theirs.model)
    our_trace, their_trace = (Trace(num_tokens, max(0, num_tokens - MAX_KEPT_TOKENS), parts) for _ in range(2))
    with OurRecorder(ours.model, our_trace):
        output_ids, our_logits = ours.run(prompt, cut_len, 1, our_trace)
    with TheirRecorder(theirs.model, their_trace):
        their_logits = theirs.run(prompt, cut_len, output_ids, their_trace)
    config = theirs.model.config.get_text_config()
    evidence = Evidence(config, ours.model, theirs.model, our_trace, their_trace, MODULE_TOLERANCE[dtype])
    return evidence, our_logits[-1:], their_logits[-1:, : our_logits.shape[1]]
