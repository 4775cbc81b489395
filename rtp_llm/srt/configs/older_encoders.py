"""Configurations of encoders whose first checkpoints came with code of their own, in transformers' spelling of today.

GTE of 2024 was the model type ``new``, with classes NewModel and the like; Nomic BERT had GPT-2's names of sizes. Their
weights have the same names today. What the own code could compute and the model files cannot is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

_NEW = "new"
_NEW_DEFAULTS = {"vocab_size": 30528, "max_position_embeddings": 2048, "rope_theta": 10000.0}
# Of Nomic BERT: old name -> today's.
_NOMIC_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}
_GATED = {"swiglu": "silu", "geglu": "gelu"}
# What must be so: key -> the only value that is computed. A key that is missing, or null, is as it must be.
_NOMIC_ONLY = {
    "prenorm": False,
    "parallel_block": False,
    "causal": False,
    "use_rms_norm": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "rotary_emb_fraction": 1,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": 0,
    "num_experts": 0,
    "moe_every_n_layers": 0,
}
_GTE_ONLY = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
}


class OlderConfigError(ValueError):
    """The configuration asks for what is not computed."""


def as_of_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's content in today's spelling, if it is one of these encoders; else a copy.

    Raises:
        OlderConfigError: it asks for what is not computed.
    """
    translate = _TYPES.get(str(config.get("model_type")))
    return dict(config) if translate is None else translate(config)


def _gte(config: Mapping[str, Any]) -> dict[str, Any]:
    _check(config, _GTE_ONLY)
    result = dict(config)
    if config["model_type"] == _NEW:
        names = config.get("architectures")
        result = {**_NEW_DEFAULTS, **{key: value for key, value in config.items() if key != "auto_map"}}
        result["model_type"] = "gte"
        if isinstance(names, list):
            result["architectures"] = [_without_new(name) if isinstance(name, str) else name for name in names]
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("type", scaling.get("rope_type")) == "ntk":
        result["rope_parameters"] = _ntk(result, scaling)
        del result["rope_scaling"]
    return result


def _without_new(name: str) -> str:
    return "Gte" + name.removeprefix("New") if name.startswith("New") else name


def _ntk(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary positions for NTK-aware scaling by a factor s: the base is s times as large, and all frequencies
    are divided by s ** (2 / d), d being the size of a head, so that the lowest one is divided by s."""
    factor, mixed = scaling.get("factor"), scaling.get("mixed_b")
    if mixed is not None or isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor <= 0:
        raise OlderConfigError(f"rope_scaling of type ntk must have a positive factor and no mixed_b, not {scaling}")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return {
        "rope_type": "linear",
        "rope_theta": config.get("rope_theta", _NEW_DEFAULTS["rope_theta"]) * factor,
        "factor": factor ** (2 / head_dim),
        "original_max_position_embeddings": config["max_position_embeddings"],  # the length includes the scaling
    }


def _nomic(config: Mapping[str, Any]) -> dict[str, Any]:
    _check(config, _NOMIC_ONLY)
    result = dict(config)
    for old, name in _NOMIC_NAMES.items():
        if config.get(old) is not None:
            result.setdefault(name, config[old])
    activation = config.get("activation_function")
    if activation is not None:
        if activation not in _GATED:
            raise OlderConfigError(f"activation_function must be one of {list(_GATED)}, not {activation!r}")
        result.setdefault("hidden_act", _GATED[activation])
    if config.get("rotary_emb_base") is not None and "rope_theta" not in config:
        result.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": float(config["rotary_emb_base"])})
    if config.get("rotary_scaling_factor") is not None:  # another base for inputs longer than those of the training
        result["max_position_embeddings"] = config.get("max_trained_positions", 2048)
    return result


def _check(config: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    for key, value in only.items():
        if config.get(key) not in (None, value):
            raise OlderConfigError(f"{key} must be {value!r}, not {config[key]!r}: that is not supported")


_TYPES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    _NEW: _gte,
    "gte": _gte,
    "nomic_bert": _nomic,
}
