"""``rtp-llm verify --schedules``: the model under each of the engine's schedules, against transformers."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from rtp_llm.srt.checkpoint import prompts_with_images, read_model_config, read_tokenizer
from rtp_llm.srt.configs.model_config import read_architectures
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.layers.quantization.base import hidden_parameters
from rtp_llm.srt.models.registry import ModelImportError
from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.multimodal.media_store import open_content
from rtp_llm.srt.request_spec import PromptMedia
from rtp_llm.tools.model_file import served_by_file
from rtp_llm.tools.reference import IMAGE_PROMPTS, read_images, read_prompts
from rtp_llm.tools.schedules import NEW_TOKENS, SCHEDULES, SECOND_TURN, Question, ScheduleResult, Teacher, run_schedules
from rtp_llm.tools.verify.feed import extras_for
from rtp_llm.tools.verify.model_class import registered
from rtp_llm.tools.verify.options import VerifyError, VerifyOptions
from rtp_llm.tools.verify.prompts import Prompt, image_prompt, image_prompts, read_or_default_prompts
from rtp_llm.tools.verify.schedule_places import Located, locate
from rtp_llm.tools.verify.sides import TheirModel

TOLERANCES = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}  # of log-probabilities


@dataclass(frozen=True)
class SchedulesReport:
    """
    Args:
        num_with_images: of the questions.
        failure: why nothing could be compared.
        located: where the first schedule that differs does so.
        note: of 16 bits, whether float32 agrees.
    """

    model_path: str
    dtype: str
    num_questions: int = 0
    num_with_images: int = 0
    results: tuple[ScheduleResult, ...] = ()
    failure: str = ""
    located: Located | None = None
    note: str = ""

    @property
    def agrees(self) -> bool:
        return not self.failure and all(result.agrees for result in self.results)


def verify_schedules(args: ServerArgs, options: VerifyOptions) -> SchedulesReport:
    """Ask the engine the prompts of ``verify``, those with images included, under each schedule.

    Raises:
        VerifyError: transformers cannot build the model, or the options do not fit it.
    """
    try:
        with _served(args, options.model_class) as served:
            report, settled = _compare(args, options), ""
            if report.dtype != "float32" and _only_numbers_differ(report):
                exact = _compare(replace(args, dtype="float32"), options)
                settled = _in_float32(exact, report.dtype)
                report = replace(report, located=exact.located)
            if report.located and served:
                located = replace(report.located, source=report.located.source.replace(*served))
                report = replace(report, located=located)
            return replace(report, note=settled)
    except ModelImportError as error:
        return SchedulesReport(args.model_path, args.dtype, failure=str(error))


def _compare(args: ServerArgs, options: VerifyOptions) -> SchedulesReport:
    """Ask under each schedule; in float32, find where the first one that differs does so."""
    config = read_model_config(args)
    tokenizer = read_tokenizer(args, config)
    prompts = list(read_or_default_prompts(config, tokenizer, options))
    theirs = TheirModel(args, config)
    questions = [Question(prompt.text, prompt.ids) for prompt in prompts]
    seen = _image_prompts(args, config, tokenizer, options)
    seeing = list(_image_questions(args, config, tokenizer, options, theirs.model, seen))
    engine_args = _engine_args(args, [*questions, *seeing], tokenizer is None)
    tolerance, teacher = TOLERANCES[config.dtype], Teacher(theirs.model)
    with hidden_parameters():
        results = run_schedules(engine_args, teacher, questions, SCHEDULES, tolerance)
        if seeing:  # apart, since a batch is of ids or of texts
            names = [name for name in SCHEDULES if name != SECOND_TURN]
            results = _worse(results, run_schedules(engine_args, teacher, seeing, names, tolerance))
    located = None
    if config.dtype == "float32":
        located = locate(args, config, theirs, {p.text: p for p in (*prompts, *seen)}, results)
    num = len(questions) + len(seeing)
    return SchedulesReport(config.model_path, config.dtype, num, len(seeing), tuple(results), located=located)


def _in_float32(report: SchedulesReport, dtype: str) -> str:
    """Return what the report in float32 says of a difference in ``dtype``."""
    if report.agrees:
        return (
            f"In float32 all schedules agree: what differs in {dtype} is rounding, or a tie that rounding breaks "
            "otherwise, such as a router's. Then few tokens differ much, and the median is small."
        )
    if failed := next((result.failure for result in report.results if result.failure), report.failure):
        return f"It cannot be computed in float32: {failed}"
    return "In float32 they differ, too: what follows is found there."


def _only_numbers_differ(report: SchedulesReport) -> bool:
    return not report.agrees and not any(result.failure for result in report.results)


def _worse(first: list[ScheduleResult], second: list[ScheduleResult]) -> list[ScheduleResult]:
    """Return of each schedule the result that failed, or differs more."""
    others = {result.schedule: result for result in second}
    pairs = [[result, *([others[result.schedule]] if result.schedule in others else [])] for result in first]
    return [max(pair, key=lambda result: (bool(result.failure), result.difference)) for pair in pairs]


@contextmanager
def _served(args: ServerArgs, model_class: str | None) -> Iterator[tuple[str, str] | None]:
    """Register ``--model-class``; a file's class in a form that other ranks can import. Yield where that form lies, and
    the file's own path."""
    path, _, name = (model_class or "").rpartition(":")
    with ExitStack() as stack:
        stack.enter_context(registered(args, model_class))  # which checks it
        if path.endswith(".py"):
            copied = stack.enter_context(served_by_file(path, read_architectures(args), name))
            yield inspect.getsourcefile(copied) or "", path
        else:
            yield None


