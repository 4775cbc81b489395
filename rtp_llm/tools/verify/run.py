"""Run our and transformers' model on the same prompts, and locate their first difference."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from rtp_llm.models_py.transformers import TransformersForCausalLM
from rtp_llm.srt.checkpoint import read_model_config, read_tokenizer
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.registry import ModelImportError, reason
from rtp_llm.srt.models.weight_loading import WeightLoadError
from rtp_llm.srt.multimodal.placement import MediaPlacementError
from rtp_llm.tools.reference import IMAGE_PROMPTS, read_images, read_prompts
from rtp_llm.tools.verify.boundary_states import StateLog
from rtp_llm.tools.verify.causes import explain, explain_logits, explain_segments, pass_over_layout
from rtp_llm.tools.verify.evidence import Evidence, Finding
from rtp_llm.tools.verify.locate import (
    LOGITS_TOLERANCE,
    MODULE_TOLERANCE,
    Difference,
    first_difference,
    logits_error,
)
from rtp_llm.tools.verify.model_class import registered
from rtp_llm.tools.verify.options import VerifyError, VerifyOptions
from rtp_llm.tools.verify.pixels import pixels_note
from rtp_llm.tools.verify.pointer import source_of
from rtp_llm.tools.verify.prompts import (
    Cuts,
    Prompt,
    cuts_of,
    image_prompt,
    image_prompts,
    read_or_default_prompts,
)
from rtp_llm.tools.verify.recording import compared, logits_of, record
from rtp_llm.tools.verify.recurrent_causes import explain_state
from rtp_llm.tools.verify.row_causes import from_the_tower
from rtp_llm.tools.verify.row_numbers import other_number_of_rows
from rtp_llm.tools.verify.sides import ForwardError, OurModel, TheirModel
from rtp_llm.tools.verify.ties import Parting, parting, same_in_float32
from rtp_llm.tools.verify.together import explain_images, explain_pieces, state_of_pieces

TOP = 5
_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")
SMALL = 1e-3  # by which a place must differ if all logits agree
NUM_SINGLE = 3  # tokens at a prompt's end that are computed one by one
NUM_SHOWN = 3  # places shown before and after the first that differs


@dataclass(frozen=True)
class StatesResult:
    """States at the boundaries of a prompt's pieces, in layers that keep one.

    Args:
        num: how many were compared.
        error: the largest difference; worst: whose it is.
    """

    num: int
    error: float
    worst: str

    @classmethod
    def of(cls, log: StateLog) -> "StatesResult | None":
        pairs = log.pairs()
        if not pairs:
            return None
        worst = max(pairs, key=lambda pair: pair.error)
        return cls(len(pairs), worst.error, f"{worst.part} of {worst.module}")


@dataclass(frozen=True)
class PromptResult:
    """Differences of logits after the first tokens, after the prompt, and after each new token except the last.

    ``states``: None: the model keeps none, or none that both sides have.
    """

    prompt: Prompt
    max_difference: float
    mean_difference: float
    error: float  # relative, see ``logits_error``
    top_agreement: float  # fraction of the five best tokens that are the same
    output_ids: list[int]
    parting: Parting | None  # None: the texts are the same
    states: StatesResult | None = None


@dataclass(frozen=True)
class Report:
    """
    Args:
        finding: None if they agree, or if the model runs through transformers, without modules of ours.
        around: the places before and after the differing one, of ``num_compared`` common places.
        source: the place in our model file to be read.
        pixels: how our processor compares with transformers'; empty: no prompt has images.
        failure: why ours cannot be loaded or run; ``results`` is then empty.
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
    pixels: str = ""
    failure: str = ""

    @property
    def agrees(self) -> bool:
        return not self.failure and all(result.error <= self.tolerance for result in self.results)


def verify(args: ServerArgs, options: VerifyOptions) -> Report:
    """Compare ours with transformers.

    Failures to build, load or run our class are part of the report; other errors are raised.

    Raises:
        VerifyError: transformers cannot build the model, or the options do not fit it.
    """
    if args.num_ranks > 1:
        raise VerifyError("verify runs in one process: leave --tp-size and --pp-size at 1")
    try:
        with registered(args, options.model_class):
            return _verify(args, options)
    except ModelImportError as error:
        name = options.model_class or "the model file"
        return Report(args.model_path, name, args.dtype, LOGITS_TOLERANCE.get(args.dtype, 0), [], failure=str(error))


