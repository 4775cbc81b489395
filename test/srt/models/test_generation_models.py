"""Whole models against transformers: log-probabilities and text of five prompts, from short to long.

    cd test/srt/models
    ONLY_RUN=Qwen/Qwen2-1.5B python3 -m unittest test_generation_models.TestGenerationModels.test_others

``ONLY_RUN`` names one model: a hub id, a checkpoint directory, or ``tiny/ARCHITECTURE`` for a tiny random model of any
causal architecture of transformers, or of one of ours that sees, made on the spot. A model that stands in no list is
held to the default tolerances, and its own code runs only with ``TRUST_REMOTE_CODE=1``. Models that see are also asked
about one image and about two; both sides are given the same pixels, those of our processor.
"""

# ruff: noqa: E402

import os
import sys
import tempfile
import unittest
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1] / "helpers")]  # unittest knows only this folder

import pytest
import torch
import transformers
from asked_with_images import ImagePrompt, image_prompts, their_image_answers
from seeing_twins import SEEING_TWINS

from rtp_llm import Engine, ModelRegistry
from rtp_llm.srt.checkpoint import read_model_config
from rtp_llm.srt.configs.model_path import ModelNotFoundError, resolve_model_path
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.reference import Answer, answers
from tiny_models import make_tiny

TINY = "tiny/"
DTYPE = "float16" if torch.cuda.is_available() else "float32"
MAX_NEW_TOKENS = 32
TOP_NUM = 5
LONG_PROMPT_CHARACTERS = 1000
CHECKED_PROMPT_TOKENS = 100  # of longer prompts, logprobs are printed but not checked: rounding adds up


@dataclass(frozen=True)
class ModelCase:
    """A model and how far it may be from transformers. Tolerances are of log-probabilities; see ``rouge_l``."""

    model_path: str
    tp_size: int = 1
    prefill_tolerance: float = 5e-2
    decode_tolerance: float = 5e-2
    rouge_l_tolerance: float = 1
    skip_long_prompt: bool = False
    trust_remote_code: bool = False
    attention_backend: str | None = None

    @property
    def dtype(self) -> str:
        return "float32" if self.model_path.startswith(TINY) else DTYPE  # random weights have no margins for rounding


CI_MODELS = [
    ModelCase("tiny/LlamaForCausalLM"),
    ModelCase("tiny/Qwen3ForCausalLM"),
]

# The complete list of models to test a new release with. Add yours here; its tiny twin is in already.
ALL_OTHER_MODELS = [
    ModelCase("Qwen/Qwen2-1.5B"),
    ModelCase("Qwen/Qwen2.5-14B-Instruct"),
    ModelCase("Qwen/Qwen3-0.6B"),
    ModelCase("HuggingFaceTB/SmolLM-135M-Instruct", skip_long_prompt=True),
    ModelCase("mistralai/Mistral-7B-Instruct-v0.3"),
    ModelCase("Qwen/Qwen2-VL-2B-Instruct"),
    ModelCase("Qwen/Qwen2.5-VL-3B-Instruct"),
    ModelCase("Qwen/Qwen3-VL-2B-Instruct"),
    ModelCase("llava-hf/llava-1.5-7b-hf"),
    ModelCase("llava-hf/llava-v1.6-mistral-7b-hf"),
    ModelCase("llava-hf/llava-onevision-qwen2-0.5b-ov-hf"),
    ModelCase("google/gemma-3-4b-it"),
    ModelCase("OpenGVLab/InternVL3-1B-hf"),
    ModelCase("mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
    *(
        ModelCase(TINY + architecture)
        for architecture in sorted(ModelRegistry.get_generating_archs())
        if hasattr(transformers, architecture)  # else there is nothing to compare with
    ),
]

PROMPTS = [
    "Green means go. Amber means wait. " * 800 + "Green means",
    "The capital of the United Kingdom is",
    "Today is a sunny day and I like",
    "Machine learning is a part of computer science that is about",
    (HERE / "long_prompt.txt").read_text(encoding="utf-8"),
]


def chosen_case() -> ModelCase | None:
    """The case that ONLY_RUN names: that of a list, else one with default tolerances. None if it is not set."""
    name = os.environ.get("ONLY_RUN")
    if name is None:
        return None
    if not name.strip():
        raise ValueError("ONLY_RUN is empty; name a model, or unset it to run all")
    listed = [case for case in CI_MODELS + ALL_OTHER_MODELS if case.model_path == name]
    return listed[0] if listed else ModelCase(name, trust_remote_code=os.environ.get("TRUST_REMOTE_CODE") == "1")


@contextmanager
def checkpoint(case: ModelCase) -> Iterator[str]:
    """The directory of the case's model; a tiny one exists only meanwhile."""
    if not case.model_path.startswith(TINY):
        yield resolve_model_path(case.model_path)
        return
    with tempfile.TemporaryDirectory() as folder:
        architecture = case.model_path.removeprefix(TINY)
        twin = SEEING_TWINS.get(architecture)
        yield make_tiny(architecture, folder) if twin is None else twin.make(Path(folder))


def reference_answers(case: ModelCase, model_dir: str, prompts: list[str]) -> list[Answer]:
    """By transformers, in a process that has ended, and given its memory back, when this returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(
            answers,
            model_dir,
            prompts,
            MAX_NEW_TOKENS,
            TOP_NUM,
            dtype=case.dtype,
            trust_remote_code=case.trust_remote_code,
        ).result()


def our_answers(case: ModelCase, model_dir: str, prompts: list[str], expected: list[Answer]) -> list[Answer]:
    """By the engine, all prompts in one batch, cut as the reference had to cut them."""
    with Engine(
        model_path=model_dir,
        dtype=case.dtype,
        tp_size=case.tp_size,
        mem_fraction_static=0.65,
        trust_remote_code=case.trust_remote_code,
        attention_backend=case.attention_backend,
    ) as engine:
        prompt_ids = [
            engine.tokenizer(prompt).input_ids[-len(answer.prompt_ids) :]
            for prompt, answer in zip(prompts, expected, strict=True)
        ]
        results = engine.generate(
            input_ids=prompt_ids,
            sampling_params={"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=TOP_NUM,
        )
    return [_answer(ids, result) for ids, result in zip(prompt_ids, results, strict=True)]


def their_image_answers_apart(case: ModelCase, model_dir: str, prompts: list[ImagePrompt]) -> list[Answer]:
    """As ``reference_answers``."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(
            their_image_answers, model_dir, prompts, MAX_NEW_TOKENS, TOP_NUM, case.dtype, case.trust_remote_code
        ).result()


