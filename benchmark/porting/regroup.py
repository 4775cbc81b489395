"""Tensors of a checkpoint under other names, and put together or taken apart as another format has them."""

import re
from collections.abc import Callable, Sequence

import torch

Tensors = dict[str, torch.Tensor]
Joining = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def one_after_another(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts))


def renamed(tensors: Tensors, *names: tuple[str, str]) -> Tensors:
    """Replace regular expressions in names, one after another."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def joined(tensors: Tensors, parts: Sequence[str], whole: str, join: Joining = one_after_another) -> Tensors:
    """Make one tensor of those whose names differ in one module: ``x.q.weight``, ``x.k.weight`` -> ``x.whole.weight``.

    Args:
        parts: the modules' names, in the order that ``join`` gets their tensors in.
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        part = next((part for part in parts if f".{part}." in name), None)
        if part is None:
            found[name] = tensor
        elif part == parts[0]:
            names = [name.replace(f".{part}.", f".{other}.") for other in parts]
            found[name.replace(f".{part}.", f".{whole}.")] = join([tensors[each] for each in names])
    return found


def by_key_heads(num_kv_heads: int) -> Joining:
    """Return what puts rows of heads together by the heads of keys: the queries of one, its key, its value, and so on.

    The parts are [heads * head_dim, ...] each, where the heads of a group lie side by side.
    """

    def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        groups = [part.unflatten(0, (num_kv_heads, -1)) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)

    return join


def experts_apart(tensors: Tensors, prefix: str) -> Tensors:
    """Take the tensors of all experts apart.

    ``x.gate_up_proj`` [experts, 2 * inner, hidden] and ``x.down_proj`` [experts, hidden, inner], with or without
    ``.weight`` at the end, become ``x.0.gate_proj.weight``, ``x.0.up_proj.weight``, ``x.0.down_proj.weight``, ...

    Args:
        prefix: how the name of ``x`` ends.
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(.*{re.escape(prefix)})\.(gate_up_proj|down_proj)(\.weight)?", name)
        if match is None:
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            if match[2] == "down_proj":
                found[f"{match[1]}.{expert}.down_proj.weight"] = matrix.clone()
                continue
            gate, up = matrix.chunk(2)
            found |= {f"{match[1]}.{expert}.gate_proj.weight": gate.clone()}
            found |= {f"{match[1]}.{expert}.up_proj.weight": up.clone()}
    return found


def halves_apart(tensors: Tensors, module: str, first: str, second: str) -> Tensors:
    """Make two modules of one: ``x.module.weight`` -> ``x.first.weight``, its first rows, and ``x.second.weight``."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if f".{module}." not in name:
            found[name] = tensor
            continue
        for other, half in zip((first, second), tensor.chunk(2), strict=True):
            found[name.replace(f".{module}.", f".{other}.")] = half.clone()
    return found


def without(tensors: Tensors, *patterns: str) -> Tensors:
    """Leave out the tensors whose names have one of these regular expressions in them."""
    return {name: tensor for name, tensor in tensors.items() if not any(re.search(each, name) for each in patterns)}


def changed(tensors: Tensors, pattern: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """Change the tensors whose names have a regular expression in them."""
    return {name: change(tensor) if re.search(pattern, name) else tensor for name, tensor in tensors.items()}
