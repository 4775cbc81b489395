"""Replayed steps: the answers are those of running the layers each time, for every architecture."""

import logging
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from rtp_llm import Engine
from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt.devices.cpu import graphs as cpu_graph
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.devices.cpu.provider import CpuProvider
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput
from tiny_models import TINY_MODELS, make_tiny, random_prompts, tiny_model
from tiny_seeing import IMAGE, make_seeing

pytestmark = pytest.mark.skipif(not kernels_work(), reason="there is no C++ compiler")


def answers(name: str, dtype: str = "float32", **options: Any) -> tuple[list[Any], int]:
    """Answers of a tiny model; see ``answers_of`` for any other."""
    return answers_of(tiny_model(name), TINY_MODELS[name].vocab_size, dtype, **options)


def answers_of(model_dir: str, vocab_size: int, dtype: str, **options: Any) -> tuple[list[Any], int]:
    """Ids and logprobs of requests of several lengths, which join and leave; and how many graphs there were."""
    prompts = random_prompts(vocab_size, (3, 20, 9, 1, 30))
    params = [{"temperature": 0, "max_new_tokens": 6 + 3 * i, "ignore_eos": True} for i in range(len(prompts))]
    with Engine(
        model_path=model_dir,
        dtype=dtype,
        device="cpu",
        skip_tokenizer_init=True,
        context_length=96,
        max_total_tokens=600,
        inline=True,
        **options,
    ) as engine:
        results = [
            *engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True),
            *engine.generate(input_ids=prompts[:2], sampling_params=params[3:], return_logprob=True),
        ]
        graphs = engine._runner.core.executor.worker.runner.recorder
    recorded = 0 if graphs is None else sum(not isinstance(graph, int) for graph in graphs._graphs.values())
    return [(result["output_ids"], result["meta_info"]["output_token_logprobs"]) for result in results], recorded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_answers_are_equal(name: str, dtype: str) -> None:
    replayed, recorded = answers(name, dtype)
    assert (replayed, 0) == answers(name, dtype, disable_cpu_graph=True)
    assert recorded == 5  # with 5 rows to 1


@pytest.mark.parametrize(
    "architecture",
    [
        "MixtralForCausalLM",
        "GptOssForCausalLM",
        "DeepseekV3ForCausalLM",
        "Gemma2ForCausalLM",
        "GPT2LMHeadModel",
        "BloomForCausalLM",
    ],
)
def test_experts_latent_caches_and_others(architecture: str, tmp_path: Path) -> None:
    model_dir = make_tiny(architecture, tmp_path)
    vocab_size = AutoConfig.from_pretrained(model_dir).vocab_size
    replayed, recorded = answers_of(model_dir, vocab_size, "bfloat16")
    assert (replayed, 0) == answers_of(model_dir, vocab_size, "bfloat16", disable_cpu_graph=True)
    assert recorded == 5


@pytest.mark.parametrize("options", [{}, {"quantization": "int4"}], ids=["experts", "packed experts"])
def test_calls_that_read_how_many_rows_experts_have(options: dict[str, Any], tmp_path: Path) -> None:
    """In float32 there is no kernel of all experts: each is a product of its own rows, in replays as well."""
    model_dir = make_tiny("MixtralForCausalLM", tmp_path)
    vocab_size = AutoConfig.from_pretrained(model_dir).vocab_size
    replayed, recorded = answers_of(model_dir, vocab_size, "float32", **options)
    assert (replayed, 0) == answers_of(model_dir, vocab_size, "float32", disable_cpu_graph=True, **options)
    assert recorded == 5


