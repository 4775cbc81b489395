"""Construct a model class, after a check of its signature, on a given device and in a given dtype."""

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rtp_llm.srt.configs.model_config import CONFIG_FILE, ModelConfig
from rtp_llm.srt.device.choice import building_for, provider_named
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.models.registry import reason


class ModelBuildError(ValueError):
    """The model class cannot be constructed from the checkpoint's configuration; the cause is chained."""


@contextmanager
def built_as(dtype: str, device: str) -> Iterator[None]:
    """Make this dtype and device the defaults within the context, and build layers for the device."""
    provider = provider_named(device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(provider.torch_device), building_for(provider):
            yield
    finally:
        torch.set_default_dtype(before)


def build_model(
    model_class: type[nn.Module], model_config: ModelConfig, quant_config: QuantizationConfig | None
) -> nn.Module:
    _check_model_class(model_class)
    try:
        model = model_class(config=model_config.hf_config, quant_config=quant_config)
    except Exception as error:  # whatever a model's constructor may raise; the cause is chained
        raise ModelBuildError(
            f"{model_class.__name__} cannot be built from {model_config.model_path}/{CONFIG_FILE}: {reason(error)}"
        ) from error
    _mark_heads(model)
    return model


def _check_model_class(model_class: type[nn.Module]) -> None:
    if not issubclass(model_class, nn.Module):
        raise ModelBuildError(f"{model_class.__name__} is not a torch.nn.Module, which a model class must be")
    signature = inspect.signature(model_class)
    try:
        signature.bind(config=None, quant_config=None)
    except TypeError as error:
        raise ModelBuildError(
            f"{model_class.__name__} is built with the keyword arguments config and quant_config, but its constructor "
            f"takes {signature}: {error}. Write it as __init__(self, config, quant_config=None, prefix='')"
        ) from error


def _mark_heads(model: nn.Module) -> None:
    """Mark embeddings that occur twice in the model, which are its head as well."""
    names: Counter[nn.Module] = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for module, count in names.items():
        if isinstance(module, VocabParallelEmbedding) and count > 1:
            module.is_head = True