def _image_prompts(args: ServerArgs, config: Any, tokenizer: Any, options: VerifyOptions) -> list[Prompt]:
    """Return the prompts with the images of ``--image``, or the drawn one; none, if the model takes no images."""
    prompts = image_prompts(args, config, tokenizer, options)
    return prompts[-len(read_prompts(options.prompt_filename, IMAGE_PROMPTS)) :]


def _image_questions(
    args: ServerArgs,
    config: Any,
    tokenizer: Any,
    options: VerifyOptions,
    their_model: Any,
    prompts: Sequence[Prompt],
) -> Iterator[Question]:
    if not prompts:
        return
    texts, images = read_prompts(options.prompt_filename, IMAGE_PROMPTS), read_images(options.image or ())
    for text, prompt in zip(texts, prompts, strict=True):
        if prompt.media is None:
            raise VerifyError(f"the prompt {prompt.text!r} has no images")
        chat = image_prompt(args, config, tokenizer, text, len(images))
        yield _image_question(their_model, prompt.text, chat, images, prompt.ids, prompt.media)


def image_question(args: ServerArgs, their_model: Any, text: str, images: Sequence[Image.Image]) -> Question:
    """Return a user's message with images before its text: the engine gets the images themselves, and transformers'
    model what our processor makes of them."""
    config = read_model_config(args)
    tokenizer = read_tokenizer(args, config)
    chat = image_prompt(args, config, tokenizer, text, len(images))
    (prompt,) = prompts_with_images(args, config, tokenizer, [chat], images)
    if prompt.media is None:
        raise VerifyError(f"the prompt {text!r} has no images")
    return _image_question(their_model, f"{text} ({len(images)} images)", chat, images, prompt.input_ids, prompt.media)


def _image_question(
    their_model: Any, name: str, chat: str, images: Sequence[Image.Image], ids: list[int], media: PromptMedia
) -> Question:
    extras = extras_for(their_model, ids, MultimodalInputs.decode(open_content(media.content)))
    return Question(name, ids, {"prompt": chat, "image_data": list(images)}, extras)


def _engine_args(args: ServerArgs, questions: list[Question], without_tokenizer: bool) -> ServerArgs:
    """Return the engine's options: a cache for all questions twice, with their answers."""
    num_tokens = 2 * sum(len(question.ids) + 2 * NEW_TOKENS + 2 * args.page_size for question in questions)
    return replace(args, max_total_tokens=num_tokens + 256, skip_tokenizer_init=without_tokenizer)
