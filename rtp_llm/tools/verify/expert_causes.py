"""Causes in mixtures of experts: the routing, the experts' order, and what each of them computes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from rtp_llm.tools.verify.evidence import Evidence, Finding
from rtp_llm.tools.verify.expert_calls import ExpertsCall, num_experts_of, solved_routing
from rtp_llm.tools.verify.locate import relative_error
from rtp_llm.tools.verify.mutations import attribute_mutations
from rtp_llm.tools.verify.routing_causes import RoutingTrials
from rtp_llm.tools.verify.trace import INPUT, OUTPUT, ROUTING, Place

MANY_COLUMNS = 64  # experts of which all are computed for each token


def explain_routing(evidence: Evidence, place: Place, error: float) -> Finding:
    """Explain other experts or weights. Inputs of the router, and its logits where ours has them, agree."""
    ours, theirs = evidence.pair(place)
    logits = _router_logits(evidence, place.module, theirs)
    if logits is None:
        return Finding(place.module, place.part, error)
    block, num_experts = place.module.rpartition(".")[0], theirs.shape[1]
    biases = {
        name: tensor.flatten()
        for name, tensor in evidence.their_parameters.items()
        if name.startswith(f"{block}.") and tensor.shape[-1:] == (num_experts,) and tensor.numel() == num_experts
    }
    trials = RoutingTrials(logits, biases, evidence.config)
    cause, is_given = trials.explain(ours, theirs, evidence.tolerance)
    return Finding(place.module, place.part, error, [cause], is_description=not is_given)


def _router_logits(evidence: Evidence, experts: str, routing: torch.Tensor) -> torch.Tensor | None:
    """Return what a matrix beside the experts makes of their input, as the reference has it."""
    block = experts.rpartition(".")[0]
    found = {}
    for place, tensor in evidence.theirs.tensors.items():
        is_beside = place.module.startswith(f"{block}.") and not place.module.startswith(f"{experts}.")
        if place.part == OUTPUT and is_beside and tensor.shape == routing.shape and place.module != experts:
            found[place.module] = tensor
    for name, tensor in found.items():  # others may be made of logits: scores with a bias
        parameters = evidence.their_modules[name].parameters(recurse=False)
        if any(p.dim() == 2 and len(p) == routing.shape[1] for p in parameters):
            return tensor
    return next(iter(found.values()), None)


def explain_experts(evidence: Evidence, place: Place, error: float) -> Finding | None:
    """Explain another output of the same experts with the same weights; None: no trial reproduces it."""
    call, module = evidence.theirs.experts[place.module], evidence.their_modules[place.module]
    ours, theirs = evidence.pair(place)
    weights = evidence.theirs.tensors[Place(place.module, ROUTING)]
    run = _Experts(module, call, weights)
    if not evidence.same(run.mixed()[-len(theirs) :], theirs):
        return None
    name, cause = place.module, None
    if run.num_experts <= min(MANY_COLUMNS, theirs.shape[1]):
        cause = _other_experts(run.each()[:, -len(ours) :], ours, weights[-len(ours) :], evidence.tolerance)
    if cause is None and (mixed := run.weighted_inputs()) is not None and evidence.same(ours, mixed[-len(ours) :]):
        cause = "the weights are multiplied with the experts' inputs, not with their outputs"
    if cause is None:
        for text, made in (*_layouts(module), *_attributes(name, module)):
            with made():
                mixed = run.tried()
            if mixed is not None and evidence.same(ours, mixed[-len(ours) :]):
                cause = text
                break
    return Finding(name, place.part, error, [cause]) if cause else None


class _Experts:
    """The reference's experts, computed with the weights [tokens, num_experts] of its routing, or each alone."""

    def __init__(self, module: nn.Module, call: ExpertsCall, weights: torch.Tensor) -> None:
        self._module, self._call = module, call
        self._weights = weights
        self._x = call.given[-len(weights) :]
        self.num_experts = weights.shape[1]

    @torch.inference_mode()
    def mixed(self) -> torch.Tensor:
        """[tokens, hidden_size]."""
        if isinstance(self._module, nn.ModuleList):
            return torch.einsum("te,eth->th", self._weights, self.each())
        ids = self._weights.abs().topk(self._call.num_chosen, dim=-1).indices
        return self._run(ids, self._weights.gather(1, ids))

    @torch.inference_mode()
    def weighted_inputs(self) -> torch.Tensor | None:
        """Compute the sum of experts whose inputs, not outputs, are weighted; None: not of separate experts."""
        if isinstance(self._module, nn.ModuleList):
            return None
        ids = self._weights.abs().topk(self._call.num_chosen, dim=-1).indices
        x, ones = self._x, torch.ones(len(self._x), 1)
        outputs = []
        for i in range(ids.shape[1]):
            self._x = x * self._weights.gather(1, ids[:, i : i + 1])
            outputs.append(self._run(ids[:, i : i + 1], ones))
        self._x = x
        return torch.stack(outputs).sum(0)

    def tried(self) -> torch.Tensor | None:
        """Do the same, while something is changed; None: the change does not fit."""
        try:
            return self.mixed()
        except Exception:  # of any kind
            return None

    @torch.inference_mode()
    def each(self) -> torch.Tensor:
        """[num_experts, tokens, hidden_size]."""
        if isinstance(self._module, nn.ModuleList):
            device, dtype = _place_of(self._module)
            outputs = [expert(self._x.to(device, dtype)) for expert in self._module]
            return torch.stack([output.float().cpu() for output in outputs])
        ones = torch.ones(len(self._x), 1)
        return torch.stack([self._run(ones.long() * expert, ones) for expert in range(self.num_experts)])

    def _run(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        device, dtype = _place_of(self._module)
        given = {"hidden": self._x.to(device, dtype), "ids": ids.to(device), "weights": weights.to(device, dtype)}
        return self._module(*(given[role] for role in self._call.order)).float().cpu()


def _place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(module.parameters())
    return parameter.device, parameter.dtype


def _other_experts(each: torch.Tensor, ours: torch.Tensor, weights: torch.Tensor, tolerance: float) -> str | None:
    """Try whether ours is a sum of the reference's experts with other weights than were given to them."""
    solved, error = solved_routing(ours, each)
    if error > tolerance:
        return None
    used = weights.abs().amax(0) > 0
    threshold = 1e-3 * float(weights.abs().max())
    moved: dict[int, int] = {}
    for expert in used.nonzero()[:, 0].tolist():
        errors = (solved - weights[:, expert, None]).abs().amax(0)
        nearest = int(errors.argmin())
        if float(errors[nearest]) > 10 * threshold:
            return _other_weights(solved, weights, threshold)
        moved[expert] = nearest
    wrong = {expert: other for expert, other in moved.items() if expert != other}
    if not wrong:
        return _other_weights(solved, weights, threshold)
    shown = ", ".join(f"{expert} computes what the reference's {other} does" for expert, other in [*wrong.items()][:4])
    return f"experts lie in another order: {shown}"


def _other_weights(solved: torch.Tensor, weights: torch.Tensor, threshold: float) -> str | None:
    chosen = weights != 0
    factor = float((solved * weights).sum() / weights.square().sum())
    if float((solved - factor * weights).abs().max()) <= 10 * threshold:
        return f"the experts' sum is the reference's times {factor:.6g}"
    if float((solved - chosen.float()).abs().max()) <= 10 * threshold:
        return "the experts' outputs are summed without their weights"
    rows = ((solved - weights).abs() > 10 * threshold).any(1)
    return f"the outputs are summed with other weights than the router's, for {int(rows.sum())} of {len(rows)} tokens"


Trial = tuple[str, Callable[[], AbstractContextManager[None]]]


def _layouts(module: nn.Module) -> Iterator[Trial]:
    """Yield other meanings of the experts' weights: of gate and up in one tensor, or of two modules."""
    if isinstance(module, nn.ModuleList):
        yield from _swapped_modules(module)
        return
    number = num_experts_of(module)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() != 3 or len(parameter) != number:
            continue
        for dim in (1, 2):
            if parameter.shape[dim] % 2 == 0:
                biases = [p for p in module.parameters(recurse=False) if p.shape == (number, parameter.shape[dim])]
                for text, turn in _TURNS.items():
                    yield f"{name}: {text}", _changed([(parameter, dim), *((bias, 1) for bias in biases)], turn)
        if parameter.shape[1] == parameter.shape[2]:
            yield f"{name} is transposed", _changed([(parameter, 0)], lambda x, dim: x.transpose(1, 2))
    for name, bias in module.named_parameters(recurse=False):
        if bias.dim() == 2 and len(bias) == number:
            yield f"{name} is not added", _changed([(bias, 0)], lambda x, dim: torch.zeros_like(x))


_TURNS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "gate and up are swapped": lambda x, dim: x.roll(x.shape[dim] // 2, dim),
    "gate and up take turns in the reference's, and are halves in ours": lambda x, dim: (
        x.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)
    ),
    "gate and up are halves in the reference's, and take turns in ours": lambda x, dim: (
        x.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)
    ),
    "gate and up, which take turns, are swapped": lambda x, dim: (
        x.unflatten(dim, (-1, 2)).flip(dim + 1).flatten(dim, dim + 1)
    ),
}


