"""What a load left unwritten: the record against a map of bytes, and what loading says about it."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from rtp_llm.srt.layers.linear import MergedColumnParallelLinear
from rtp_llm.srt.layers.moe import FusedMoE
from rtp_llm.srt.layers.weights import make_parameter
from rtp_llm.srt.models.weight_loading import WeightLoadError, load_weights
from rtp_llm.srt.models.written_bytes import Coverage, WrittenBytes, runs_of

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]


def some_view(base: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """A view by random slices with steps, in a random order of dimensions."""
    slices = []
    for size in base.shape:
        start = chance.randrange(size)
        slices.append(slice(start, chance.randint(start + 1, size), chance.randint(1, 3)))
    dims = list(range(base.dim()))
    chance.shuffle(dims)
    return base[tuple(slices)].permute(dims)


@pytest.mark.parametrize("seed", range(30))
def test_the_record_is_a_map_of_bytes(seed: int) -> None:
    chance = random.Random(seed)
    dtype = chance.choice(DTYPES)
    shape = [chance.randint(1, 6) for _ in range(chance.randint(1, 4))]
    target = nn.Parameter(torch.zeros(shape).to(dtype), requires_grad=False)
    if chance.random() < 0.3:
        target = nn.Parameter(target.data.T, requires_grad=False) if target.dim() == 2 else target
    is_written = torch.zeros(target.shape, dtype=torch.bool)
    written = WrittenBytes([target])
    with written:
        for _ in range(chance.randint(0, 8)):
            seed_of_view = chance.random()
            view = some_view(target.data, random.Random(seed_of_view))
            view.copy_(torch.ones(view.shape).to(dtype))
            some_view(is_written, random.Random(seed_of_view)).fill_(True)
    missing = written.missing(target)
    assert int((missing[:, 1] - missing[:, 0]).sum()) == int((~is_written).sum()) * target.element_size()
    flat = is_written.as_strided((is_written.numel(),), (1,)) if target.is_contiguous() else is_written.T.flatten()
    for start, end in (missing // target.element_size()).tolist():
        assert not flat[start:end].any()
    assert (written.described(target) is None) == bool(is_written.all())


WRITES: list[tuple[Callable[[Any], Any], int]] = [  # of six by four values; how many are left
    (lambda p: p.data.copy_(torch.ones(6, 4)), 0),
    (lambda p: p.data.zero_(), 0),
    (lambda p: p.data.normal_(), 0),
    (lambda p: nn.init.ones_(p), 0),
    (lambda p: p.__setitem__(slice(2), 5.0), 16),
    (lambda p: p.__setitem__((slice(None), 1), torch.ones(6)), 18),
    (lambda p: p.__setitem__(torch.tensor([0, 3]), torch.ones(2, 4)), 16),
    (lambda p: p.__setitem__((slice(None), torch.tensor([0, 3])), torch.ones(6, 2)), 12),
    (lambda p: p.__setitem__(torch.arange(24).view(6, 4) % 3 == 0, 1.0), 16),
    (lambda p: p.data.T.copy_(torch.ones(4, 6)), 0),
    (lambda p: p.data.view(torch.int32)[1:].fill_(0), 4),
    (lambda p: p.data.flatten()[3:7].copy_(torch.ones(4)), 20),
    (lambda p: p.data.index_copy_(1, torch.tensor([2]), torch.ones(6, 1)), 18),
    (lambda p: p.data.index_fill_(0, torch.tensor([2, 5]), 1.0), 16),
    (lambda p: p.data.scatter_(0, torch.tensor([[1, 2, 3, 4]]), 1.0), 20),
    (lambda p: p.data.masked_fill_(torch.eye(6, 4, dtype=torch.bool), 1.0), 20),
    (lambda p: torch.cat([torch.ones(3, 4), torch.zeros(3, 4)], out=p.data), 0),
    (lambda p: torch.mul(torch.ones(2, 4), 3.0, out=p.data[2:4]), 16),
    (lambda p: torch._foreach_copy_([p.data[:1]], [torch.ones(1, 4)]), 20),
    (lambda p: setattr(p, "data", torch.ones(6, 4)), 0),  # other memory
    (lambda p: p.data.mul_(2.0), 24),  # keeps what was there
    (lambda p: p.data.add_(1.0), 24),
    (lambda p: p.data.index_put_((torch.tensor([1]),), torch.ones(4), accumulate=True), 24),
    (lambda p: torch.ones(6, 4).copy_(p.data), 24),  # reads
    (lambda p: p.data[:0].zero_(), 24),
]


@pytest.mark.parametrize("number", range(len(WRITES)))
def test_ways_to_write(number: int) -> None:
    write, left = WRITES[number]
    target = nn.Parameter(torch.empty(6, 4), requires_grad=False)
    written = WrittenBytes([target])
    with written:
        write(target)
    missing = written.missing(target)
    assert int((missing[:, 1] - missing[:, 0]).sum()) == left * 4


def test_where_values_are_missing() -> None:
    target = torch.empty(4, 5, 6)
    written = WrittenBytes([target])
    assert written.described(target) == "120 of 120 values were not written"
    with written:
        target[:2].zero_(), target[2, 3:].zero_(), target[3].fill_(1.0)
    assert written.described(target) == "18 of 120 values were not written, all of them within [2:3, 0:3, :]"
    with written:
        target[2, :3, 1:].zero_()
    assert written.described(target) == "3 of 120 values were not written, all of them within [2:3, 0:3, 0:1]"
    with written:
        target[2].zero_()
    assert written.described(target) is None


def test_parameters_in_one_storage_are_told_apart() -> None:
    storage = torch.empty(10)
    first, second = storage[:4], storage[4:]
    written = WrittenBytes([first, second])
    with written:
        storage[:6].zero_()
    assert written.described(first) is None
    assert written.described(second) == "4 of 6 values were not written, all of them within [2:6]"


def test_many_small_runs_are_merged() -> None:
    coverage, column = Coverage(), torch.empty(70_000, 3)
    for i in range(3):
        coverage.add(runs_of(column[:, i]))
    assert len(coverage.missing(runs_of(column))) == 0 and coverage._num_runs < 3 * 70_000
    assert len(Coverage().missing(runs_of(column))) == 1


# Loading


class Half(nn.Module):
    """Its loader forgets columns."""

    def __init__(self, optional: bool = False) -> None:
        super().__init__()
        self.up = MergedColumnParallelLinear(4, [2, 2], bias=False)
        self.weight = make_parameter(torch.empty(6, 4), self.load, is_optional=optional)

    def load(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: object = None) -> None:
        param.data[:, :3].copy_(tensor[:, :3])


def given() -> Iterable[tuple[str, torch.Tensor]]:
    yield from {"weight": torch.ones(6, 4), "up.weight": torch.ones(4, 4)}.items()


PARTLY = r"weight \[6, 4\]: 6 of 24 values were not written, all of them within \[:, 3:4\]"


def test_a_loader_that_writes_a_part() -> None:
    with pytest.raises(WeightLoadError, match=rf"1 parameters were set in part only:\n  {PARTLY}$"):
        load_weights(Half(), given())
    load_weights(Half(optional=True), given())


def test_a_tensor_that_does_not_fit_is_told_once() -> None:
    with pytest.raises(WeightLoadError) as caught:
        load_weights(Half(optional=True), [("weight", torch.ones(6, 4)), ("up.weight", torch.ones(4, 5))])
    assert "1 tensors do not fit" in str(caught.value) and "part only" not in str(caught.value)


@pytest.mark.parametrize("returns_names", [True, False])
def test_a_method_that_writes_a_part(returns_names: bool) -> None:
    class Own(Half):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
            for name, tensor in weights:
                param: Any = self.get_parameter(name)
                param.weight_loader(param, tensor)
            return {"weight", "up.weight"} if returns_names else None

    with pytest.raises(WeightLoadError, match=rf"1 parameters were not wholly set by its load_weights:\n  {PARTLY}$"):
        load_weights(Own(), given())
    load_weights(Own(optional=True), given())


def test_a_method_that_forgets_a_parameter() -> None:
    class Own(Half):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for _, tensor in weights:
                if tensor.shape == self.weight.shape:
                    self.weight.data = tensor

    with pytest.raises(
        WeightLoadError, match=r"wholly set by its load_weights:\n  up.weight \[4, 4\]: 16 of 16 values"
    ):
        load_weights(Own(), given())


def test_experts_of_which_only_some_are_named() -> None:
    """Every name that the layer knows comes, and half of the weight does not."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = FusedMoE(2, 4, 3)
            places = self.experts.weight_sources
            self.experts.weight_sources = {name: places[name] for name in places if "gate" not in name}

    shapes = {"up_proj": (3, 4), "down_proj": (4, 3)}
    weights = {f"experts.{i}.{name}.weight": torch.ones(shape) for i in range(2) for name, shape in shapes.items()}
    missing = r"experts.w13_weight \[2, 6, 4\]: 24 of 48 values were not written, all of them within \[:, 0:3, :\]"
    with pytest.raises(WeightLoadError, match=f"set in part only:\n  {missing}"):
        load_weights(Model(), weights.items())
