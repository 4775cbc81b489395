"""Stages of a pipeline: which layers of a model a rank computes, and what passes from one stage to the next.

A model file knows nothing of stages. Each stage runs the model's own ``forward``; layers of other stages are replaced.
What a stage's last layer returns is sent to the next stage, and there is what the layer before its first one returns:
one tensor, or several, such as hidden states and their residual. All that is not a layer, such as embeddings, is
computed on each stage; after a stage's last layer nothing more is.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rtp_llm.srt.distributed.parallel_state import RankGroup, SplitError
from rtp_llm.srt.layers.embedding import ParallelLMHead
from rtp_llm.srt.model_traits import KeepsCache, KeepsState, ModelTraits

BY_LAYERS, BY_BYTES = "layers", "bytes"  # how layers are divided: equal numbers, or about equal weights
Result = torch.Tensor | tuple[torch.Tensor | None, ...]  # what a layer returns

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
_MAX_TENSORS, _MAX_DIMS = 8, 5
_FIELDS = 2 + _MAX_DIMS  # of a tensor in a header: its dtype and its number of dimensions, then these
_ABSENT, _ALONE = -1, -1
_SENDS_AHEAD = 4  # steps whose tensors may be on their way at once


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Stage s has layers ``[bounds[s], bounds[s + 1])`` of the list of modules called ``layers``."""

    layers: str
    bounds: tuple[int, ...]

    def layers_of(self, stage: int) -> range:
        return range(self.bounds[stage], self.bounds[stage + 1])


def plan_stages(model: nn.Module, num_stages: int, by: str = BY_LAYERS) -> StagePlan:
    """Divide a built model's layers into stages.

    Raises:
        SplitError: it loads its weights by itself, its layers are not found, are fewer than stages, or layers of two
            stages would share a cache.
    """
    if ModelTraits.of(model).load_weights is not None:
        raise SplitError("it loads its weights by itself, so that its layers cannot be in stages; use --pp-size 1")
    name, layers = layers_of(model)
    if len(layers) < num_stages:
        raise SplitError(f"{name} has {len(layers)} layers, fewer than pp_size {num_stages}")
    bounds = _equal_numbers(len(layers), num_stages)
    if by == BY_BYTES:
        sizes = [_num_bytes(layer) for layer in layers]
        if not all(sizes):
            raise SplitError("weights of a GGUF file have no known sizes before they are read; use --pp-split layers")
        head = sum(_num_bytes(module) for module in model.modules() if isinstance(module, ParallelLMHead))
        bounds = _equal_bytes(sizes, num_stages, head)
    plan = StagePlan(name, bounds)
    _check_caches(layers, plan)
    return plan


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of the list of layers, of which some keep keys and values or states, and the list.

    Raises:
        SplitError: there is none, or more than one.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in _keepers(module))
    ]
    names = [name for name, _ in found]
    outermost = [(name, each) for name, each in found if not any(name.startswith(f"{other}.") for other in names)]
    if len(outermost) != 1:
        have = ", ".join(name for name, _ in outermost) or "none"
        raise SplitError(f"stages need one list of layers with a cache, but there are: {have}; use --pp-size 1")
    return outermost[0]


