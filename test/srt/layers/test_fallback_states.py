"""Modules that keep states are computed by pieces of sequences as they are for whole sequences."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import nn

from rtp_llm.srt.cache.spec import StateGroup
from rtp_llm.srt.forward_batch import StateWave
from rtp_llm.srt.layers.fallback.cache import ServedCache
from rtp_llm.srt.layers.fallback.masks import UnservableModelError
from rtp_llm.srt.layers.fallback.states import StateKeeper, StateProbe, Steps, pieces_of
from rtp_llm.srt.state_pool import StatePool

SIZE, KERNEL, LENGTHS = 5, 3, (9, 7, 8)


class Layer(nn.Module):
    """A convolution, then a decaying sum, as modules of transformers compute them.

    Args:
        forgets: a call for several tokens begins the sum anew, as in transformers' Mamba.
    """

    def __init__(self, layer_idx: int, forgets: bool = False) -> None:
        super().__init__()
        self.layer_idx, self.forgets = layer_idx, forgets
        self.weight = nn.Parameter(torch.randn(SIZE, 1, KERNEL))

    def forward(self, hidden_states: torch.Tensor, scale: torch.Tensor, cache: Any = None) -> tuple[Any, ...]:
        x, num_tokens = hidden_states.transpose(1, 2), hidden_states.shape[1]
        known = None if cache is None else cache.get_recurrent_state(self.layer_idx)
        if cache is not None:
            x = cache.update_conv_state(x, self.layer_idx, conv_kernel_size=KERNEL)
        x = nn.functional.conv1d(x, self.weight, padding=KERNEL - 1, groups=SIZE)[..., : x.shape[-1]]
        total = torch.zeros(len(x), SIZE)
        if known is not None and not (self.forgets and num_tokens > 1):
            total = known
        sums = []
        for token in x[..., -num_tokens:].unbind(-1):
            total = 0.5 * total + token
            sums.append(total)
        if cache is not None:
            cache.update_recurrent_state(total, self.layer_idx)
        return torch.stack(sums, dim=1) * scale, None, total


class Model(nn.Module):
    """Two layers, the second of which may share the first one's state, or hold it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(0, **options), Layer(1, **options)])

    def forward(self, x: torch.Tensor, scale: torch.Tensor, cache: Any = None) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, scale=scale, cache=cache)[0]
        return x


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def sequences() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(1, length, SIZE), torch.rand(1, length, 1)) for length in LENGTHS]


def served(model: nn.Module) -> tuple[Steps, ServedCache, list[StateKeeper], StatePool]:
    """Probe the model, and make its layers ours."""
    steps, cache = Steps(), ServedCache()
    probe = StateProbe(cache)
    with probe.watching(model):
        model(*sequences()[0], cache=cache)
    probe.check([])
    keepers = [
        StateKeeper(call, i, LENGTHS[0], place, steps)
        for i, (call, place) in enumerate(zip(probe.calls, probe.places, strict=True))
    ]
    group = StateGroup(tuple((keeper.layer_id, keeper.state_spec()) for keeper in keepers))
    return steps, cache, keepers, StatePool(group, len(LENGTHS), "cpu")


def wave(load: list[int], store: list[int], counts: list[int], tokens: list[int] | None = None) -> StateWave:
    bounds = [0, *accumulate(counts)]
    columns = [torch.tensor(values) for values in (load, store, bounds)]
    return StateWave(*columns, bounds, None if tokens is None else torch.tensor(tokens))


def run(
    model: nn.Module, steps: Steps, cache: ServedCache, pool: StatePool, waves: list[StateWave], *inputs: Any
) -> Any:
    steps.pool, steps.waves = pool, [(each, pieces_of(each)) for each in waves]
    try:
        return model(*inputs, cache=cache)
    finally:
        steps.pool, steps.waves = None, []