def test_models_that_see(tmp_path: Path) -> None:
    """Steps behind a prompt with an image, and behind text alone."""
    model_dir = make_seeing(tmp_path)
    prompts = [f"{IMAGE} What is it?", "No image."]
    images = [Image.new("RGB", (56, 56), "red"), None]
    params = [{"temperature": 0, "max_new_tokens": count, "ignore_eos": True} for count in (12, 24)]
    answers = []
    for disabled in (False, True):
        options: dict[str, Any] = dict(dtype="float32", device="cpu", max_total_tokens=600, inline=True)
        with Engine(model_path=model_dir, disable_cpu_graph=disabled, **options) as engine:
            results = engine.generate(prompts, params, image_data=images)
            answers.append([result["output_ids"] for result in results])
            graphs = engine._runner.core.executor.worker.runner.recorder
        if not disabled:
            assert sum(not isinstance(graph, int) for graph in graphs._graphs.values()) == 2  # two rows, then one
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("BertModel", {"hidden_size": 256}), ("ModernBertModel", {}), ("XLMRobertaForSequenceClassification", {})],
)
def test_small_steps_of_encoders(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Steps of one and two inputs are replayed, those of many are too large; with windows, and with CLS alone."""
    model_dir = make_tiny(architecture, tmp_path, **options)
    vocab_size = AutoConfig.from_pretrained(model_dir).vocab_size
    calls = [random_prompts(vocab_size, lengths, seed) for lengths in ((9,), (9, 40)) for seed in range(8)]
    calls.append(random_prompts(vocab_size, (40,) * 30, 9))
    task = "classify" if "Classification" in architecture else "embed"
    outputs = []
    for disabled in (False, True):
        with Engine(
            model_path=model_dir, dtype="float32", device="cpu", skip_tokenizer_init=True, inline=True,
            disable_cpu_graph=disabled,
        ) as engine:  # fmt: skip
            results = [engine.encode(input_ids=prompts, task=task) for prompts in calls]
            outputs.append([result["embedding"] for some in results for result in some])
            graphs = engine._runner.core.executor.worker.runner.recorder
        if not disabled:
            assert sum(not isinstance(graph, int) for graph in graphs._graphs.values()) == 2
    assert outputs[0] == outputs[1]


PROMPTS = (40, 68, 67, 64, 40, 40, 66, 40, 68, 40, 65, 67, 40, 68)  # 40 and, with dummies, 68 come often enough


def prompt_answers(model_dir: str, vocab_size: int, **options: Any) -> tuple[list[Any], int]:
    """Ids and logprobs of prompts one after the other, half of them with a prefix in the cache; and how many kinds of
    steps with prompts were recorded."""
    texts = random_prompts(vocab_size, tuple(length - 20 for length in PROMPTS))
    start = random_prompts(vocab_size, (20,), seed=1)[0]
    params = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
    options = {"dtype": "bfloat16", "context_length": 96, "max_total_tokens": 2000} | options
    with Engine(model_path=model_dir, device="cpu", skip_tokenizer_init=True, inline=True, **options) as engine:
        results = [
            engine.generate(input_ids=start + text, sampling_params=params, return_logprob=True)
            for text in (*texts, *texts, *(text[::-1] for text in texts))
        ]
        recorder = engine._runner.core.executor.worker.runner.recorder
    graphs = {} if recorder is None else recorder._graphs
    recorded = sum(key[0].is_extend() and not isinstance(graph, int) for key, graph in graphs.items())
    return [(r["output_ids"], r["meta_info"]["output_token_logprobs"]) for r in results], recorded


@pytest.mark.parametrize(
    ("architecture", "are_recorded"),
    [
        ("LlamaForCausalLM", True),
        ("MixtralForCausalLM", True),
        ("GptOssForCausalLM", True),
        ("DeepseekV3ForCausalLM", True),
        ("Gemma2ForCausalLM", True),
        ("GPT2LMHeadModel", True),
        ("Phi3ForCausalLM", True),
        ("Qwen3NextForCausalLM", False),  # states
    ],
)
def test_steps_with_prompts(architecture: str, are_recorded: bool, tmp_path: Path) -> None:
    model_dir = make_tiny(architecture, tmp_path)
    vocab_size = AutoConfig.from_pretrained(model_dir).vocab_size
    replayed, recorded = prompt_answers(model_dir, vocab_size)
    assert (replayed, 0) == prompt_answers(model_dir, vocab_size, disable_cpu_graph=True)
    assert (recorded >= 2) == are_recorded


@pytest.mark.parametrize(
    "options", [{"kv_cache_dtype": "int8"}, {"dtype": "float32"}, {"quantization": "int4"}], ids=str
)
def test_steps_with_prompts_and_options(options: dict[str, Any]) -> None:
    name = "llama-default"
    replayed, recorded = prompt_answers(tiny_model(name), TINY_MODELS[name].vocab_size, **options)
    assert recorded >= 2
    assert (replayed, 0) == prompt_answers(
        tiny_model(name), TINY_MODELS[name].vocab_size, disable_cpu_graph=True, **options
    )


def random_rounds(draw: random.Random, vocab_size: int) -> list[tuple[list[list[int]], list[dict[str, Any]]]]:
    """Calls of one to five prompts, of few lengths, a third of which begin alike, and what each draws by."""
    start = [draw.randrange(vocab_size - 1) for _ in range(40)]
    lengths, rounds = (40, 97, 98, 99, 150), []
    for _ in range(36):
        prompts, params = [], []
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            ids = [draw.randrange(vocab_size - 1) for _ in range(draw.choice(lengths))]
            prompts.append(start[: draw.choice([0, 0, 40])] + ids)
            kinds: list[dict[str, Any]] = [{"temperature": 0}, {"seed": draw.randrange(99), "frequency_penalty": 0.5}]
            params.append({**draw.choice(kinds), "max_new_tokens": draw.choice([1, 3, 6]), "ignore_eos": True})
        rounds.append((prompts, params))
    return rounds


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-default", {"page_size": 16}),
        ("qwen3-mixed-window7-tied", {"kv_cache_dtype": "int8"}),
        ("mistral-window16-yarn", {"quantization": "int4"}),
    ],
)
def test_random_requests(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks beside decoding rows, cached beginnings, and a cache too small for all: some wait or restart.
    Few recordings are kept, so that the memory of those before is used again."""
    monkeypatch.setattr(cpu_graph, "RECORD_AT", 2)
    monkeypatch.setattr(cpu_graph, "MAX_GRAPHS", 12)
    tokens_replayed, replay = [], cpu_graph.CpuGraph.replay

    def noted(graph: cpu_graph.CpuGraph, tensors: Sequence[torch.Tensor]) -> LogitsProcessorOutput:
        tokens_replayed.append(len(tensors[0]))  # the batch's input_ids
        return replay(graph, tensors)

    monkeypatch.setattr(cpu_graph.CpuGraph, "replay", noted)
    rounds = random_rounds(random.Random(0), TINY_MODELS[name].vocab_size)
    small: dict[str, Any] = {
        "context_length": 200,
        "max_total_tokens": 320,
        "max_running_requests": 4,
        "chunked_prefill_size": 100,
    }
    options = small | {"dtype": "bfloat16", "device": "cpu", "skip_tokenizer_init": True, "inline": True} | options
    answers = []
    for disabled in (False, True):
        with Engine(model_path=tiny_model(name), disable_cpu_graph=disabled, **options) as engine:
            results = [
                engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
                for prompts, params in rounds
            ]
        answers.append([(r["output_ids"], r["meta_info"]["output_token_logprobs"]) for some in results for r in some])
    assert sum(num_tokens > 4 for num_tokens in tokens_replayed) >= 8  # there are at most four decoding rows
    assert answers[0] == answers[1]


def test_rotations_by_the_length_of_a_prompt_are_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """Steps of decoding rows are, all the same."""
    name = "llama-dynamic-mlp-bias"
    with caplog.at_level(logging.INFO, "rtp_llm.srt.devices.cpu.graphs"):
        replayed, _ = prompt_answers(tiny_model(name), TINY_MODELS[name].vocab_size)
    assert "steps with prompts are not replayed: a host list, prompt_lens_cpu, is read" in caplog.text
    assert replayed == prompt_answers(tiny_model(name), TINY_MODELS[name].vocab_size, disable_cpu_graph=True)[0]
    assert answers(name)[1] == 5


def test_hooks_see_every_prompt() -> None:
    """A replayed step would call none."""
    name, seen = "llama-default", []
    prompts = random_prompts(TINY_MODELS[name].vocab_size, (40,) * 8)
    with Engine(tiny_model(name), inline=True, dtype="float32", skip_tokenizer_init=True) as engine:
        model = engine._runner.core.executor.worker.runner.model
        for ids in prompts[:6]:
            engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 1})
        model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        for ids in prompts[6:]:
            engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 1})
    assert seen == [40, 40]