def _changed(
    targets: list[tuple[nn.Parameter, int]], turn: Callable[[torch.Tensor, int], torch.Tensor]
) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def made() -> Iterator[None]:
        before = [parameter.data for parameter, _ in targets]
        for parameter, dim in targets:
            parameter.data = turn(parameter.data, dim).contiguous()
        try:
            yield
        finally:
            for (parameter, _), data in zip(targets, before, strict=True):
                parameter.data = data

    return made


def _swapped_modules(experts: nn.ModuleList) -> Iterator[Trial]:
    """Yield exchanges of two equally large parts in each of separate experts."""
    children = dict(experts[0].named_children())
    shapes = {name: getattr(child, "weight", None) for name, child in children.items()}
    names = [name for name, weight in shapes.items() if isinstance(weight, torch.Tensor) and weight.dim() == 2]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if shapes[first].shape == shapes[second].shape:  # type: ignore[union-attr]
                yield f"{first} and {second} are swapped", _exchanged(experts, first, second)


def _exchanged(experts: nn.ModuleList, first: str, second: str) -> Callable[[], AbstractContextManager[None]]:
    def exchange() -> None:
        for expert in experts:
            one, other = getattr(expert, first), getattr(expert, second)
            setattr(expert, first, other)
            setattr(expert, second, one)

    @contextmanager
    def made() -> Iterator[None]:
        exchange()
        try:
            yield
        finally:
            exchange()

    return made


def _attributes(name: str, module: nn.Module) -> Iterator[Trial]:
    targets: list[Any] = list(module) if isinstance(module, nn.ModuleList) else [module]
    if len(targets) == 1:
        for mutation in attribute_mutations(name, targets[0]):
            yield mutation.text, mutation.made
        return
    for group in zip(*(list(attribute_mutations(name, each)) for each in targets), strict=True):
        yield group[0].text, _all_of([mutation.made for mutation in group])


def _all_of(changes: list[Callable[[], AbstractContextManager[None]]]) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def made() -> Iterator[None]:
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change())
            yield

    return made


def given_to_experts(evidence: Evidence, place: Place) -> bool:
    """Return whether both sides recorded the call whose output this is, with the same input and routing."""
    places = (Place(place.module, INPUT), Place(place.module, ROUTING))
    return place.part == OUTPUT and all(
        p in evidence.ours.tensors
        and p in evidence.theirs.tensors
        and relative_error(*evidence.pair(p)) <= evidence.tolerance
        for p in places
    )