def _verify(args: ServerArgs, options: VerifyOptions) -> Report:
    config = read_model_config(args)
    tokenizer = read_tokenizer(args, config)
    prompts = list(read_or_default_prompts(config, tokenizer, options))
    dtype = config.dtype
    try:
        prompts += image_prompts(args, config, tokenizer, options)
        ours = OurModel(args, config, max(len(prompt.ids) for prompt in prompts) + options.max_new_tokens)
        theirs = TheirModel(args, config)
        results = _compare_prompts(ours, theirs, prompts, options, dtype)
        pixels = _pixels(args, config, tokenizer, options, theirs, prompts)
    except (WeightLoadError, ModelBuildError, ModelImportError, MediaPlacementError, ForwardError) as error:
        name = options.model_class or ", ".join(config.architectures)
        return Report(config.model_path, name, dtype, LOGITS_TOLERANCE[dtype], [], failure=str(error))
    name = type(ours.model).__name__
    report = Report(config.model_path, name, dtype, LOGITS_TOLERANCE[dtype], results, pixels=pixels)
    if dtype == "float32":
        return _small_difference(report, ours, theirs) if report.agrees else _localise(report, ours, theirs, options)
    if report.agrees:
        del ours, theirs  # their memory is wanted
        return _settle_ties(report, args, options)
    found = _localise(report, ours, theirs, options)
    del ours, theirs
    return _judged_in_float32(found, args, options)


def _judged_in_float32(report: Report, args: ServerArgs, options: VerifyOptions) -> Report:
    """Return a report in 16 bits with what float32 says of it: the difference is rounding, or has this cause."""
    args = replace(args, dtype="float32")
    try:
        config = read_model_config(args)
        longest = max(len(result.prompt.ids) for result in report.results)
        ours, theirs = OurModel(args, config, longest + options.max_new_tokens), TheirModel(args, config)
        wrong = [result.prompt for result in report.results if result.error > report.tolerance]
        results = [_compare_prompt(ours, theirs, prompt, options) for prompt in wrong]
    except (WeightLoadError, ModelBuildError, ForwardError, VerifyError) as error:
        return _with(report, note=f"{report.note} It cannot be computed in float32: {reason(error)}".strip())
    anew = replace(report, dtype="float32", tolerance=LOGITS_TOLERANCE["float32"], results=results, finding=None)
    if not anew.agrees:
        anew = _localise(anew, ours, theirs, options)
        note = f"{anew.note} In float32 they differ, too: what follows is found there.".strip()
        return _with(anew, note=note, dtype=report.dtype, tolerance=report.tolerance, results=report.results)
    note = (
        f"In float32 they agree: what differs in {report.dtype} is rounding, or a tie that rounding breaks otherwise."
    )
    if report.finding:
        note += f" It exceeds {MODULE_TOLERANCE[report.dtype]:g} first at {report.finding.module}."
    return _with(report, note=note, finding=None, source="")


def _pixels(
    args: ServerArgs,
    config: ModelConfig,
    tokenizer: Any,
    options: VerifyOptions,
    theirs: TheirModel,
    prompts: list[Prompt],
) -> str:
    """Return what is to be said of the processor; empty: no prompt has images."""
    seen = [prompt for prompt in prompts if prompt.media]
    if not seen:
        return ""
    texts, images = read_prompts(options.prompt_filename, IMAGE_PROMPTS), read_images(options.image or ())
    num_texts, chat = len(texts), image_prompt(args, config, tokenizer, texts[0], len(images))
    return pixels_note(config.model_path, args.trust_remote_code, theirs.model, chat, images, seen[-num_texts])


def _settle_ties(report: Report, args: ServerArgs, options: VerifyOptions) -> Report:
    """Add whether texts that part in 16 bits are equal in float32."""
    parted = [result for result in report.results if result.parting]
    same = same_in_float32(args, options, [result.prompt for result in parted]) if parted else []
    settled = {
        id(result): replace(result, parting=replace(result.parting, same_in_float32=is_same))
        for result, is_same in zip(parted, same, strict=True)
        if result.parting
    }
    return _with(report, results=[settled.get(id(result), result) for result in report.results])


def _compare_prompts(
    ours: OurModel, theirs: TheirModel, prompts: list[Prompt], options: VerifyOptions, dtype: str
) -> list[PromptResult]:
    """Compare all prompts.

    Raises:
        ForwardError: ours cannot compute one; of one with images with the place where their rows become others.
    """
    results = []
    for prompt in prompts:
        try:
            results.append(_compare_prompt(ours, theirs, prompt, options))
        except ForwardError as error:
            if prompt.media is None:
                raise
            shortest = min((each for each in prompts if each.media), key=lambda each: len(each.ids))
            rows = other_number_of_rows(dtype, ours, theirs, shortest)
            raise ForwardError(f"{error}. {rows}" if rows else str(error)) from error
    return results


