"""config.json of a GGUF: from its metadata, by what all models share and by the form that the model class declares."""

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from gguf import GGMLQuantizationType

from rtp_llm.srt.configs.architectures import model_types_of
from rtp_llm.srt.gguf.file import GGUFFile
from rtp_llm.srt.gguf.form import GGUFForm, declared_forms
from rtp_llm.srt.gguf.generation import token_id, vocabulary_size
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.rope import rope_scaling
from rtp_llm.srt.models.model_source import CONFIG_CLASS
from rtp_llm.srt.models.registry import ADDING_A_MODEL, ModelRegistry

if TYPE_CHECKING:
    from torch import nn

# Metadata key without the architecture's prefix -> (field of config.json, type). A form's own names go before.
COMMON: dict[str, tuple[str, type]] = {
    "context_length": ("max_position_embeddings", int),
    "embedding_length": ("hidden_size", int),
    "block_count": ("num_hidden_layers", int),
    "feed_forward_length": ("intermediate_size", int),
    "attention.head_count": ("num_attention_heads", int),
    "attention.head_count_kv": ("num_key_value_heads", int),
    "attention.key_length": ("head_dim", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
    "attention.layer_norm_epsilon": ("layer_norm_eps", float),
    "attention.sliding_window": ("sliding_window", int),
    "attention.q_lora_rank": ("q_lora_rank", int),
    "attention.kv_lora_rank": ("kv_lora_rank", int),
    "rope.freq_base": ("rope_theta", float),
    "attn_logit_softcapping": ("attn_logit_softcapping", float),
    "final_logit_softcapping": ("final_logit_softcapping", float),
    "logit_scale": ("logit_scale", float),
    "expert_count": ("num_experts", int),
    "expert_used_count": ("num_experts_per_tok", int),
    "expert_feed_forward_length": ("moe_intermediate_size", int),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", int),
    "expert_shared_count": ("n_shared_experts", int),
    "expert_group_count": ("n_group", int),
    "expert_group_used_count": ("topk_group", int),
    "expert_weights_scale": ("routed_scaling_factor", float),
    "expert_weights_norm": ("norm_topk_prob", bool),
    "leading_dense_block_count": ("first_k_dense_replace", int),
}
_NEEDED = ("context_length", "embedding_length", "block_count", "attention.head_count")
_OF_ATTENTION = ("attention.head_count", "feed_forward_length")  # 0 in files of models of neither
_BY_LAYER = ("attention.head_count",)  # of these, may be a list with a value for each layer
_NORMS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_TOKEN_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_LARGEST = 2**27  # of a size: no model has so many tokens, features or layers
_UNUSABLE = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)  # raised for values of other types


class Metadata(dict[str, Any]):
    """Metadata for a form's functions: to ask for a key that is missing is an error that names it."""

    def __missing__(self, key: str) -> Any:
        raise GGUFError(f"`{key}` is missing")


def config_json(file: GGUFFile) -> dict[str, Any]:
    """Return the content of config.json for a GGUF.

    Raises:
        GGUFError: no model class declares the architecture, or the metadata lack a key or have an impossible value;
            the message names the key.
        ModelImportError, DuplicateModelError: the model's file cannot be used.
    """
    try:
        _check_kind(file)
        name, model_class, form = find_model(file)
        config = {**form.defaults, **_said(file, form), **_of_tensors(file, form)}
        if form.adapt:
            _adapt(form, file.metadata, config)
        _check(config, file, form)
    except GGUFError as error:
        raise GGUFError(f"{file.paths[0]}: {error}") from error.__cause__
    return {
        "architectures": [name],
        "model_type": _model_type(name, model_class, form),
        **config,
        "dtype": "float32" if _is_float32(file) else "bfloat16",
        "quantization_config": {"quant_method": "gguf"},
    }


def find_model(file: GGUFFile) -> "tuple[str, type[nn.Module], GGUFForm]":
    """Return the name of the class that reads a file, the class, and its form.

    Raises:
        GGUFError: there is none.
        DuplicateModelError, ModelImportError: the file of a class that declares the architecture cannot be imported.
    """
    architecture, metadata = file.architecture, Metadata(file.metadata)
    for classes in ModelRegistry.gguf_classes(architecture):
        forms = [
            (name, model_class, form)
            for name, model_class in classes.items()
            for form in declared_forms(model_class)
            if form.architecture == architecture
        ]
        found = [entry for entry in forms if _matches(entry[2], metadata)]
        found = found or [entry for entry in forms if entry[2].matches is None]
        if len({id(form) for _, _, form in found}) > 1:
            names = ", ".join(name for name, _, _ in found)
            raise GGUFError(f"several classes read its architecture {architecture!r}: {names}; keep one")
        if found:
            return found[0]
    raise _unread(architecture)


