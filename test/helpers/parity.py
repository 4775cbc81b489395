"""Whether the engine answers as transformers does, in float32: what tests of model files share.

A test file lists cases, makes a fixture of them with ``engine_fixture``, and runs each of ``CHECKS`` by ``check_anew``.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rtp_llm import Engine
from tiny_models import Reference, assert_same_ids, make_tiny, random_prompts, reference

LENGTHS = (1, 18, 40, 130)
NEW_TOKENS = 12
LOGPROB_TOLERANCE = 1e-3
CONTEXT_LENGTH = 512
CHUNKS = {"chunked_prefill_size": 16}
PAGES = CHUNKS | {"page_size": 4}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint (see ``make_tiny``) and how it is served.

    ``edit`` may change the checkpoint's directory before anybody reads it. ``twin`` writes what the engine serves in
    its place, such as a quantized checkpoint, into a second folder; it may change the first to mean the same.
    """

    name: str
    architecture: str
    config: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)  # of the engine
    edit: Callable[[str], None] | None = None
    twin: Callable[[Path, Path], str] | None = None
    slow: bool = False
    has_states: bool = False  # of sequences, besides or instead of keys and values

    @property
    def page_size(self) -> int:
        return self.options.get("page_size", 1)

    @property
    def has_windows(self) -> bool:
        return bool(self.config.get("sliding_window")) and self.config.get("use_sliding_window", True)

    def make(self, directory: Path) -> str:
        model_dir = make_tiny(self.architecture, directory, **self.config)
        if self.edit:
            self.edit(model_dir)
        return model_dir


@dataclass(frozen=True)
class Served:
    """An engine, the prompts it is asked, and what transformers answers to them."""

    case: Case
    engine: Engine
    model_dir: str  # that transformers reads
    prompts: list[list[int]]
    references: list[Reference]

    def generate(self, input_ids: Any, **options: Any) -> Any:
        return generate(self.engine, input_ids, **options)


def params_of(cases: Sequence[Case]) -> list[Any]:
    """For a fixture: one worker has all tests of a case, and slow cases are marked."""
    return [
        pytest.param(
            case,
            id=case.name,
            marks=[pytest.mark.xdist_group(case.name), *([pytest.mark.slow] if case.slow else [])],
        )
        for case in cases
    ]


@contextmanager
def serve(case: Case, directory: Path) -> Iterator[Served]:
    model_dir = served_dir = case.make(directory)
    if case.twin:
        twin = directory / "twin"
        twin.mkdir()
        served_dir = case.twin(directory, twin)
    prompts, references = prompts_and_references(model_dir)
    with open_engine(served_dir, **case.options) as engine:
        yield Served(case, engine, model_dir, prompts, references)


def engine_fixture(cases: Sequence[Case]) -> Any:
    """Return a fixture of a module: each case served in turn."""

    @pytest.fixture(scope="module", params=params_of(cases))
    def engine_of_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
        with serve(request.param, tmp_path_factory.mktemp("checkpoint")) as served:
            yield served

    return engine_of_case


def open_engine(model_dir: str, **options: Any) -> Engine:
    options = {"dtype": "float32", "context_length": CONTEXT_LENGTH, "max_total_tokens": 2048} | options
    return Engine(model_path=model_dir, device="cpu", skip_tokenizer_init=True, **options)


def generate(engine: Engine, input_ids: Any, max_new_tokens: int = NEW_TOKENS, **options: Any) -> Any:
    params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return engine.generate(input_ids=input_ids, sampling_params=params, **options)


def prompts_and_references(model_dir: str) -> tuple[list[list[int]], list[Reference]]:
    vocab_size = json.loads(Path(model_dir, "config.json").read_text())["vocab_size"]
    prompts = random_prompts(vocab_size, LENGTHS)
    return prompts, [reference(model_dir, tuple(prompt), NEW_TOKENS) for prompt in prompts]


def same_answers(served: Served, results: list[dict[str, Any]], what: str) -> None:
    for result, prompt, expected in zip(results, served.prompts, served.references, strict=True):
        assert_same_ids(result["output_ids"], expected, f"{served.case.name}, {what}, prompt of {len(prompt)}")


def same_logprobs(result: dict[str, Any], expected: Reference) -> None:
    prompt_logprobs = [entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]]
    assert prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=LOGPROB_TOLERANCE)
    same_output_logprobs(result, expected)


def same_output_logprobs(result: dict[str, Any], expected: Reference) -> None:
    """Only where the tokens are the same."""
    if result["output_ids"] == expected.output_ids:
        output_logprobs = [entry[0] for entry in result["meta_info"]["output_token_logprobs"]]
        assert output_logprobs == pytest.approx(expected.output_logprobs, abs=LOGPROB_TOLERANCE)


def check_one_by_one(served: Served) -> None:
    same_answers(served, [served.generate(prompt) for prompt in served.prompts], "one by one")