def our_image_answers(case: ModelCase, model_dir: str, prompts: list[ImagePrompt]) -> list[Answer]:
    """By the engine, from the images themselves, all prompts in one batch."""
    with Engine(
        model_path=model_dir,
        dtype=case.dtype,
        tp_size=case.tp_size,
        mem_fraction_static=0.65,
        trust_remote_code=case.trust_remote_code,
        attention_backend=case.attention_backend,
    ) as engine:
        results = engine.generate(
            [prompt.text for prompt in prompts],
            image_data=[prompt.images for prompt in prompts],
            sampling_params={"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=TOP_NUM,
        )
    return [_answer(prompt.ids, result) for prompt, result in zip(prompts, results, strict=True)]


def _answer(prompt_ids: list[int], result: dict) -> Answer:
    """The first prompt token follows nothing; the last one is followed by the first output token."""
    meta = result["meta_info"]
    after_prompt = meta["input_top_logprobs"][1:] + meta["output_top_logprobs"][:1]
    prefill, decode = ([[e[0] for e in entry] for entry in top] for top in (after_prompt, meta["output_top_logprobs"]))
    return Answer(prompt_ids, result["output_ids"], result["text"], prefill, decode)


def max_difference(ours: list[list[float]], expected: list[list[float]]) -> float:
    """Largest distance between the best log-probabilities, whichever tokens they are of."""
    return (torch.tensor(ours) - torch.tensor(expected)).abs().max().item()


def rouge_l(ours: str, expected: str) -> float:
    """ROUGE-L (Lin, 2004) over characters: with L the length of the longest common subsequence, precision L / len(ours)
    and recall L / len(expected), their harmonic mean, 2 L / (len(ours) + len(expected)). 1 means equal texts.

    Raises:
        ValueError: a text is empty.
    """
    if not ours or not expected:
        raise ValueError(f"there is no text to compare: ours {ours!r}, transformers' {expected!r}")
    lengths = [0] * (len(expected) + 1)  # of the common subsequences of what was read of ours and expected[:i]
    for ours_char in ours:
        before = lengths
        lengths = [0]
        for i, char in enumerate(expected):
            lengths.append(before[i] + 1 if char == ours_char else max(before[i + 1], lengths[i]))
    return 2 * lengths[-1] / (len(ours) + len(expected))


class TestGenerationModels(unittest.TestCase):
    def check_close(self, case: ModelCase, ours: Answer, expected: Answer) -> None:
        self.assertEqual(ours.prompt_ids, expected.prompt_ids, "the prompt's token ids")
        similarity = rouge_l(ours.text, expected.text)
        prefill_diff = max_difference(ours.prefill_top, expected.prefill_top)
        decode_diff = max_difference(ours.decode_top, expected.decode_top)
        print(f"{case.model_path}, prompt of {len(ours.prompt_ids)} tokens: rouge_l {similarity:.4f}")
        print(f"prefill logprobs max_diff {prefill_diff:.2e}")
        print(f"decode logprobs max_diff {decode_diff:.2e}")
        self.assertGreaterEqual(
            similarity, case.rouge_l_tolerance, f"\nours:          {ours.text!r}\ntransformers': {expected.text!r}"
        )
        if len(ours.prompt_ids) <= CHECKED_PROMPT_TOKENS:
            self.assertLess(prefill_diff, case.prefill_tolerance, "log-probabilities within the prompt")
            self.assertLess(decode_diff, case.decode_tolerance, "log-probabilities of the output")

    def run_case(self, case: ModelCase) -> None:
        prompts = [p for p in PROMPTS if not case.skip_long_prompt or len(p) < LONG_PROMPT_CHARACTERS]
        with checkpoint(case) as model_dir:
            expected = reference_answers(case, model_dir, prompts)
            ours = our_answers(case, model_dir, prompts, expected)
            args = ServerArgs(model_path=model_dir, dtype=case.dtype, trust_remote_code=case.trust_remote_code)
            if read_model_config(args).is_multimodal:
                asked = image_prompts(args)
                expected += their_image_answers_apart(case, model_dir, asked)
                ours += our_image_answers(case, model_dir, asked)
        for i, (our_answer, their_answer) in enumerate(zip(ours, expected, strict=True)):
            with self.subTest(model=case.model_path, prompt=i):
                self.check_close(case, our_answer, their_answer)

    def test_ci_models(self) -> None:
        chosen = chosen_case()
        cases = CI_MODELS if chosen is None else [case for case in CI_MODELS if case == chosen]
        if not cases:
            self.skipTest("ONLY_RUN names another model; test_others runs it")
        for case in cases:
            with self.subTest(model=case.model_path):
                self.run_case(case)

    @pytest.mark.slow
    def test_others(self) -> None:
        """The model of ONLY_RUN, which must be there; without it all, but for those that this machine cannot get."""
        chosen = chosen_case()
        if chosen is not None:
            self.run_case(chosen)
            return
        for case in ALL_OTHER_MODELS:
            with self.subTest(model=case.model_path):
                try:
                    self.run_case(case)
                except ModelNotFoundError as error:
                    self.skipTest(str(error))


class TestTheComparison(unittest.TestCase):
    """That it can fail."""

    def test_rouge_l(self) -> None:
        self.assertEqual(rouge_l("abc", "abc"), 1)
        self.assertEqual(rouge_l("abc", "xyz"), 0)
        self.assertAlmostEqual(rouge_l("a cat sat", "a cat sits"), 2 * 8 / 19)
        with self.assertRaisesRegex(ValueError, "no text"):
            rouge_l("", "abc")

    def test_wrong_answers_are_told(self) -> None:
        right = Answer([0, 5], [6, 7], "xy", [[-0.1, -2.0]] * 2, [[-0.2, -1.0]] * 2)
        case = ModelCase("any", prefill_tolerance=0.05, decode_tolerance=0.05)
        test = TestGenerationModels()
        test.check_close(case, right, right)
        wrong: Sequence[tuple[str, object]] = [
            ("prompt_ids", [0, 6]),
            ("text", "xz"),
            ("prefill_top", [[-0.1, -2.0], [-0.1, -2.06]]),
            ("decode_top", [[-0.2, -1.0], [-0.26, -1.0]]),
        ]
        for name, value in wrong:
            with self.assertRaises(AssertionError):
                test.check_close(case, Answer(**(vars(right) | {name: value})), right)

    def test_only_run_names_any_model(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ONLY_RUN", "HuggingFaceTB/SmolLM-135M-Instruct")
            self.assertTrue(chosen_case().skip_long_prompt)
            patch.setenv("ONLY_RUN", "/somewhere/else")
            self.assertEqual(chosen_case(), ModelCase("/somewhere/else"))
            patch.setenv("TRUST_REMOTE_CODE", "1")
            self.assertEqual(chosen_case(), ModelCase("/somewhere/else", trust_remote_code=True))
            patch.setenv("ONLY_RUN", "tiny/NoSuchForCausalLM")
            with self.assertRaisesRegex(ValueError, "NoSuchForCausalLM"):
                TestGenerationModels().test_others()
            patch.setenv("ONLY_RUN", "nobody/no-such-model")
            patch.setattr("rtp_llm.srt.configs.model_path._download", _unreachable)
            with self.assertRaisesRegex(ModelNotFoundError, "nobody/no-such-model"):
                TestGenerationModels().test_others()


def _unreachable(*args: object) -> str:
    raise OSError("the hub cannot be reached")
