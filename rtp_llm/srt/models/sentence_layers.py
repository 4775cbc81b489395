"""Layers of sentence-transformers on vectors: on pooled ones, or on each token's state."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.configs.sentence_transformers import DenseModule, FirstComponents, Layer, LayerNormModule
from rtp_llm.srt.layers.pooler import FINISHES
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.weight_files import find_weight_files, read_weights


def build_layers(layers: Sequence[Layer], width: int, is_dummy: bool = False) -> tuple[nn.Module | None, int]:
    """Return the layers as one module in float32, [N, width] -> [N, size], and their size; None without layers.

    Args:
        is_dummy: they get random weights.

    Raises:
        ModelBuildError: one does not fit the vectors that it gets, or its weights do not fit its configuration.
    """
    modules = []
    for layer in layers:
        module, width = _build(layer, width)
        if not is_dummy and isinstance(layer, (DenseModule, LayerNormModule)):
            _load(module, layer.folder)
        modules.append(module.requires_grad_(False))
    return (nn.Sequential(*modules) if modules else None), width


def _build(layer: Layer, width: int) -> tuple[nn.Module, int]:
    if isinstance(layer, DenseModule):
        _check_size(layer.folder, layer.in_features, width)
        return Dense(layer), layer.out_features
    if isinstance(layer, LayerNormModule):
        _check_size(layer.folder, layer.size, width)
        return Norm(layer.size), width
    if isinstance(layer, FirstComponents):
        return First(layer.count), min(layer.count, width)
    return Unit(), width


def _check_size(folder: str, size: int, width: int) -> None:
    if size != width:
        raise ModelBuildError(f"{folder} takes vectors of {size} components, but gets {width}")


def _load(module: nn.Module, folder: str) -> None:
    weights = dict(read_weights(find_weight_files(folder, "auto")))
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != expected:
        raise ModelBuildError(
            f"{folder} must have the weights {_shown(expected)} of its config.json, not {_shown(found)}"
        )
    module.load_state_dict({name: tensor.float().clone() for name, tensor in weights.items()})


def _shown(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shapes[name])}" for name in sorted(shapes)) or "none"


class Dense(nn.Module):
    """``activation(linear(x))``, and what it reads in addition where there is a residual."""

    def __init__(self, module: DenseModule) -> None:
        super().__init__()
        self.linear = nn.Linear(module.in_features, module.out_features, module.bias, dtype=torch.float32)
        self.activation = module.activation
        self.is_residual = module.residual
        self.residual: nn.Module | None = None
        if module.residual and module.in_features != module.out_features:
            self.residual = nn.Linear(module.in_features, module.out_features, bias=False, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.linear(x)
        if self.activation is not None:
            made = getattr(F, self.activation)(made)
        if not self.is_residual:
            return made
        return made + (x if self.residual is None else self.residual(x))


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class First(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : self.count]


class Unit(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FINISHES["normalize"](x)
