"""Causes in modules: a weight that is not the reference's, or another use of it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.quantization.base import PackedLayer, dequantized
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.locate import relative_error
from rtp_llm.tools.verify.recorders import packed_sources
from rtp_llm.tools.verify.trace import INPUT, OUTPUT, Place
from rtp_llm.tools.verify.vision_calls import vision_aliases

OTHER_ROWS = "its weight has the rows of the right one in another order"
HELD, WRONG_SLOT = "it holds the weight of ", ": a wrong slot"
EPSILONS = (1e-8, 1e-6, 1e-5, 1e-12, 0.0)


def weight_of(model: nn.Module, name: str) -> tuple[nn.Module | None, torch.Tensor, torch.Tensor | None]:
    """Return our module of a checkpoint name, with its weight and bias: of a packed module, that name's part.

    Tensors are empty if it has none, or there is no such module.
    """
    modules = dict(model.named_modules())
    packed = ModelTraits.of(model).packed_modules_mapping
    parent, _, last = name.rpartition(".")
    holders = [name, *(f"{parent}.{key}" for key, sources in packed.items() if last in sources)]
    whole = [
        holder for holder in modules if holder.rpartition(".")[0] == parent and name in vision_aliases(model, holder)
    ]
    module = next((modules[holder] for holder in (*holders, *whole) if holder in modules), None)
    whole_weight = dequantized(module) if isinstance(module, PackedLayer) else getattr(module, "weight", None)
    weight, bias = _host(whole_weight), _host(getattr(module, "bias", None))
    if weight is None:
        return module, torch.empty(0), None
    if isinstance(module, LinearBase) and whole:
        return module, weight, None if module.skip_bias_add else bias
    if isinstance(module, LinearBase):
        holder = next(holder for holder in holders if holder in modules)
        sources = packed_sources(holder, module, packed)
        index = [source for source, _ in sources].index(name)
        sizes = [size for _, size in sources]
        weight = weight.split(sizes)[index]
        bias = None if bias is None else bias.split(sizes)[index]
        bias = None if module.skip_bias_add else bias
    return module, weight, bias


def explain_linear(weight: torch.Tensor, bias: torch.Tensor | None, name: str, evidence: Evidence) -> str | None:
    """Return the cause in a linear layer. ``weight``, ``bias``: ours, of the checkpoint's name ``name``."""
    theirs = evidence.their_modules[name]
    their_weight = _host(getattr(theirs, "weight", None))
    their_bias = _host(getattr(theirs, "bias", None))
    if their_weight is None:
        return None
    if type(theirs).__name__ == "Conv1D":
        their_weight = their_weight.T
    if not _equal(weight, their_weight):
        return _explain_weight(weight, their_weight, name, evidence)
    if bias is None and their_bias is not None:
        return "the bias is not added"
    if bias is not None and (their_bias is None or not _equal(bias, their_bias)):
        return "the bias is another one" if their_bias is not None else "a bias is added where the reference has none"
    return None


def _explain_weight(weight: torch.Tensor, right: torch.Tensor, name: str, evidence: Evidence) -> str:
    for other, tensor in evidence.their_parameters.items():
        if other.rpartition(".")[0] != name and _equal(weight, tensor):
            return f"{HELD}{other.removesuffix('.weight')}{WRONG_SLOT}"
    if _equal(weight, right.T):
        return "its weight is transposed"
    if weight.shape == right.shape and _equal(weight.sort(dim=0).values, right.sort(dim=0).values):
        return f"{OTHER_ROWS}: heads, or the pairs of the rotary embedding"
    return "its weight is none of the reference's: never set, or changed while loading"


def explain_norm(given: torch.Tensor, ours: torch.Tensor, name: str, evidence: Evidence) -> str | None:
    """Return the cause in a norm. ``given``: the reference's input, ``ours``: our output."""
    theirs = evidence.their_modules[name]
    weight, bias = _host(getattr(theirs, "weight", None)), _host(getattr(theirs, "bias", None))
    if weight is None or weight.dim() != 1 or given.shape[-1] % len(weight):
        return None
    x = given.unflatten(-1, (-1, len(weight)))
    trials = _norms(x, ours.view(x.shape), weight, bias, _eps_of(theirs), name, evidence.their_parameters)
    cause = _best(trials, ours, evidence.tolerance)
    if cause and cause.startswith(HELD) and _equal(weight_of(evidence.our_model, name)[1], weight):
        other = cause.removeprefix(HELD).removesuffix(WRONG_SLOT)
        cause = f"{other} is called in its place, whose own weight is right"
    right = evidence.theirs.tensors[Place(name, OUTPUT)]
    form = _best(_forms(x, weight, bias, _eps_of(theirs)), right, evidence.tolerance)
    return f"{cause}; the reference's is {form.removeprefix('it is ')}" if cause and form else cause


