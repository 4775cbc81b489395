"""Other names of architectures: historic ones, copies, and models saved without their head.

transformers' table of classes takes 5 MB in each process that reads it, so it is read when it is asked.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module

LIKE_LLAMA = ("aquila", "internlm", "xverse")
"""Model types that transformers does not know, whose code was a copy of Llama's: same names, same computation."""

ALIASES = {
    "LLaMAForCausalLM": "LlamaForCausalLM",  # in conversions of early 2023
    "AquilaModel": "LlamaForCausalLM",
    "AquilaForCausalLM": "LlamaForCausalLM",
    "InternLMForCausalLM": "LlamaForCausalLM",
    "XverseForCausalLM": "LlamaForCausalLM",
    "BertForPreTraining": "BertForMaskedLM",  # with a second head, which is left out
    "GteNewModel": "GteModel",  # vLLM's names of GTE's first ones
    "GteNewForSequenceClassification": "GteForSequenceClassification",
}


_WITH_HEAD = ("ForCausalLM", "ForConditionalGeneration")
_FOR_TEXT, _OF_PARTS = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"


def with_other_names(architectures: Iterable[str]) -> list[str]:
    """Return the names, then those of classes that load the same checkpoints.

    The class for generating text contains the bare model (``Qwen3Model``) and loads its checkpoints, if the head shares
    the embedding's weights.
    """
    names = list(architectures)
    others = [ALIASES.get(name) or (None if name.endswith(_WITH_HEAD) else _with_head(name)) for name in names]
    return list(dict.fromkeys([*names, *(name for name in others if name)]))


def _with_head(bare: str) -> str | None:
    for_text, of_parts = _classes(_FOR_TEXT), _classes(_OF_PARTS)
    types = [model_type for model_type, name in _classes("MODEL_MAPPING_NAMES").items() if name == bare]
    heads = {for_text[kind] for kind in types if kind in for_text and kind not in of_parts}
    usual = bare.removesuffix("Model") + "ForCausalLM"  # several types may share a bare model
    return usual if usual in heads else next(iter(heads)) if len(heads) == 1 else None


def model_types_of(architecture: str) -> list[str]:
    """Return transformers' model types whose class for generating text has this name."""
    return [kind for kind, name in _classes(_FOR_TEXT).items() if name == architecture]


def architecture_of(model_type: str) -> str | None:
    """Return transformers' class for generating text with models of this type; None if there is none."""
    return causal_architecture_of(model_type) or _classes(_OF_PARTS).get(model_type)


def causal_architecture_of(model_type: str) -> str | None:
    """As ``architecture_of``, of those for texts alone."""
    return _classes(_FOR_TEXT).get(model_type)


def _classes(table: str) -> Mapping[str, str]:
    """Return names of transformers' classes by model type."""
    classes: Mapping[str, str] = getattr(import_module("transformers.models.auto.modeling_auto"), table)
    return classes
