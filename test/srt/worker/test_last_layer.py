"""The last layer of prompts for wanted tokens alone: answers are those of computing it for all tokens."""

import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_forward import logprob_row, make_batch
from stepped_core import Core, mixed_requests
from torch import nn

from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.worker import last_layer
from rtp_llm.srt.worker.last_layer import LastLayer, UnknownForm, WantedTokens
from tiny_models import make_tiny

VOCAB_SIZE = 90  # ids below it are in each model's vocabulary
ARCHITECTURES = (
    "BloomForCausalLM",  # biases by distance
    "Cohere2ForCausalLM",  # attention and feed-forward block of the same input
    "DeepseekV3ForCausalLM",  # latents
    "Gemma2ForCausalLM",  # norms behind blocks
    "GptOssForCausalLM",  # windows, sinks
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",  # layers before the last have states
)


@pytest.fixture(autouse=True)
def narrowed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have it done wherever it can be; return the numbers of tokens of the steps in which it was."""
    noted: list[int] = []
    batch_of = WantedTokens.batch_of

    def noting(self: WantedTokens, *args: Any) -> ForwardBatch:
        noted.append(len(self.tokens))
        return batch_of(self, *args)

    monkeypatch.setattr(last_layer, "LEAST_SAVED", 1)
    monkeypatch.setattr(WantedTokens, "batch_of", noting)
    return noted


def last_layer_of(core: Core) -> LastLayer:
    worker = core.executor.worker if hasattr(core.executor, "worker") else core.executor.workers[-1]
    found: LastLayer = worker.runner.last_layer
    return found


def check_same(narrowed: list[int], change: Callable[[Core], Any] = lambda core: None, **options: Any) -> None:
    """A core with these options answers as one rank does that computes the last layer for all tokens."""
    options = {"chunked_prefill_size": 64} | options
    alone = {key: value for key, value in options.items() if key not in ("tp_size", "pp_size")}
    whole, wanted = Core(**alone), Core(**options)
    try:
        last_layer_of(whole).is_on = False
        change(wanted)
        expected = whole.run(mixed_requests(VOCAB_SIZE))
        assert not narrowed
        assert wanted.run(mixed_requests(VOCAB_SIZE)) == expected
        for rid, told in whole.logprobs().items():
            ours = wanted.logprobs()[rid]
            assert [each.logprob for each in ours] == pytest.approx([each.logprob for each in told], abs=1e-4)
    finally:
        for core in (whole, wanted):
            core.close()


@pytest.mark.parametrize("name", ["llama-dynamic-mlp-bias", "llama-longrope", "mistral-window7"])
def test_rotations_by_length_and_windows(name: str, narrowed: list[int]) -> None:
    check_same(narrowed, name=name)
    assert narrowed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str, narrowed: list[int], tmp_path: Path) -> None:
    check_same(narrowed, model_path=make_tiny(architecture, tmp_path))
    assert narrowed


def test_int8_caches_and_pages(narrowed: list[int]) -> None:
    check_same(narrowed, name="llama-default", kv_cache_dtype="int8", page_size=4)
    assert narrowed


def test_another_attention_back_end(narrowed: list[int]) -> None:
    check_same(narrowed, name="qwen3-mixed-window7-tied", attention_backend="torch_native")
    assert narrowed


@pytest.mark.parametrize("options", [{"tp_size": 2}, {"pp_size": 2}], ids=str)
def test_ranks(options: dict[str, int], narrowed: list[int]) -> None:
    check_same(narrowed, name="llama-tp", threads=True, **options)
    assert narrowed


def test_a_layer_whose_states_go_on_is_left_as_it_is(tmp_path: Path) -> None:
    core = Core(model_path=make_tiny("FalconH1ForCausalLM", tmp_path))
    assert last_layer_of(core) is None


def test_a_list_of_attention_alone_is_not_taken_for_layers(tmp_path: Path) -> None:
    """Transformers' own models have such a list; the engine knows nothing of their other modules."""
    core = Core(model_path=make_tiny("LlamaForCausalLM", tmp_path), model_impl="transformers")
    assert last_layer_of(core) is None


def test_watched_layers_see_all_tokens(narrowed: list[int]) -> None:
    seen: list[int] = []

    def watch(core: Core) -> None:
        mlp = core.executor.worker.runner.model.model.layers[-1].mlp
        mlp.register_forward_hook(lambda module, args, output: seen.append(len(output)))

    check_same(narrowed, watch, name="llama-default")
    assert not narrowed and max(seen) > 32


class TakesMore(nn.Module):
    """A layer that is given something of which nobody knows what it is."""

    def __init__(self, layer: nn.Module, more: Any) -> None:
        super().__init__()
        self.layer, self.more = layer, more

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, *args: Any) -> Any:
        return self.layer(positions, hidden_states, *args, **self.more(hidden_states))