def _compare_prompt(ours: OurModel, theirs: TheirModel, prompt: Prompt, options: VerifyOptions) -> PromptResult:
    cut_len, log = ours.cut_of(prompt, options.cut_len), StateLog()
    output_ids, our_logits = ours.run(prompt, cut_len, options.max_new_tokens, states=log)
    their_logits = theirs.run(prompt, cut_len, output_ids, states=log)[:, : our_logits.shape[1]]
    theirs.add_states_at_cut(prompt, cut_len, log)
    differences = (our_logits - their_logits).abs()
    return PromptResult(
        prompt,
        float(differences.max()),
        float(differences.mean()),
        logits_error(our_logits, their_logits),
        _top_agreement(our_logits, their_logits),
        output_ids,
        parting(output_ids, their_logits[-len(output_ids) :]),
        StatesResult.of(log),
    )


def _top_agreement(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    num = min(TOP, ours.shape[1])
    pairs = zip(ours.topk(num).indices.tolist(), theirs.topk(num).indices.tolist(), strict=True)
    return sum(len({*mine} & {*yours}) for mine, yours in pairs) / (num * len(ours))


def _localise(report: Report, ours: OurModel, theirs: TheirModel, options: VerifyOptions) -> Report:
    """Add the first difference, in the shortest prompt that differs, with that prompt's text, to the report."""
    wrong = [result for result in report.results if result.error > report.tolerance]
    shortest = min(wrong, key=lambda result: len(result.prompt.ids))
    return localise(report, ours, theirs, _with_text(shortest, theirs.model.config), options.cut_len)


def _small_difference(report: Report, ours: OurModel, theirs: TheirModel) -> Report:
    """Add the first place that differs although all logits agree, in the longest text or a prompt with images, each
    at once: a mistake of little effect there, such as another epsilon."""
    if isinstance(ours.model, TransformersForCausalLM):
        return report
    texts = [result.prompt for result in report.results if result.prompt.media is None]
    seeing = [result.prompt for result in report.results if result.prompt.media is not None]
    for prompt in (*sorted(texts, key=lambda prompt: len(prompt.ids))[-1:], *seeing[:1]):
        differences = compared(evidence := record(report.dtype, ours, theirs, prompt, 0))
        first = [first_difference(differences, limit) for limit in (evidence.tolerance, SMALL)]
        if first[1] is not None and first[0] == first[1]:
            found = localise(report, ours, theirs, prompt, 0)
            note = (
                "All logits agree, but not every place. What follows is a mistake of little effect here, or another "
                "way of writing the same."
            )
            return _with(found, note=note)
    return report


def localise(report: Report, ours: OurModel, theirs: TheirModel, whole: Prompt, cut_len: Cuts) -> Report:
    """Add the first difference in a prompt to the report."""
    if isinstance(ours.model, TransformersForCausalLM):
        note = "The model runs through transformers: its modules are the reference's own, so only logits are compared."
        return _with(report, note=note)
    evidence = record(report.dtype, ours, theirs, whole, cut_len)
    differences = compared(evidence)
    index = first_difference(differences, evidence.tolerance)
    report = _with(report, num_compared=len(differences))
    if index is not None:
        asked = (report.dtype, ours, theirs, whole, cut_len, report.tolerance)
        together = explain_images(*asked)
        if together:
            place, error = differences[index]
            segments = explain_segments(evidence, place, error)
            finding = Finding(place.module, place.part, error, [together])
            finding = finding if segments is None else replace(segments, causes=[*segments.causes, together])
        else:
            index, finding = _searched(evidence, differences, index)
        source = source_of(ours.model, finding.module, finding.part, evidence.ours, finding.look, ours.built)
        in_pieces = explain_pieces(*asked)
        if in_pieces:  # by experiment: a mere description says no more
            causes = [*(finding.causes if finding.is_explained else ()), in_pieces]
            finding = replace(finding, causes=causes, is_description=False)
        around = differences[max(0, index - NUM_SHOWN) : index + NUM_SHOWN + 1]
        return _with(report, finding=finding, around=around, source=source)
    logits, error = logits_of(evidence)
    if error > report.tolerance:
        finding = _guarded(lambda: explain_logits(evidence, logits, error), Finding(logits.module, logits.part, error))
        return _with(
            report, finding=finding, source=source_of(ours.model, "", finding.part, evidence.ours, built=ours.built)
        )
    note = "All modules agree over prompt and text at once: only tokens computed one by one, from the cache, differ."
    states = evidence.wrong_states()
    if states:
        finding = _guarded(
            lambda: explain_state(evidence, states[0]), Finding(states[0].module, states[0].part, states[0].error)
        )
        source = source_of(ours.model, finding.module, finding.part, evidence.ours, built=ours.built)
        return _with(report, note=note, finding=finding, source=source)
    fault = state_of_pieces(ours, whole, _with_single_tokens(ours, whole, cut_len))
    if fault:
        state = fault.state
        finding = Finding(state.layer, f"{state.kind} after {fault.end} tokens", fault.error, [fault.text])
        source = source_of(ours.model, state.layer, finding.part, evidence.ours, built=ours.built)
        return _with(report, note=note, finding=finding, source=source)
    return _with(report, note=_of_reference_alone(report, ours, theirs, whole) or note)


def _of_reference_alone(report: Report, ours: OurModel, theirs: TheirModel, whole: Prompt) -> str | None:
    """Return what to say if the reference computes a prompt's last tokens, one by one, otherwise than all at once, and
    ours does as it does at once; else None. Some of transformers' recurrent layers have two ways that are not alike."""
    num = len(whole.ids)
    if num <= NUM_SINGLE:
        return None
    before, ends = replace(whole, ids=whole.ids[:-NUM_SINGLE]), tuple(range(num - NUM_SINGLE, num))
    at_once = theirs.run(whole, ends, [])[-NUM_SINGLE:]
    one_by_one = theirs.run(before, 0, [*whole.ids[-NUM_SINGLE:], 0])[-NUM_SINGLE:]
    _, our_logits = ours.run(whole, ours.cut_of(whole, ends), 1)
    our_logits = our_logits[-NUM_SINGLE:, : at_once.shape[1]]
    error = logits_error(one_by_one[:, : our_logits.shape[1]], at_once[:, : our_logits.shape[1]])
    if error <= report.tolerance or logits_error(our_logits, at_once[:, : our_logits.shape[1]]) > report.tolerance:
        return None
    return (
        f"The reference differs from itself: its logits of {NUM_SINGLE} tokens computed one by one differ from those "
        f"computed at once by {error:.2g}. Ours, one by one, are those that it computes at once. Nothing is found "
        "wrong in the model file."
    )


def _with_single_tokens(ours: OurModel, prompt: Prompt, cut_len: Cuts) -> Cuts:
    """Return cuts after which a prompt's last tokens are computed one by one, as those of a text are."""
    num = len(prompt.ids)
    return ours.cut_of(prompt, tuple(sorted({*cuts_of(cut_len), *range(max(1, num - NUM_SINGLE), num)})))


def _searched(evidence: Evidence, differences: list[Difference], index: int) -> tuple[int, Finding]:
    """Return the first difference that is none of layout, and what is found there."""
    place, error = differences[index]
    found = [index]

    def search() -> Finding:
        at = pass_over_layout(evidence, differences, index)
        found.append(from_the_tower(evidence, differences, at))
        return explain(evidence, *differences[found[-1]])

    finding = _guarded(search, Finding(place.module, place.part, error))
    return found[-1], finding


def _guarded(search: Callable[[], Finding], place: Finding) -> Finding:
    """Return what a search finds. A reference is anybody's code, and may have what experiments do not expect: then the
    place is found all the same, and what went wrong is said."""
    try:
        return search()
    except Exception as failure:  # of any kind; it is reported
        return replace(place, causes=[f"the search for it failed, which is a fault of verify: {reason(failure)}"])


def _with_text(result: PromptResult, config: Any) -> Prompt:
    """Return the prompt with its text, up to the first placeholder of media in it: those would want media of their
    own. ``config``: the reference's, which names placeholders."""
    prompt = result.prompt
    placeholders = {value for name, value in vars(config).items() if _PLACEHOLDER.fullmatch(name)}
    blocks = prompt.media.blocks if prompt.media else []
    placeholders |= {prompt.ids[i] for first, last in blocks for i in range(first, last + 1)}
    text = itertools.takewhile(lambda token_id: token_id not in placeholders, result.output_ids[:-1])
    return replace(prompt, ids=[*prompt.ids, *text])


def _with(report: Report, **changes: Any) -> Report:
    return Report(**{item.name: getattr(report, item.name) for item in fields(report)} | changes)