def _unread(architecture: str) -> GGUFError:
    known = ", ".join(sorted(ModelRegistry.gguf_architectures())) or "none"
    return GGUFError(
        f"no model here reads GGUF files of the architecture {architecture!r}; have {known}. A model file may declare "
        f"it: see `gguf` in {ADDING_A_MODEL}"
    )


def _matches(form: GGUFForm, metadata: Mapping[str, Any]) -> bool:
    try:
        return form.matches is not None and form.matches(metadata)
    except _UNUSABLE as error:
        if isinstance(error, GGUFError):
            raise
        raise GGUFError(f"its metadata cannot be used for {form.architecture}: {error!r}") from error


def check_architecture(file: GGUFFile) -> None:
    """Refuse a file that no model reads, as far as that is known without importing a model.

    Raises:
        GGUFError: it is no language model, or of an architecture that no class declares.
    """
    try:
        _check_kind(file)
        if file.architecture not in ModelRegistry.gguf_architectures() and not ModelRegistry.has_external:
            raise _unread(file.architecture)
    except GGUFError as error:
        raise GGUFError(f"{file.paths[0]}: {error}") from None


def _check_kind(file: GGUFFile) -> None:
    """Refuse what is no language model: adapters, vision parts, importance matrices, vocabularies."""
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise GGUFError(f"`general.type` is {kind!r:.40}, so it is no language model; expected is 'model'")
    if file.architecture == "clip":
        raise GGUFError("it is the vision part of a model (its architecture is 'clip'); give the language model's file")
    if not file.tensors:
        raise GGUFError("it has no tensors, so it holds a vocabulary, and no model")


