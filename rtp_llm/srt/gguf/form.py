"""What a model file declares about the GGUF files that hold its model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Changes of Llama's queries and keys, and of what follows it.
PERMUTED = ((r"\.q_proj\.(weight|bias)$", "permuted_queries"), (r"\.k_proj\.(weight|bias)$", "permuted_keys"))
TRAIT = "gguf"  # the attribute of a model class that has its form, or a tuple of them


@dataclass(frozen=True, slots=True)
class GGUFForm:
    """How llama.cpp's converter writes a model, and so how it is read back.

    Args:
        architecture: ``general.architecture``, written out in the call: the registry reads it from the source.
        config: metadata key without the architecture's prefix -> field of config.json, beside the common ones of
            ``rtp_llm/srt/gguf/config.py``. A key that the file lacks is left out.
        defaults: fields of config.json that no key says. What the file says wins.
        presence: name of a tensor -> field of config.json that says whether the file has it, such as
            ``{"blk.0.attn_q.bias": "attention_bias"}``; ``{bid}`` for the block's number: whether any block has it.
        adapt: called last with the metadata (keys as in the file) and the fields, which it changes; for all that the
            others cannot say. An unsupported value is a GGUFError.
        changes: (regular expression on a tensor's name in the Hugging Face checkpoint, name of a change in
            ``rtp_llm/srt/gguf/changes.py``): what the converter did to these tensors, to be undone.
        names: name of a tensor in the file, with ``{bid}`` for the block's number, with or without its suffix
            (``.weight``) -> name in the Hugging Face checkpoint, for what the ``gguf`` package does not know. Several
            may have the same: then a change makes them one. ``{part}`` in it: the tensor is several of the
            checkpoint's, and this the number of one along the first dimension.
        values: metadata key, whole, with a number for each layer -> name in the Hugging Face checkpoint, with ``{bid}``
            for the layer's number, of the tensor that has it.
        has_attention: False: the model has no heads that attend, and the file's number of them is of no matter.
        matches: whether a file with this metadata is of this class, where several classes have the architecture. One
            form of them may do without: it takes what no other matches.
    """

    architecture: str
    config: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    presence: Mapping[str, str] = field(default_factory=dict)
    adapt: Callable[[Mapping[str, Any], dict[str, Any]], None] | None = None
    changes: Sequence[tuple[str, str]] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    has_attention: bool = True
    matches: Callable[[Mapping[str, Any]], bool] | None = None


def declared_forms(model_class: type) -> tuple[GGUFForm, ...]:
    """Return the forms that the class itself declares: those of the class that it extends are another model's."""
    return as_forms(vars(model_class).get(TRAIT))


def as_forms(value: object) -> tuple[GGUFForm, ...]:
    """Return the value of a trait ``gguf``, a form or several, as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, GGUFForm) else tuple(value)  # type: ignore[arg-type]


def is_form(value: object) -> bool:
    """Whether a value is one that the trait may have."""
    forms = value if isinstance(value, (list, tuple)) else [value]
    return bool(forms) and all(isinstance(form, GGUFForm) for form in forms)
