"""Experiments on single parameters of the reference, and on what its layers are given beside the hidden states: it is
computed anew with one of them changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import combinations, product

import torch
from torch import nn

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.order_causes import order_text
from rtp_llm.tools.verify.trace import INPUT, Place

MIN_HELD = 3  # numbers in a tensor that is recognised in another order, or times a factor
MAX_HANDED_ON = 64  # earlier tensors that a layer is given in the place of an argument
Change = tuple[str, str, Callable[[], AbstractContextManager[None]]]  # (what is changed, how, makes it)


def table_of(evidence: Evidence, place: Place, base: torch.Tensor) -> str | None:
    """Return the table of the reference without which a place's tensor is ``base``; None: there is none."""
    width = base.shape[1]
    with evidence.replay.recording():
        for module, holder in evidence.names.items():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2 or parameter.shape[-1] != width or isinstance(module, nn.Linear):
                    continue
                with _changed(parameter, torch.zeros_like(parameter)):
                    tensor = evidence.replay.tensor(place, whole=True)
                if tensor is not None and evidence.same(base, tensor):
                    return f"{holder}.{key}"
    return None


def transposed_parameters(modules: Mapping[str, nn.Module]) -> Iterator[Change]:
    """Yield the square parameters of modules, each transposed, and filters whose values are read in another order."""
    for holder, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and parameter.shape[-1] == parameter.shape[-2] > 1:
                yield holder, f"its {key} is used transposed", _maker(parameter, -1, -2)
            axes = [axis for axis in range(1, parameter.dim()) if parameter.shape[axis] > 1]
            if not isinstance(module, nn.Conv2d | nn.Conv3d):
                continue
            for first, second in combinations(axes, 2):
                shape = ", ".join(map(str, parameter.shape))
                text = f"axes {first} and {second} of its {key} [{shape}] are exchanged: a patch in another order"
                yield holder, text, _maker(parameter, first, second)


def _maker(parameter: nn.Parameter, first: int, second: int) -> Callable[[], AbstractContextManager[None]]:
    return lambda: _changed(parameter, parameter.data.transpose(first, second).reshape(parameter.shape).contiguous())


def reordered_rows(modules: Mapping[str, nn.Module], numbers: Iterable[int]) -> Iterator[Change]:
    """Yield the fused projections of modules, each with its outputs read in another order: in blocks where the
    reference reads head by head, or the other way round. ``numbers``: of heads."""
    heads = sorted({number for number in numbers if number > 1})
    for holder, module in modules.items():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(module, nn.Linear) or not isinstance(weight, nn.Parameter):
            continue
        for num_parts, num_heads in product((2, 3, 4), heads):
            if len(weight) % (num_parts * num_heads):
                continue
            for first, second, text in (
                (num_parts, num_heads, f"in {num_parts} blocks, the reference head by head ({num_heads} heads)"),
                (num_heads, num_parts, f"head by head ({num_heads} heads), the reference in {num_parts} blocks"),
            ):
                order = torch.arange(len(weight)).view(first, second, -1).transpose(0, 1).flatten()
                tensors = [x for x in (weight, bias) if isinstance(x, nn.Parameter)]
                yield holder, f"ours reads its outputs {text}", _reorderer(tensors, order)


def _reorderer(parameters: Sequence[nn.Parameter], order: torch.Tensor) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def made() -> Iterator[None]:
        with ExitStack() as stack:
            for parameter in parameters:
                stack.enter_context(_changed(parameter, parameter.data[order.to(parameter.device)]))
            yield

    return made


def held_otherwise(evidence: Evidence, place: Place) -> tuple[str, str] | None:
    """Return the module, and how a tensor that it computed by itself, such as decays, is the reference's in another
    order, or times a factor; None: there is no such tensor around a place."""
    block = place.module.rpartition(".")[0]
    theirs = {
        name: tensor.flatten()
        for name, tensor in evidence.their_parameters.items()
        if name.startswith(f"{block}.") and tensor.numel() > 1
    }
    for name, module in evidence.our_modules.items():
        if not block or not (name == block or name.startswith(f"{block}.")):
            continue
        held = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        held |= dict(module.named_buffers(recurse=False))
        for key, value in held.items():
            if not value.is_floating_point() or value.numel() < MIN_HELD:
                continue
            own = value.detach().float().cpu().flatten()
            text = next((found for other, right in theirs.items() if (found := _how_held(own, right, other))), None)
            if text and not any(_is_as(own, right) for right in theirs.values()):
                return name, f"its {key} is {text}"
    return None


def _is_as(own: torch.Tensor, right: torch.Tensor) -> bool:
    if own.shape != right.shape:
        return False
    return any(torch.allclose(own, form, rtol=1e-3, atol=1e-7) for form in (right, -right, right.exp(), (-right).exp()))


def _how_held(own: torch.Tensor, right: torch.Tensor, name: str) -> str | None:
    if own.shape != right.shape or len(right.unique()) < MIN_HELD:
        return None
    for sign in (1, -1):
        if torch.allclose(own.sort().values, (sign * right).sort().values, rtol=1e-3, atol=1e-7):
            order = [int((sign * right - value).abs().argmin()) for value in own]
            return f"the reference's {name} in another order: {order_text(order)}"
        factor = float((own * right).sum() / right.square().sum())
        if abs(factor) > 1e-6 and torch.allclose(own, factor * right, rtol=1e-3, atol=1e-7):
            return f"the reference's {name} times {abs(factor):.4g}"
    return None


@contextmanager
def _changed(parameter: nn.Parameter, other: torch.Tensor) -> Iterator[None]:
    before = parameter.data
    parameter.data = other
    try:
        yield
    finally:
        parameter.data = before


def handed_on(evidence: Evidence, place: Place) -> Iterator[Change]:
    """Yield what a layer may be given in the place of an argument: earlier tensors of the reference, as large."""
    tensors = evidence.theirs.tensors
    before = list(tensors)[: list(tensors).index(place)]
    for name, given in evidence.replay.arguments(place).items():
        fitting = [p for p in reversed(before) if p.part != INPUT and tensors[p].numel() == given.numel()]
        for p in fitting[:MAX_HANDED_ON]:
            other = _in_form_of(given, tensors[p])
            if other is not None and not torch.equal(other, given):
                text = f"the layer is given {p} as {name}: earlier layers hand on another tensor than the reference's"
                yield f"{name} of its layer", text, _giver(evidence, place, name, other)


def _giver(
    evidence: Evidence, place: Place, name: str, other: torch.Tensor
) -> Callable[[], AbstractContextManager[None]]:
    return lambda: evidence.replay.argument(place, name, other)


def _in_form_of(given: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """Return rows [tokens, features] in the form of a layer's argument: [1, tokens, ...] or [1, heads, tokens, size];
    None: it is neither."""
    rows = rows.to(given.device, given.dtype)
    if given.dim() == 4 and given.shape[0] == 1 and given.shape[2] == len(rows):
        return rows.view(len(rows), given.shape[1], given.shape[3]).transpose(0, 1)[None]
    return rows.view(given.shape) if given.shape[:2] == (1, len(rows)) else None