def _said(file: GGUFFile, form: GGUFForm) -> dict[str, Any]:
    """Return the fields that metadata say."""
    prefix = f"{file.architecture}."
    without = () if form.has_attention else _OF_ATTENTION
    _check_needed(file, prefix, without)
    config: dict[str, Any] = {}
    for key, (common, kind) in COMMON.items():
        value = file.metadata.get(prefix + key)
        if value is not None and key not in without:
            config[form.config.get(key, common)] = _uniform(_checked(prefix + key, value, kind))
    for key in form.config.keys() - COMMON.keys():
        if prefix + key in file.metadata:
            config[form.config[key]] = _uniform(file.metadata[prefix + key])
    for key, name in _TOKEN_IDS.items():
        if (given := token_id(file.metadata, key, vocabulary_size(file))) is not None:
            config[name] = given
    if scaling := rope_scaling(file):
        config["rope_scaling"] = scaling
    windows = file.metadata.get(f"{prefix}attention.sliding_window_pattern")
    if isinstance(windows, list):
        config["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in windows]
    _leave_out_predictors(config, file, form)
    _add_head_sizes(config, file, form)
    return config


def _check_needed(file: GGUFFile, prefix: str, without: Collection[str]) -> None:
    for key in _NEEDED:
        if key in without:
            continue
        value = file.metadata.get(prefix + key)
        if value is None:
            raise GGUFError(f"`{prefix}{key}` is missing")
        is_list = isinstance(value, list) and key in _BY_LAYER and value
        for size in value if is_list else [value]:
            if isinstance(size, list) or (_checked(prefix + key, size, int) == 0 and not is_list):
                raise GGUFError(f"`{prefix}{key}` must be a positive integer, not {size!r:.40}")
    if not any(prefix + key in file.metadata for key in _NORMS):
        raise GGUFError(f"`{prefix}{_NORMS[0]}` is missing")


def _leave_out_predictors(config: dict[str, Any], file: GGUFFile, form: GGUFForm) -> None:
    """Count the layers that are the model's: the last of a file may predict further tokens."""
    key = f"{file.architecture}.nextn_predict_layers"
    number = _checked(key, file.metadata.get(key, 0), int)
    name = form.config.get("block_count", "num_hidden_layers")
    if isinstance(number, list) or (number and number >= config[name]):
        raise GGUFError(f"`{key}` is {number!r:.40}, but must be less than the number of layers, {config[name]}")
    config[name] -= number


def _add_head_sizes(config: dict[str, Any], file: GGUFFile, form: GGUFForm) -> None:
    """Add the size of heads and the part of them that is rotated, where they are not the usual ones."""
    arch = file.architecture
    key_length = file.metadata.get(f"{arch}.attention.key_length")
    value_length = file.metadata.get(f"{arch}.attention.value_length", key_length)
    if key_length != value_length and "attention.value_length" not in form.config:
        raise GGUFError(
            f"`{arch}.attention.value_length` is {value_length}, but {arch}.attention.key_length {key_length}; this "
            "model has heads of one size"
        )
    rotated = file.metadata.get(f"{arch}.rope.dimension_count")
    heads = file.metadata[f"{arch}.attention.head_count"]
    if (
        rotated is None
        or "rope.dimension_count" in form.config
        or isinstance(heads, list)
        or isinstance(key_length, list)
    ):
        return
    rotated = _checked(f"{arch}.rope.dimension_count", rotated, int)
    if isinstance(rotated, list):
        raise GGUFError(f"`{arch}.rope.dimension_count` must be an integer, not {rotated!r:.40}")
    size = key_length or file.metadata[f"{arch}.embedding_length"] // heads
    if rotated > size and key_length is None:
        config["head_dim"] = rotated  # files of early 2024 do not say the length of keys
    elif 0 < rotated < size:
        config["partial_rotary_factor"] = rotated / size


def _of_tensors(file: GGUFFile, form: GGUFForm) -> dict[str, Any]:
    """Return the fields that are read off the tensors: the vocabulary's size, the head, biases and the like."""
    config: dict[str, Any] = {field: _has(file, name) for name, field in form.presence.items()}
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise GGUFError("tensor 'token_embd.weight' is missing, or no matrix")
    num_rows, num_features = embedding.shape
    wanted = file.metadata[f"{file.architecture}.embedding_length"]
    if num_features != wanted:
        raise GGUFError(
            f"`{file.architecture}.embedding_length` is {wanted}, but tensor 'token_embd.weight' has {num_features}"
        )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > num_rows:
        raise GGUFError(
            f"`tokenizer.ggml.tokens` has {len(tokens)} tokens, but tensor 'token_embd.weight' only {num_rows} rows"
        )
    return config | {"vocab_size": num_rows}


def _has(file: GGUFFile, name: str) -> bool:
    """Whether the file has a tensor; of a name with ``{bid}``, in any block."""
    pattern = re.escape(name).replace(re.escape("{bid}"), r"\d+")
    return any(re.fullmatch(pattern, given) for given in file.tensors)


def _adapt(form: GGUFForm, metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    assert form.adapt
    try:
        form.adapt(Metadata(metadata), config)
    except GGUFError:
        raise
    except _UNUSABLE as error:
        raise GGUFError(f"its metadata cannot be used for {form.architecture}: {error!r}") from error


def _check(config: Mapping[str, Any], file: GGUFFile, form: GGUFForm) -> None:
    prefix = f"{file.architecture}."
    for key, (common, kind) in COMMON.items():
        if kind is int and isinstance(config.get(form.config.get(key, common)), list):
            raise GGUFError(f"`{prefix}{key}` differs from layer to layer, which this model does not support")
    num_layers = file.metadata[prefix + "block_count"]
    if num_layers > len(file.tensors):
        raise GGUFError(f"`{prefix}block_count` is {num_layers}, but there are only {len(file.tensors)} tensors")
    try:
        json.dumps(config, allow_nan=False)
    except ValueError as error:
        raise GGUFError(f"its metadata give no valid config.json: {error}") from error


def _checked(key: str, value: Any, kind: type) -> Any:
    """Return a value, or each of a list, as a number of the type."""
    if isinstance(value, list):
        return [_checked(key, item, kind) for item in value]
    if kind is bool or isinstance(value, bool):
        is_right = kind is bool and isinstance(value, bool)
    elif kind is int:
        is_right = isinstance(value, int) and 0 <= value <= _LARGEST
    else:
        is_right = isinstance(value, (int, float)) and math.isfinite(value)
    if not is_right:
        names = {bool: "true or false", int: f"an integer from 0 to {_LARGEST}", float: "a finite number"}
        raise GGUFError(f"`{key}` must be {names[kind]}, not {value!r:.40}")
    return value


def _uniform(value: Any) -> Any:
    """Return the one value of a list with a value for each layer, if they are equal."""
    is_uniform = isinstance(value, list) and value and all(item == value[0] for item in value)
    return value[0] if is_uniform else value


def _is_float32(file: GGUFFile) -> bool:
    return all(tensor.type == GGMLQuantizationType.F32 for tensor in file.tensors.values())


def _model_type(name: str, model_class: type, form: GGUFForm) -> str:
    """Return the ``model_type`` of a class: its form's, its configuration class's, or the one that transformers has."""
    if "model_type" in form.defaults:
        return str(form.defaults["model_type"])
    own = getattr(getattr(model_class, CONFIG_CLASS, None), "model_type", None)
    types = model_types_of(name)
    if own:
        return str(own)
    return types[0] if len(types) == 1 else form.architecture