@pytest.mark.parametrize("disabled", [False, True])
def test_logits_in_pieces(disabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at once, of up to five: of greedy ones and others, with log-probabilities, penalties and masks."""
    name = "llama-default"
    vocab_size = TINY_MODELS[name].vocab_size
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 3, "top_p": 0.9},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"temperature": 0.7, "seed": 4, "logit_bias": {"5": 2.0}},
        {"temperature": 0, "allowed_token_ids": list(range(0, vocab_size, 3))},
    ]
    params = [{**kind, "max_new_tokens": 8 + 3 * i, "ignore_eos": True} for i, kind in enumerate(kinds)]
    prompts, answers = random_prompts(vocab_size, (3, 20, 9, 1, 30)), []
    for rows_at_once in (2, 100):
        monkeypatch.setattr(CpuProvider, "logit_bytes_at_once", rows_at_once * vocab_size * 4)
        options: dict[str, Any] = dict(dtype="bfloat16", device="cpu", skip_tokenizer_init=True, max_total_tokens=600)
        with Engine(model_path=tiny_model(name), disable_cpu_graph=disabled, inline=True, **options) as engine:
            results = engine.generate(
                input_ids=prompts,
                sampling_params=params,
                return_logprob=[True, False, True, True, False],
                top_logprobs_num=[2, 0, 0, 5, 0],
            )
            graphs = engine._runner.core.executor.worker.runner.recorder
        assert disabled or sum(not isinstance(graph, int) for graph in graphs._graphs.values()) == 5
        kept = ("output_token_logprobs", "output_top_logprobs")
        answers.append([(r["output_ids"], *(r["meta_info"].get(name) for name in kept)) for r in results])
    assert answers[0] == answers[1]


def test_many_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that are not used for long are forgotten, and made anew."""
    monkeypatch.setattr(cpu_graph, "MAX_GRAPHS", 2)
    replayed, recorded = answers("llama-default")
    assert replayed == answers("llama-default", disable_cpu_graph=True)[0]
    assert recorded <= 2


def test_what_hardly_comes_again_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here each number of rows comes for three steps, and one row for six more."""
    monkeypatch.setattr(cpu_graph, "RECORD_AT", 6)
    replayed, recorded = answers("llama-default")
    assert (replayed, 0) == answers("llama-default", disable_cpu_graph=True)
    assert recorded == 2  # one row and two, which the last call has again


def test_a_long_prompt_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation's tables move then: a graph still has the numbers of its own step."""
    name = "llama-default"
    short, long = random_prompts(TINY_MODELS[name].vocab_size, (3, 80))
    greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    answers = []
    for disabled in (False, True):
        options: dict[str, Any] = dict(dtype="float32", device="cpu", skip_tokenizer_init=True, context_length=96)
        with Engine(model_path=tiny_model(name), inline=True, disable_cpu_graph=disabled, **options) as engine:
            prompts = (short, long, short[:2])
            answers.append([engine.generate(input_ids=ids, sampling_params=greedy)["output_ids"] for ids in prompts])
    assert answers[0] == answers[1]


def change_logits(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[ForwardBatch, torch.Tensor], torch.Tensor]
) -> None:
    """Changes the logits of every Llama that the test makes."""
    forward = LlamaForCausalLM.forward

    def changed(model: Any, ids: Any, positions: Any, batch: ForwardBatch) -> LogitsProcessorOutput:
        output = forward(model, ids, positions, batch)
        output.next_token_logits = change(batch, output.next_token_logits)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)


