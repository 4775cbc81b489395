"""Other names of architectures: historic ones, copies, and models saved without their head."""

from collections.abc import Iterable

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

LIKE_LLAMA = ("aquila", "internlm", "xverse")
"""Model types that transformers does not know, whose code was a copy of Llama's: same names, same computation."""

ALIASES = {
    "LLaMAForCausalLM": "LlamaForCausalLM",  # in conversions of early 2023
    "AquilaModel": "LlamaForCausalLM",
    "AquilaForCausalLM": "LlamaForCausalLM",
    "InternLMForCausalLM": "LlamaForCausalLM",
    "XverseForCausalLM": "LlamaForCausalLM",
}


def with_other_names(architectures: Iterable[str]) -> list[str]:
    """Return the names, then those of classes that load the same checkpoints.

    The class for generating text contains the bare model (``Qwen3Model``) and loads its checkpoints, if the head shares
    the embedding's weights.
    """
    names = list(architectures)
    others = [ALIASES.get(name) or _with_head(name) for name in names]
    return list(dict.fromkeys([*names, *(name for name in others if name)]))


def _with_head(bare: str) -> str | None:
    types = [model_type for model_type, name in MODEL_MAPPING_NAMES.items() if name == bare]
    heads = {
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        for model_type in types
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES  # those have several parts
    }
    usual = bare.removesuffix("Model") + "ForCausalLM"  # several types may share a bare model
    return usual if usual in heads else next(iter(heads)) if len(heads) == 1 else None


def model_types_of(architecture: str) -> list[str]:
    """Return transformers' model types whose class for generating text has this name."""
    return [kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture]


def architecture_of(model_type: str) -> str | None:
    """Return transformers' class for generating text with models of this type; None if there is none."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        if model_type in mapping:
            return mapping[model_type]
    return None