def check_batched_with_logprobs(served: Served) -> None:
    results = served.generate(served.prompts, return_logprob=True, logprob_start_len=0)
    same_answers(served, results, "batched")
    for result, expected in zip(results, served.references, strict=True):
        same_logprobs(result, expected)


def check_from_a_warm_cache(served: Served) -> None:
    served.generate(served.prompts)
    results = [served.generate(prompt) for prompt in served.prompts]
    same_answers(served, results, "warm")
    for result, prompt in zip(results, served.prompts, strict=True):
        cached = result["meta_info"]["cached_tokens"]
        most = (len(prompt) - 1) // served.case.page_size * served.case.page_size
        if served.case.has_states:  # of which the last is kept at a multiple of 64
            assert (len(prompt) - 1) // 64 * 64 <= cached <= most
            continue
        # With windows, the page that one reaches back into may be gone.
        assert cached <= most if served.case.has_windows and served.case.page_size > 1 else cached == most


def check_second_turn(served: Served) -> None:
    """The second prompt holds the first answer, whose keys were computed one by one."""
    for first in served.prompts[1:3]:
        prompt = [*first, *served.generate(first)["output_ids"], 3, 1, 4]
        expected = reference(served.model_dir, tuple(prompt), NEW_TOKENS)
        assert_same_ids(served.generate(prompt)["output_ids"], expected, f"{served.case.name}, second turn")


def check_anew(check: Callable[[Served], None], served: Served) -> None:
    """Run one of ``CHECKS`` with nothing cached."""
    flushed, message = served.engine.flush_cache()
    assert flushed, message
    check(served)


CHECKS = (check_one_by_one, check_batched_with_logprobs, check_from_a_warm_cache, check_second_turn)


def check_quickly(case: Case, directory: Path) -> None:
    """One prompt, past every window: for the quick tests of a model whose other tests are slow."""
    model_dir = case.make(directory)
    vocab_size = json.loads(Path(model_dir, "config.json").read_text())["vocab_size"]
    prompt = random_prompts(vocab_size, [40])[0]
    served_dir = model_dir
    if case.twin:
        (directory / "twin").mkdir()
        served_dir = case.twin(directory, directory / "twin")
    expected = reference(model_dir, tuple(prompt), 4)
    with open_engine(served_dir, **case.options) as engine:
        result = generate(engine, prompt, max_new_tokens=4, return_logprob=True, logprob_start_len=0)
    assert_same_ids(result["output_ids"], expected, f"{case.name}, one prompt")
    same_logprobs(result, expected)


def check_two_ranks(case: Case, directory: Path) -> None:
    """Batched, cold with log-probabilities and warm, over gloo."""
    model_dir = case.make(directory)
    prompts, references = prompts_and_references(model_dir)
    with open_engine(model_dir, tp_size=2, **case.options) as engine:
        cold = generate(engine, prompts, return_logprob=True, logprob_start_len=0)
        for what, results in (("cold", cold), ("warm", generate(engine, prompts))):
            for result, expected in zip(results, references, strict=True):
                assert_same_ids(result["output_ids"], expected, f"{case.name}, two ranks, {what}")
    for result, expected in zip(cold, references, strict=True):
        same_logprobs(result, expected)


def rewrite_tensors(model_dir: str, change: Callable[[Tensors], Tensors]) -> None:
    """Replaces the checkpoint's tensors by what ``change`` makes of them."""
    path = Path(model_dir, "model.safetensors")
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


def disturb_correction_biases(model_dir: str) -> None:
    """They are zero in a model that was never trained. These change which experts are chosen, and in which groups."""

    def change(tensors: Tensors) -> Tensors:
        generator = torch.Generator().manual_seed(3)
        names = [name for name in tensors if name.endswith("e_score_correction_bias")]
        assert names
        return tensors | {name: 0.3 * torch.randn(tensors[name].shape, generator=generator) for name in names}

    rewrite_tensors(model_dir, change)


def disturb_layer_scalars(model_dir: str) -> None:
    """They are one in a model that was never trained."""

    def change(tensors: Tensors) -> Tensors:
        names = [name for name in tensors if name.endswith("layer_scalar")]
        assert names
        return tensors | {name: torch.tensor([0.6 + 0.1 * i]) for i, name in enumerate(names)}

    rewrite_tensors(model_dir, change)


def check_other_layout(case: Case, directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """With its tensors changed, the checkpoint still means what it meant."""
    model_dir = case.make(directory)
    prompts, references = prompts_and_references(model_dir)
    rewrite_tensors(model_dir, change)
    with open_engine(model_dir, **case.options) as engine:
        for result, expected in zip(generate(engine, prompts), references, strict=True):
            assert_same_ids(result["output_ids"], expected, f"{case.name}, other layout")
