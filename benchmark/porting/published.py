"""Fields that published config.json files have, and vLLM's files read, although transformers' classes do not name them.

Transformers tells the same by other fields; so each value follows from those, or is the one that transformers' code has
written into it.
"""

import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

_OF_ATTENTION = {"rope_theta": 10000.0, "clip_qkv": 8}  # of a part of a configuration
_READ = re.compile(r"\bconfig\.(\w+\b\[?)(?!\()")  # config.name, config.name[
_ASKED_FOR = re.compile(r'\bgetattr\(\s*(?:self\.)?config,\s*"(\w+)"')
# Fields that published files of a model have, although its file has a default for them.
OPTIONAL = frozenset({
    "add_swa_attention_sink_bias", "llama_4_scaling", "partial_rotary_factor", "rope_theta", "swa_rope_theta",
    "swa_v_head_dim",
})  # fmt: skip
_OF_LAYERS = "["  # how a field of FIELDS ends that a file must index by the layer


def _leading_dense(config: Any) -> int:
    kinds = [*config.mlp_layer_types, "sparse"]
    return kinds.index("sparse")


def _rotary_dim(config: Any) -> int:
    factor = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    return int(config.head_dim * factor)


def _rope(kind: str, name: str) -> Callable[[Any], Any]:
    """Return what reads a parameter of the rotary embedding of one kind of layer."""
    return lambda config: config.rope_parameters[kind][name]


def _long_scaling(config: Any) -> dict[str, Any]:
    """The factor of queries far behind, as files of Mistral's own format (params.json) have it."""
    rope = config.rope_parameters
    name = "original_max_position_embeddings"
    return {"beta": rope["llama_4_scaling_beta"], name: rope[name]}


FIELDS: dict[str, Callable[[Any], Any]] = {
    "add_swa_attention_sink_bias": lambda config: True,
    "block_dim": lambda config: config.hidden_size,
    "conv_dim": lambda config: config.hidden_size,
    "expert_hidden_dim": lambda config: config.moe_intermediate_size,
    "first_k_dense_replace": _leading_dense,
    "head_dim": lambda config: config.hidden_size // config.num_attention_heads,
    "hybrid_layer_pattern": lambda config: [int(kind == "sliding_attention") for kind in config.layer_types],
    "layernorm_epsilon": lambda config: config.rms_norm_eps,
    "llama_4_scaling": _long_scaling,
    "mla_scale_kv_lora": lambda config: True,
    "mla_scale_q_lora": lambda config: True,
    "moe_layer_freq[": lambda config: [int(kind == "sparse") for kind in config.mlp_layer_types],
    "n_group": lambda config: 1,
    "partial_rotary_factor": _rope("full_attention", "partial_rotary_factor"),
    "rope_theta": _rope("full_attention", "rope_theta"),
    "rotary_dim": _rotary_dim,
    "route_norm": lambda config: True,
    "score_func": lambda config: "sigmoid",
    "scoring_func": lambda config: "sigmoid",
    "sliding_windows": lambda config: [
        config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
    ],
    "sliding_window_size": lambda config: config.sliding_window - 1,  # of tokens before the query's own
    "swa_head_dim": lambda config: config.head_dim,
    "swa_num_attention_heads": lambda config: config.num_attention_heads,
    "swa_num_key_value_heads": lambda config: 2 * config.num_key_value_heads,
    "swa_rope_theta": _rope("sliding_attention", "rope_theta"),
    "swa_v_head_dim": lambda config: config.v_head_dim,
    "topk_group": lambda config: 1,
    "zero_expert_type": lambda config: "identity",
}


def published_fields(config: PreTrainedConfig, source: str) -> dict[str, Any]:
    """Return the fields that a model file reads, and that its configuration lacks."""
    found: dict[str, Any] = {}
    read = set(_READ.findall(source)) | (set(_ASKED_FOR.findall(source)) & OPTIONAL)
    for key in sorted((read | {name.removesuffix(_OF_LAYERS) for name in read}) & FIELDS.keys()):
        name = key.removesuffix(_OF_LAYERS)
        if _has(config, name):
            continue
        try:
            found[name] = FIELDS[key](config)
        except (AttributeError, KeyError, TypeError):  # nothing that it follows from is there: the file does without
            continue
    for name in config.sub_configs:
        if "attn" in name:
            part = getattr(config, name)
            found[name] = {field: value for field, value in _OF_ATTENTION.items() if _value(part, field) is None}
    if _value(config, "layer_types") is None and _has(config, "conv_L_cache"):
        kinds = ("conv", "conv", "full_attention", "conv")  # of Liquid AI's models, whose classes name none
        found["layer_types"] = [kinds[layer % len(kinds)] for layer in range(config.num_hidden_layers)]
    if set(_value(config, "layer_types") or ()) == {"linear_attention"} and _has(config, "num_attention_heads"):
        kinds = ("linear_attention", "linear_attention", "full_attention", "linear_attention")  # as in Granite 4
        found["layer_types"] = [kinds[layer % len(kinds)] for layer in range(config.num_hidden_layers)]
    return found


def switches(config: PreTrainedConfig, problem: str) -> dict[str, Any]:
    """Return switches to turn on, by what an error of loading says about weights that do not fit: biases that the file
    has, or norms of heads or correction biases that the checkpoint has."""
    if ".bias " in problem:
        return {name: True for name, value in config.to_dict().items() if name.endswith("bias") and value is False}
    if "e_score_correction_bias" in problem:
        return {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "use_routing_bias": True}
    return {"qk_norm": True} if "k_norm" in problem else {}


def _has(config: Any, name: str) -> bool:
    return name in config.to_dict()


def _value(config: Any, name: str) -> Any:
    return config.to_dict().get(name)