def explain_norms(evidence: Evidence, place: Place) -> str | None:
    """Return the cause in norms that the reference keeps as a list, one for each head, with weights of its own."""
    theirs, ours = evidence.theirs.tensors, evidence.ours.tensors[place]
    norms = {
        name: module
        for name, module in evidence.their_modules.items()
        if name.startswith(f"{place.module}.") and Place(name, INPUT) in theirs and Place(name, OUTPUT) in theirs
    }
    weights = [_host(getattr(module, "weight", None)) for module in norms.values()]
    if len(norms) < 2 or any(weight is None or weight.dim() != 1 for weight in weights):
        return None
    made = torch.cat([theirs[Place(name, OUTPUT)] for name in norms], dim=-1)
    if not evidence.same(made, theirs[place]):
        return None
    weight = torch.stack([weight for weight in weights if weight is not None])
    biases = [bias for module in norms.values() if (bias := _host(getattr(module, "bias", None))) is not None]
    bias = torch.stack(biases) if len(biases) == len(weight) else None
    x = torch.stack([theirs[Place(name, INPUT)] for name in norms], dim=1)
    eps = _eps_of(next(iter(norms.values())))
    trials = [*_norms(x, ours.view(x.shape), weight, bias, eps, place.module, {})]
    for text, other in (
        ("it has the first head's weight for all heads", weight[:1]),
        ("its heads' weights are in reverse order", weight.flip(0)),
    ):
        trials.append((text, _layer_norm(x, eps) * other + (0.0 if bias is None else bias)))
    return _best(trials, ours, evidence.tolerance)


def _best(trials: Iterable[tuple[str, torch.Tensor]], ours: torch.Tensor, tolerance: float) -> str | None:
    """Return the text of the trial that is nearest to ours [tokens, features]; None: none is it."""
    errors = [(relative_error(result.flatten(1), ours), text) for text, result in trials]
    error, text = min(errors, default=(1.0, ""))
    return text if error <= tolerance else None


def _norms(
    x: torch.Tensor,
    ours: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    name: str,
    parameters: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    layer_norm, rms = _layer_norm(x, eps), _rms(x, eps)
    yield from _forms(x, weight, bias, eps)
    yield from _other_groups(x, weight, bias, eps)
    if bias is not None:
        yield "its bias is not added", layer_norm * weight
    for other_eps in (*EPSILONS, *_solved_eps(x, ours, weight)):
        if other_eps != eps:
            text = f"its epsilon is {other_eps:g}, the reference's {eps:g}"
            yield text, _rms(x, other_eps) * weight
            yield text, _rms(x, other_eps) * (1 + weight)
            yield text, _layer_norm(x, other_eps) * weight + (0.0 if bias is None else bias)
    for other, parameter in parameters.items():
        if parameter.shape == weight.shape and other.endswith(".weight") and other != f"{name}.weight":
            text = f"{HELD}{other.removesuffix('.weight')}{WRONG_SLOT}"
            other_weight = parameter
            yield text, rms * other_weight
            yield text, rms * (1 + other_weight)
            yield text, layer_norm * other_weight + (0.0 if bias is None else bias)
            other_bias = parameters.get(f"{other.removesuffix('weight')}bias")
            if other_bias is not None:
                yield text, layer_norm * other_weight + other_bias


def _forms(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> Iterator[tuple[str, torch.Tensor]]:
    for text, normed in (
        ("a root-mean-square norm", _rms(x, eps)),
        ("a layer norm (mean subtracted)", _layer_norm(x, eps)),
    ):
        yield f"it is {text}, times weight", normed * weight
        yield f"it is {text}, times 1 + weight", normed * (1 + weight)
        yield f"it is {text} without weight", normed
        if bias is not None:
            yield f"it is {text}, times weight, plus bias", normed * weight + bias
            yield f"it is {text}, times 1 + weight, plus bias", normed * (1 + weight) + bias


def _other_groups(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield norms over each head where the reference's is over all, and the other way round."""
    shift = 0.0 if bias is None else bias
    width = weight.shape[-1]
    for norm in (_rms, _layer_norm):
        for size in (size for size in range(2, width) if width % size == 0):
            normed = norm(x.unflatten(-1, (-1, size)), eps).flatten(-2)
            yield f"it is over each {size} components (a head), not over all", normed * weight + shift
        if x.shape[1] > 1:
            text = "it is over all heads together, not over each"
            yield text, norm(x.flatten(1), eps).view(x.shape) * weight + shift


def _solved_eps(x: torch.Tensor, ours: torch.Tensor, weight: torch.Tensor) -> Iterator[float]:
    """Yield the epsilons of a root-mean-square norm that would give ours, times weight and times 1 + weight."""
    for scale in (weight, 1 + weight):
        factor = (ours * x * scale).sum(-1) / (x * scale).square().sum(-1).clamp(min=1e-30)
        eps = (factor.clamp(min=1e-30) ** -2 - x.square().mean(-1)).median()
        if 0 < float(eps) < 1:
            yield float(f"{float(eps):.2g}")


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _eps_of(norm: Any) -> float:
    values = [getattr(norm, name, None) for name in ("variance_epsilon", "eps", "epsilon")]
    return next((float(value) for value in values if isinstance(value, float)), 1e-6)


def _host(tensor: Any) -> torch.Tensor | None:
    return tensor.detach().to("cpu", torch.float32) if isinstance(tensor, torch.Tensor) else None


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-2, atol=1e-6)
