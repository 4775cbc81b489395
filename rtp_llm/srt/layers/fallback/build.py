"""Build the transformers model of a configuration, if it can be served."""

import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from rtp_llm.srt.layers.fallback.cache import ServedCache
from rtp_llm.srt.layers.fallback.masks import UnservableModelError
from rtp_llm.srt.layers.fallback.own_states import own_states

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

CAUSAL_LM_NAMES = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
IMAGE_TEXT_NAMES = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())  # some are in both
SERVED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention", "mlp", "moe")
RECURRENT_LAYER_TYPES = ("linear_attention", "conv")  # keep states, and no keys and values
STATE_LAYER_TYPES = (*RECURRENT_LAYER_TYPES, "hybrid", "hybrid_sliding")
CACHE_ARGUMENTS = ("past_key_values", "cache_params")
CROSS_ATTENTION = ("encoder_attn", "cross_attn", "crossattention")  # what such modules are named
LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")


def build(config: "PretrainedConfig") -> PreTrainedModel:
    """Build the model on the default device, in the default dtype.

    Raises:
        UnservableModelError: transformers has no causal language model for the configuration.
    """
    config.dtype = torch.get_default_dtype()
    config._attn_implementation = "eager"
    names = config.architectures or []
    known = next((name for name in names if name in CAUSAL_LM_NAMES), None)
    if known:
        if known in IMAGE_TEXT_NAMES:
            logger.warning("%s takes images, but by transformers' code only text: requests with images fail", known)
        return getattr(transformers, known)(config)
    # A configuration of remote code was allowed to run, and so is its model.
    if type(config).__module__.startswith("transformers_modules."):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    sees = next((name for name in names if name in IMAGE_TEXT_NAMES), None)
    if sees:
        raise UnservableModelError(f"{sees} takes images, and models run by transformers' code take text only")
    raise UnservableModelError(
        f"transformers has no causal language model of class {', '.join(names) or '(none named)'}"
    )


def refuse_unservable(model: PreTrainedModel) -> None:
    """Raise UnservableModelError if the configuration or the class shows that the model cannot be served."""
    for missing in (_missing_state(model), _missing_interface(model)):
        if missing:
            raise UnservableModelError(f"{type(model).__name__} {missing}")


def _missing_state(model: PreTrainedModel) -> str | None:
    """Return what its layers keep or read besides keys and values of earlier tokens; None: nothing."""
    config = model.config.get_text_config()
    other = sorted(_layer_types(model) - {*SERVED_LAYER_TYPES, *STATE_LAYER_TYPES})
    if config.is_encoder_decoder or any(name.endswith(CROSS_ATTENTION) for name, _ in model.named_modules()):
        return "belongs to an encoder: attention to an encoder's output (cross-attention) is missing here"
    if any("alibi" in name for module in model.modules() for name in dir(type(module))) or getattr(
        config, "alibi", False
    ):
        return (
            "biases scores by distance (ALiBi) in its own code, which attention here cannot read: it needs a model file"
        )
    if other:
        return f"has layers of type {', '.join(other)}, whose state is not kept here"
    if getattr(model, "_is_stateful", False) and not keeps_states(model):
        return "is recurrent, and keeps its state otherwise than in transformers' cache, where it could be exchanged"
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in LENGTH_DEPENDENT_ROPES:
                return (
                    f"rotates keys by their sequence's length (rope type {kind}), which is done for our own models only"
                )
    return None


def keeps_states(model: PreTrainedModel) -> bool:
    """Return whether layers keep anything but keys and values where we find it."""
    has_own = any(own_states(module) is not None for module in model.modules())
    return has_own or not _layer_types(model).isdisjoint(STATE_LAYER_TYPES)


def cache_options(model: PreTrainedModel, cache: ServedCache) -> dict[str, Any]:
    """Return the arguments of a model's forward that hand it a cache, if it keeps states."""
    if not keeps_states(model):
        return {"use_cache": False}
    taken = [] if _layer_types(model).isdisjoint(STATE_LAYER_TYPES) else inspect.signature(model.forward).parameters
    return {"use_cache": True} | {name: cache for name in CACHE_ARGUMENTS if name in taken}


def _layer_types(model: PreTrainedModel) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def _missing_interface(model: PreTrainedModel) -> str | None:
    if keeps_states(model) and _layer_types(model) <= set(RECURRENT_LAYER_TYPES):
        return None  # there is no attention
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not any(part._can_set_attn_implementation() for part in parts):
        return "computes attention by itself, not by transformers' interface for attention functions"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "takes no position_ids, so it cannot be told where the tokens of several sequences stand"
    return None
