"""Causes in feed-forward blocks: another activation, gate and up exchanged, a bias twice or not at all."""

from collections.abc import Iterator
from itertools import permutations, product

import torch

from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.locate import relative_error
from rtp_llm.tools.verify.mutations import ACTIVATIONS
from rtp_llm.tools.verify.trace import INPUT, OUTPUT, Place, Trace

SCALED = ("silu", "gelu", "gelu_pytorch_tanh")
MAX_SCALES = 12


def is_before(trace: Trace, first: Place, second: Place) -> bool:
    places = list(trace.tensors)
    return places.index(first) < places.index(second)


def explain_activation(evidence: Evidence, place: Place) -> str | None:
    """Try activations of its siblings' outputs as a projection's input."""
    ours, theirs = evidence.ours.tensors[place], evidence.theirs.tensors[place]
    if place.part != INPUT:
        return None
    right = _best(evidence, _activations(evidence, place), theirs)
    wrong = _best(evidence, _activations(evidence, place), ours) if right else None
    return f"it computes {wrong}, the reference {right}" if right and wrong else None


def _best(evidence: Evidence, trials: Iterator[tuple[str, torch.Tensor]], target: torch.Tensor) -> str | None:
    error, text = min(((relative_error(tensor, target), text) for text, tensor in trials), default=(1.0, ""))
    return text if error <= evidence.tolerance else None


def _activations(evidence: Evidence, place: Place) -> Iterator[tuple[str, torch.Tensor]]:
    parts = _parts_of_siblings(evidence, place)
    for gate_name, gate in parts:
        for act in ACTIVATIONS:
            activated = get_act_fn(act)(gate)
            yield f"{act}({gate_name})", activated
            for up_name, up in parts:
                if up_name != gate_name:
                    yield f"{act}({gate_name}) * {up_name}", activated * up
    for (gate_name, gate), (up_name, up) in permutations(parts, 2):
        for act, scale in product(SCALED, _scales(evidence)):
            yield f"{act}({scale:g} * {gate_name}) * {up_name}", get_act_fn(act)(scale * gate) * up


def _scales(evidence: Evidence) -> list[float]:
    """Return the configuration's factors, those in lists among them: what is activated may be multiplied by one."""
    found: list[float] = []
    for key, value in vars(evidence.config).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if "multiplier" in key or "scal" in key:
            found += [float(each) for each in values if isinstance(each, (int, float)) and not isinstance(each, bool)]
    return [scale for scale in dict.fromkeys(found) if scale not in (0.0, 1.0)][:MAX_SCALES]


def _parts_of_siblings(evidence: Evidence, place: Place) -> list[tuple[str, torch.Tensor]]:
    """Return what an activation may be given: outputs of siblings, their halves, and with another bias."""
    parent, theirs = place.module.rpartition(".")[0], evidence.theirs.tensors
    size = theirs[place].shape[-1]
    parts: list[tuple[str, torch.Tensor]] = []
    for p, tensor in theirs.items():
        name = p.module.rpartition(".")[2]
        if p.part != OUTPUT or p.module.rpartition(".")[0] != parent or not is_before(evidence.theirs, p, place):
            continue
        if tensor.shape[-1] == size:
            parts.append((name, tensor))
            bias = evidence.their_parameters.get(f"{p.module}.bias")
            if bias is not None:
                parts += [(f"{name} without its bias", tensor - bias), (f"{name} with its bias twice", tensor + bias)]
        elif tensor.shape[-1] == 2 * size:
            first, second = tensor.chunk(2, dim=-1)
            parts += [(f"first half of {name}", first), (f"second half of {name}", second)]
            parts += [(f"even columns of {name}", tensor[:, ::2]), (f"odd columns of {name}", tensor[:, 1::2])]
    return parts


def activation_name(evidence: Evidence, place: Place) -> str:
    parent = place.module.rpartition(".")[0]
    children = dict(evidence.our_model.get_submodule(parent).named_children())
    return f"{parent}.act_fn" if "act_fn" in children else place.module