def _keepers(module: nn.Module) -> Iterator[KeepsCache | KeepsState]:
    return (each for each in module.modules() if isinstance(each, (KeepsCache, KeepsState)))


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _equal_numbers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return the bounds of stages that differ by one layer at most, larger ones first."""
    least, larger = divmod(num_layers, num_stages)
    sizes = [least + (stage < larger) for stage in range(num_stages)]
    return (0, *accumulate(sizes))


def _equal_bytes(sizes: Sequence[int], num_stages: int, head: int) -> tuple[int, ...]:
    """Return the bounds that make the largest stage smallest, then stages most even. ``head``: of the last stage."""
    totals = (0, *accumulate(sizes))

    @cache
    def best(end: int, stages: int) -> tuple[int, int, tuple[int, ...]]:
        """Return the largest stage, the sum of squares and the bounds of so many stages of the first ``end`` layers."""
        extra = head if stages == num_stages else 0
        if stages == 1:
            size = totals[end] + extra
            return size, size * size, (0, end)
        choices = []
        for start in range(stages - 1, end):
            largest, squares, bounds = best(start, stages - 1)
            size = totals[end] - totals[start] + extra
            choices.append((max(largest, size), squares + size * size, (*bounds, end)))
        return min(choices)

    return best(len(sizes), num_stages)[2]


def _check_caches(layers: nn.ModuleList, plan: StagePlan) -> None:
    users: defaultdict[int, set[int]] = defaultdict(set)
    for index, layer in enumerate(layers):
        for keeper in _keepers(layer):
            if isinstance(keeper, KeepsCache):
                users[keeper.layer_id].add(index)
    for stage in range(len(plan.bounds) - 1):
        own = set(plan.layers_of(stage))
        for layer_id, indexes in users.items():
            if indexes & own and not indexes <= own:
                raise SplitError(
                    f"{plan.layers}: layers {sorted(indexes)} share the cache of layer {layer_id}, and cannot be in "
                    f"several stages (bounds {list(plan.bounds)}); use --pp-size 1"
                )


class StageDone(Exception):
    """This stage's last layer is computed: the rest of the model's ``forward`` is for other stages."""


class OtherStage(nn.Module):
    """In place of a layer of another stage: gives what the stage before has sent."""

    def __init__(self, stage: "Stage", is_last_before: bool) -> None:
        super().__init__()
        self._stage = (stage,)  # in a tuple: it is no part of the model
        self._is_last_before = is_last_before

    def forward(self, *args: Any, **kwargs: Any) -> Result:
        received = self._stage[0].received()
        return received if self._is_last_before else _shaped_as(received)


class AbsentHead(nn.Module):
    """In place of the head on stages that compute no logits."""


class Stage:
    """This rank's part of a model in stages, from ``cut`` on.

    Attributes:
        busy_s: seconds of steps, without those of waiting for the stage before.
    """

    def __init__(self, model: nn.Module, plan: StagePlan, group: RankGroup) -> None:
        self.plan = plan
        self.own = plan.layers_of(group.rank)
        self.is_last = group.is_last_rank
        self.busy_s = self._waited_s = 0.0
        self._group = group
        self._received: Result | None = None
        self._sent: deque[tuple[list[dist.Work], list[torch.Tensor]]] = deque()
        self.absent = self._cut(model)

    def _cut(self, model: nn.Module) -> list[str]:
        """Replace what other stages have; return the names of these modules."""
        layers = model.get_submodule(self.plan.layers)
        assert isinstance(layers, nn.ModuleList)
        absent = []
        for index in range(len(layers)):
            if index not in self.own:
                layers[index] = OtherStage(self, index == self.own.start - 1)
                absent.append(f"{self.plan.layers}.{index}")
        if not self.is_last:
            layers[self.own.stop - 1].register_forward_hook(self._end)
            heads = [name for name, module in model.named_modules() if isinstance(module, ParallelLMHead)]
            for name in heads:
                model.set_submodule(name, AbsentHead())
            absent += heads
        return absent

    def run(self, forward: Callable[[Any], Any], batch: Any) -> Any:
        """Return what the model returns for a step; None on stages that are not the last."""
        self._received = None
        start, waited_s = time.perf_counter(), self._waited_s
        try:
            return forward(batch)
        except StageDone:
            return None
        finally:
            self._received = None
            self.busy_s += time.perf_counter() - start - (self._waited_s - waited_s)

    def received(self) -> Result:
        """Return what the stage before has computed for this step; wait for it once."""
        if self._received is None:
            start = time.perf_counter()
            self._received = self._receive()
            self._waited_s += time.perf_counter() - start
        return self._received

    def _receive(self) -> Result:
        source, device = self._group.rank - 1, self._group.device
        header = self._group.receive(torch.empty(1 + _MAX_TENSORS * _FIELDS, dtype=torch.int64, device=device), source)
        count, *fields = header.tolist()
        tensors: list[torch.Tensor | None] = []
        for place in range(abs(count)):
            dtype, num_dims, *dims = fields[place * _FIELDS : (place + 1) * _FIELDS]
            if dtype == _ABSENT:
                tensors.append(None)
                continue
            tensor = torch.empty(dims[:num_dims], dtype=_DTYPES[dtype], device=device)
            tensors.append(self._group.receive(tensor, source))
        if count == _ALONE:
            assert tensors[0] is not None
            return tensors[0]
        return tuple(tensors)

    def _end(self, layer: nn.Module, args: Any, result: Result) -> None:
        """Send what the last layer returns."""
        header, tensors = _header(result)
        device, target = self._group.device, self._group.rank + 1
        all_tensors = [header.to(device), *(tensor.contiguous() for tensor in tensors)]
        if len(self._sent) == _SENDS_AHEAD:
            self._wait_for_oldest()
        self._sent.append(([self._group.send(tensor, target) for tensor in all_tensors], all_tensors))
        while self._sent and all(work.is_completed() for work in self._sent[0][0]):
            self._sent.popleft()
        raise StageDone

    def _wait_for_oldest(self) -> None:
        start = time.perf_counter()
        for work in self._sent.popleft()[0]:
            work.wait()
        self._waited_s += time.perf_counter() - start


def _header(result: Result) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what tells a layer's result, [1 + _MAX_TENSORS * _FIELDS] int64, and its tensors.

    Raises:
        TypeError: it is not a tensor, or a tuple of tensors and Nones, or one is of a kind that cannot be sent.
    """
    parts: Sequence[Any] = (result,) if isinstance(result, torch.Tensor) else result
    header = [_ALONE if isinstance(result, torch.Tensor) else len(parts)]
    if not isinstance(parts, (tuple, list)) or len(parts) > _MAX_TENSORS:
        raise TypeError(f"a layer of a stage must return a tensor or up to {_MAX_TENSORS} of them, not {type(result)}")
    for part in parts:
        if part is None:
            header += [_ABSENT] * _FIELDS
            continue
        if not isinstance(part, torch.Tensor) or part.dtype not in _DTYPES or part.dim() > _MAX_DIMS:
            raise TypeError(f"a layer of a stage returned {type(part).__name__}, which cannot be sent to the next one")
        header += [_DTYPES.index(part.dtype), part.dim(), *part.shape, *[0] * (_MAX_DIMS - part.dim())]
    header += [0] * (1 + _MAX_TENSORS * _FIELDS - len(header))
    return torch.tensor(header, device="cpu"), [part for part in parts if part is not None]


def _shaped_as(result: Result) -> Result:
    """Return tensors of the same shapes, whose values nobody uses."""
    if isinstance(result, torch.Tensor):
        return torch.empty_like(result)
    return tuple(None if part is None else torch.empty_like(part) for part in result)