class Odd(nn.Module):
    """The other layer, with an argument that it drops, or a result in another form."""

    def __init__(self, layer: nn.Module, is_flat: bool) -> None:
        super().__init__()
        self.layer, self.is_flat = layer, is_flat

    def forward(self, *args: Any, more: Any = None) -> Any:
        hidden_states, residual = self.layer(*args)
        return (hidden_states, residual.flatten()) if self.is_flat else (hidden_states, residual)


class Restored(nn.Module):
    """An odd layer's result in its usual form."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, *args: Any) -> Any:
        hidden_states, residual = self.layer(positions, hidden_states, *args)
        return hidden_states, residual.view_as(hidden_states)


@pytest.mark.parametrize("odd", ["argument", "result"])
def test_other_forms_are_computed_for_all_tokens(odd: str, narrowed: list[int]) -> None:
    def change(core: Core) -> None:
        runner = core.executor.worker.runner
        layers = runner.model.model.layers
        del layers[-1].forward  # that of its class again
        layers[-1] = Odd(layers[-1], is_flat=odd == "result")
        runner.last_layer = runner._step_modules[-1] = LastLayer(layers[-1], runner.attn_backend)
        if odd == "argument":
            layers[-1] = TakesMore(layers[-1], lambda states: {"more": states[:, 0]})
        else:
            layers[-1] = Restored(layers[-1])

    check_same(narrowed, change, name="llama-default")
    assert len(narrowed) == 1


@pytest.mark.parametrize("seed", range(20))
def test_wanted_tokens_are_the_last_of_each_row(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_layer, "LEAST_SAVED", 0)
    draw = random.Random(seed)
    counts = [draw.choice((1, 1, 3, 40, 77)) for _ in range(draw.randint(1, 6))]
    ends = np.cumsum(counts)
    batch = make_batch(list(range(sum(counts))), 0, sum(counts))
    batch.extend_seq_lens_cpu = counts
    batch.sample_rows = torch.tensor([end - 1 for end in ends.tolist() if draw.random() < 0.7], dtype=torch.int64)
    wanted = set(batch.sample_rows.tolist())
    batch.prompt_logprobs = []
    for count, end in zip(counts, ends.tolist(), strict=True):
        if draw.random() < 0.2:
            first = draw.randrange(end - count, end)
            batch.prompt_logprobs.append(logprob_row(list(range(first, end)), [0] * (end - first)))
            wanted.update(range(first, end))
    if draw.random() < 0.4:
        batch.pooled_tokens = torch.tensor(sorted(draw.sample(range(sum(counts)), 2)) if sum(counts) > 1 else [0])
        wanted.update(batch.pooled_tokens.tolist())
    expected = []
    for count, end in zip(counts, ends.tolist(), strict=True):
        own = [token for token in wanted if end - count <= token < end]
        expected.append(list(range(min([*own, end - 1]), end)))
    found = WantedTokens.of(batch)
    if 2 * sum(map(len, expected)) > sum(counts):
        assert found is None
    else:
        assert found is not None and found.counts.tolist() == [len(tokens) for tokens in expected]
        assert found.tokens.tolist() == [token for tokens in expected for token in tokens]


def test_few_tokens_are_not_worth_a_second_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_layer, "LEAST_SAVED", 32)
    batches = [make_batch(list(range(count)), 0, count) for count in (32, 33)]
    for batch in batches:
        batch.prompt_logprobs = []
    few, many = map(WantedTokens.of, batches)
    assert few is None and many is not None and many.tokens.tolist() == [32]


def test_arguments_of_unknown_forms_are_refused() -> None:
    batch = make_batch(list(range(40)), 0, 40)
    batch.prompt_logprobs = []
    wanted = WantedTokens.of(batch)
    assert wanted is not None
    for value in (torch.arange(40), torch.rand(40), torch.rand(3, 40), nn.Parameter(torch.rand(40, 40)), object()):
        with pytest.raises(UnknownForm, match="it takes"):
            wanted.argument(value, batch, batch)
    for result in (torch.rand(1), torch.rand(2, 4), [torch.rand(1, 4)], (None, "x")):
        with pytest.raises(UnknownForm, match="it returns"):
            wanted.filled_up(result, 40)
    states = torch.rand(40, 6)
    assert wanted.argument(states, batch, batch).tolist() == states[39:].tolist()
    whole, none = wanted.filled_up((states[39:], None), 40)
    assert none is None and whole[39].tolist() == states[39].tolist() and not whole[:39].any()


def test_names_and_signatures_stay() -> None:
    model = Core("llama-default").executor.worker.runner.model
    assert "model.layers.2.self_attn.o_proj" in dict(model.named_modules())
    last = model.model.layers[-1]
    assert str(inspect.signature(last.forward)) == str(inspect.signature(model.model.layers[0].forward))
