"""What experts are given, recorded by the form of their call: ids and weights of the chosen experts of each token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

import torch
from torch import nn

from rtp_llm.srt.layers.quantization.base import ExpertsLayer


@dataclass(frozen=True)
class ExpertsCall:
    """A call of a module of experts.

    Args:
        order: which of "hidden", "ids" and "weights" the arguments are, ids and weights [tokens, chosen].
        num_chosen: experts of a token.
        given: hidden states [tokens, hidden_size], float32 on the host.
    """

    order: tuple[str, ...]
    num_chosen: int
    given: torch.Tensor


def experts_call(module: nn.Module, given: Mapping[str, Any]) -> tuple[ExpertsCall, torch.Tensor] | None:
    """Return the call and its weights [tokens, num_experts], zero for experts that are not chosen; None: it is no call
    of experts."""
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.dim() >= 2}
    ids_name = next((name for name, value in tensors.items() if value.dtype in (torch.int64, torch.int32)), None)
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    num_experts = num_experts_of(module)
    if ids_name is None or len(floats) != 2 or num_experts is None:
        return None
    ids = tensors[ids_name].flatten(0, -2)
    rows = {name: value.flatten(0, -2) for name, value in floats.items()}
    weights_name = next((name for name, value in rows.items() if value.shape == ids.shape), None)
    weights_name = weights_name or next((n for n, value in rows.items() if value.shape[1] == num_experts), None)
    hidden_name = next(name for name in rows if name != weights_name)
    if weights_name is None or len({len(ids), len(rows[weights_name]), len(rows[hidden_name])}) > 1:
        return None
    dense = dense_routing(ids, rows[weights_name], num_experts)
    hidden = rows[hidden_name].detach().to("cpu", torch.float32, copy=True)
    roles = {hidden_name: "hidden", ids_name: "ids", weights_name: "weights"}
    order = tuple(roles[name] for name in given if name in roles)
    return ExpertsCall(order, ids.shape[1], hidden), dense


def num_experts_of(module: nn.Module) -> int | None:
    """Return the number of experts of a module that keeps the weights of all of them; None: it is no such module."""
    if isinstance(module, ExpertsLayer):
        number = getattr(module, "num_experts", None)
        return number if isinstance(number, int) else None
    sizes = [len(parameter) for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return sizes[0] if len(sizes) > 1 and len(set(sizes)) == 1 else None


def dense_routing(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[tokens, chosen] ids and weights -> [tokens, num_experts]. Weights of all experts are kept where chosen."""
    ids = ids.detach().cpu().long()
    weights = weights.detach().to("cpu", torch.float32)
    if weights.shape != ids.shape:
        weights = weights.gather(1, ids)
    dense = torch.zeros(len(ids), num_experts + 1)  # the last column: ids that mean no expert
    return dense.scatter_add_(1, ids.clamp(max=num_experts), weights)[:, :num_experts]


def solved_routing(
    output: torch.Tensor, expert_outputs: torch.Tensor, chosen: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Return the weights [tokens, columns] with which outputs [columns, tokens, hidden] sum to ``output``, and the
    worst token's relative error: infinite of what is not finite.

    Args:
        chosen: [tokens, columns] bool, the columns that a token may use; None: all. Fewer than ``hidden``.
    """
    columns = expert_outputs.permute(1, 2, 0).double()  # [tokens, hidden, columns]
    if chosen is not None:
        columns = columns * chosen[:, None]
    if not bool(columns.isfinite().all()) or not bool(output.isfinite().all()):  # LAPACK would print an error
        return torch.zeros(len(output), columns.shape[2]), float("inf")
    weights = torch.linalg.lstsq(columns, output.double()[:, :, None], driver="gelsd").solution
    errors = (columns @ weights)[:, :, 0] - output
    sizes = output.double().norm(dim=-1).clamp(min=1e-30)
    return weights[:, :, 0].float(), float((errors.norm(dim=-1) / sizes).max())


@dataclass(frozen=True)
class Solved:
    """What separate experts are given and make of it, [tokens, hidden_size], and their weights [tokens, experts]."""

    call: ExpertsCall
    routing: torch.Tensor
    output: torch.Tensor


class SeparateExperts:
    """The experts of a block that keeps them as modules of their own and sums their weighted outputs.

    Which tokens go to which expert, and with what weights, follows from their inputs and outputs and the block's: the
    weights are those with which the outputs, and those of the block's other parts, sum to the block's output.
    """

    def __init__(self, modules: nn.ModuleList) -> None:
        self.modules = modules
        self._calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._others: dict[nn.Module, torch.Tensor] = {}

    @classmethod
    def of(cls, block: nn.Module) -> Self | None:
        """Return the experts of a block: a list of equal modules, beside a matrix with a row for each of them."""
        lists = [child for child in block.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
        heights = {len(p) for p in block.parameters() if p.dim() == 2}
        found = [each for each in lists if len({type(module) for module in each}) == 1 and len(each) in heights]
        return cls(found[0]) if len(lists) == len(found) == 1 else None

    def add(self, index: int, args: tuple[Any, ...], output: Any) -> None:
        given = next((arg for arg in args if _is_float(arg)), None)
        if given is not None and _is_float(output) and given.shape == output.shape:
            self._calls.append((index, _host_rows(given), _host_rows(output)))

    def add_other(self, module: nn.Module, output: Any) -> None:
        if _is_float(output):
            self._others[module] = _host_rows(output)

    def solved(self, given: Any, output: Any) -> Solved | None:
        """Return the routing of a block's call; None: the block does something else. Forgets the call."""
        calls, others = self._calls, list(self._others.values())
        self._calls, self._others = [], {}
        output = output[0] if isinstance(output, tuple) else output
        if not _is_float(given) or not _is_float(output) or given.shape != output.shape or not calls:
            return None
        x, y = _host_rows(given), _host_rows(output)
        outputs = torch.zeros(len(self.modules), *x.shape)
        chosen = torch.zeros(len(x), len(self.modules), dtype=torch.bool)
        for index, rows_in, rows_out in calls:
            distances = torch.cdist(x, rows_in, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = distances.min(dim=1)
            fits = nearest.values < 1e-5 * x.norm(dim=-1).clamp(min=1e-30)
            outputs[index, fits] = rows_out[nearest.indices[fits]]
            chosen[fits, index] = True
        others = [other for other in others if other.shape == x.shape]
        columns = torch.cat([outputs, torch.stack(others)]) if others else outputs
        allowed = torch.cat([chosen, torch.ones(len(x), len(others), dtype=torch.bool)], dim=1)
        if columns.shape[0] > x.shape[1]:
            return None
        weights, error = solved_routing(y, columns, allowed)
        if error > 1e-3:
            return None
        routing = weights[:, : len(self.modules)]
        routing = routing.where(routing.abs() > 1e-4 * routing.abs().amax(dim=1, keepdim=True), torch.zeros(()))
        mixed = torch.einsum("te,eth->th", routing, outputs)
        return Solved(ExpertsCall((), int((routing != 0).sum(1).max()), x), routing, mixed)


def _is_float(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2


def _host_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).flatten(0, -2)