def reads_item(batch: ForwardBatch, hidden: torch.Tensor) -> float:
    return 1.0 if batch.positions.max().item() < 12 else 0.5


def reads_list(batch: ForwardBatch, hidden: torch.Tensor) -> float:
    return 1.0 if batch.positions.tolist()[0] < 12 else 0.5


def reads_array(batch: ForwardBatch, hidden: torch.Tensor) -> float:
    return 1.0 if batch.positions.numpy()[0] < 12 else 0.5


def reads_lengths(batch: ForwardBatch, hidden: torch.Tensor) -> float:
    return 1.0 if batch.seq_lens_cpu[0] < 12 else 0.5


def branches(batch: ForwardBatch, hidden: torch.Tensor) -> float:
    return 1.0 if (batch.positions < 12).all() else 0.5


def indexes(batch: ForwardBatch, hidden: torch.Tensor) -> float:
    return 1.0 if int(batch.positions[0]) < 12 or range(100)[batch.positions[0]] < 12 else 0.5


def selects(batch: ForwardBatch, hidden: torch.Tensor) -> float:
    return 1.0 if len(batch.positions[batch.positions < 12]) else 0.5


READERS = (reads_item, reads_list, reads_array, reads_lengths, branches, indexes, selects)


@pytest.mark.parametrize("factor", READERS, ids=lambda function: function.__name__)
def test_a_model_that_reads_numbers_is_not_replayed(
    factor: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reading(batch: ForwardBatch, logits: torch.Tensor) -> torch.Tensor:
        return logits * factor(batch, logits)

    change_logits(monkeypatch, reading)
    with caplog.at_level(logging.INFO, "rtp_llm.srt.devices.cpu.graphs"):
        replayed, recorded = answers("llama-default")
    assert recorded == 0 and re.search(rf"steps are not replayed: .* \({re.escape(__file__)}, line \d+\)", caplog.text)
    assert replayed == answers("llama-default", disable_cpu_graph=True)[0]


def test_plain_torch_in_a_model_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views, results of every kind, work in place, constants."""

    def changed(batch: ForwardBatch, logits: torch.Tensor) -> torch.Tensor:
        best, _ = logits.topk(2, dim=-1)
        margin = (best[:, 0] - best[:, 1]).reshape(-1, 1) * torch.tensor([0.5])
        places = batch.positions[batch.sample_rows][:, None].float()
        logits += margin * torch.sin(places + torch.arange(logits.shape[1]))
        return torch.cat((logits[:, :7].flip(0).flip(0), logits[:, 7:]), dim=1)

    change_logits(monkeypatch, changed)
    replayed, recorded = answers("llama-default")
    assert recorded == 5
    assert replayed == answers("llama-default", disable_cpu_graph=True)[0]


def test_a_model_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "replays_steps", False, raising=False)
    assert answers("llama-default")[1] == 0