@torch.no_grad()
@pytest.mark.parametrize("forgets", [False, True])
def test_pieces_of_several_sequences_give_what_whole_ones_give(forgets: bool) -> None:
    model = Model(forgets=forgets)
    given = sequences()
    expected = [model(x, scale) for x, scale in given]
    steps, cache, keepers, pool = served(model)
    assert [keeper.goes_on_by_several for keeper in keepers] == [not forgets] * 2
    found: list[list[torch.Tensor]] = [[] for _ in given]
    ends = [(4, 2, 4), (6, 4, 5), (7, 5, 6), (9, 7, 8)]  # pieces of equal length, and of one token each
    for starts, stops in pairwise([(0, 0, 0), *ends]):
        counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
        slots = [1, 2, 3]
        load = [slot if start else 0 for slot, start in zip(slots, starts, strict=True)]
        inputs = [
            torch.cat([tensors[i][:, a:b] for tensors, a, b in zip(given, starts, stops, strict=True)], dim=1)
            for i in (0, 1)
        ]
        output = run(model, steps, cache, pool, [wave(load, slots, counts)], *inputs)
        for pieces, piece in zip(found, output.split(counts, dim=1), strict=True):
            pieces.append(piece)
    for pieces, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert not any(pool.tensor(0, tensor.name)[0].any() for tensor in keepers[0].state_spec().tensors)


@torch.no_grad()
def test_a_state_is_kept_amid_a_row_and_another_sequence_goes_on_from_it() -> None:
    model = Model()
    (x, scale), *_ = sequences()
    expected = model(x, scale)
    steps, cache, _, pool = served(model)
    waves = [wave([0], [2], [4], [0, 1, 2, 3]), wave([2], [1], [3], [4, 5, 6])]
    begun = run(model, steps, cache, pool, waves, x[:, :7], scale[:, :7])
    torch.testing.assert_close(begun, expected[:, :7])
    resumed = run(model, steps, cache, pool, [wave([2], [3], [5])], x[:, 4:], scale[:, 4:])
    torch.testing.assert_close(resumed, expected[:, 4:])
    ended = run(model, steps, cache, pool, [wave([1], [1], [2])], x[:, 7:], scale[:, 7:])
    torch.testing.assert_close(ended, expected[:, 7:])


@torch.no_grad()
def test_without_a_step_the_model_computes_as_it_is() -> None:
    model = Model()
    x, scale = sequences()[1]
    expected = model(x, scale)
    served(model)
    torch.testing.assert_close(model(x, scale), expected)


def test_a_state_that_two_modules_share_is_refused() -> None:
    model = Model()
    model.layers[1].layer_idx = 0
    with pytest.raises(UnservableModelError, match=r"Layer uses the state recurrent.0.0 of another module"):
        served(model)


def test_modules_within_each_other_are_refused() -> None:
    class Outer(Layer):
        def forward(self, hidden_states: torch.Tensor, scale: torch.Tensor, cache: Any = None) -> tuple[Any, ...]:
            return super().forward(self.inner(hidden_states, scale, cache)[0], scale, cache)

    model = Model()
    model.layers[1] = Outer(1)
    model.layers[1].inner = Layer(2)
    with pytest.raises(UnservableModelError, match=r"Outer \(layer 1\) keeps a state, and within it Layer attends or"):
        served(model)


def test_a_state_that_is_not_of_one_sequence_is_refused() -> None:
    class Counting(Layer):
        def forward(self, hidden_states: torch.Tensor, scale: torch.Tensor, cache: Any = None) -> tuple[Any, ...]:
            if cache is not None:
                cache.update_recurrent_state(torch.tensor([3, 4]), self.layer_idx)
            return hidden_states, None

    model = Model()
    model.layers[1] = Counting(1)
    with pytest.raises(UnservableModelError, match=r"keeps a tensor \[2\] of torch.int64 as its state recurrent.1.0"):
        served(model)


@torch.no_grad()
def test_a_module_that_asks_for_a_state_only_later_is_an_error() -> None:
    model = Model()
    steps, cache, _, pool = served(model)
    model.layers.append(Layer(2))
    x, scale = sequences()[0]
    with pytest.raises(
        RuntimeError, match=r"recurrent.2.0 is asked for by a module that did not ask for it at loading"
    ):
        run(model, steps, cache, pool, [wave([0], [1], [LENGTHS[0]])], x, scale)
