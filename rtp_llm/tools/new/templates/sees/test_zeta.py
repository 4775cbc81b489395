"""Zeta answers as its reference does."""

import pytest
from zeta.reference.make_tiny import make_tiny
from zeta.zeta import EntryClass

from rtp_llm import ModelRegistry
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.reference import TransformersModel, drawn_image
from rtp_llm.tools.schedules import SCHEDULES, Question, Teacher, random_questions, run_schedules
from rtp_llm.tools.verify.all_schedules import image_question
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.run import verify

ModelRegistry.models[EntryClass.__name__] = EntryClass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(checkpoint: str) -> TransformersModel:
    return TransformersModel(checkpoint, "float32", "cpu", trust_remote_code=True)


def arguments(checkpoint: str) -> ServerArgs:
    return ServerArgs(
        model_path=checkpoint,
        dtype="float32",
        device="cpu",
        max_total_tokens=2048,
        trust_remote_code=True,
    )


def test_it_agrees(checkpoint: str) -> None:
    """Logits and texts, of images as well; ``rtp-llm verify`` shows more of what it finds."""
    report = verify(arguments(checkpoint), VerifyOptions())
    assert report.agrees, report.failure or report.finding


def check_schedules(checkpoint: str, reference: TransformersModel, questions: list[Question]) -> None:
    """One by one, batched, in chunks, from a warm cache, for a second turn, in pages, and on two ranks."""
    results = run_schedules(arguments(checkpoint), Teacher(reference.model), questions, SCHEDULES)
    assert [result for result in results if not result.agrees] == []


def test_schedules(checkpoint: str, reference: TransformersModel) -> None:
    vocab_size = reference.model.config.get_text_config().vocab_size - 1  # without the placeholder
    check_schedules(checkpoint, reference, random_questions(vocab_size, (1, 18, 40, 130)))


def test_schedules_with_images(checkpoint: str, reference: TransformersModel) -> None:
    """The engine gets the images themselves, and the reference what our processor makes of them: ``rtp-llm verify``
    says how that compares with transformers' processor, if the checkpoint has one."""
    images = [drawn_image(), drawn_image().rotate(90)]
    args = arguments(checkpoint)
    questions = [image_question(args, reference.model, "What is it?", images[:count]) for count in (1, 2)]
    check_schedules(checkpoint, reference, questions)
