"""The language model within another model, by its configuration."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from rtp_llm.srt.configs.architectures import causal_architecture_of
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.models.registry import ModelRegistry

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def make_registered_model(
    config: "PretrainedConfig",
    quant_config: QuantizationConfig | None = None,
    prefix: str = "",
    architectures: Sequence[str] | None = None,
) -> nn.Module:
    """Build the registered model of a configuration, with its head: ``model``, ``lm_head``, ``logits_processor``.

    Args:
        architectures: None: those of the configuration, or else transformers' causal one for its ``model_type``.

    Raises:
        ValueError: the configuration names none, and transformers knows none for it.
    """
    names = list(architectures or config.architectures or [])
    if not names and (name := causal_architecture_of(config.model_type)):
        names = [name]
    if not names:
        raise ValueError(
            f"the configuration of type {config.model_type!r} names no architectures, and transformers knows no causal "
            "language model of that type: give architectures"
        )
    model_class: Any
    model_class, _ = ModelRegistry.resolve_model_cls(names)
    module: nn.Module = model_class(config, quant_config, prefix)
    return module
