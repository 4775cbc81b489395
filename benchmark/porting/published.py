"""Fields that published config.json files have, and vLLM's files read, although transformers' classes do not name them.

Transformers tells the same by other fields; so each value follows from those, or is the one that transformers' code has
written into it.
"""

import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

_READ = re.compile(r"\bconfig\.(\w+)\b(?!\()")


def _leading_dense(config: Any) -> int:
    kinds = [*config.mlp_layer_types, "sparse"]
    return kinds.index("sparse")


def _rotary_dim(config: Any) -> int:
    factor = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    return int(config.head_dim * factor)


FIELDS: dict[str, Callable[[Any], Any]] = {
    "expert_hidden_dim": lambda config: config.moe_intermediate_size,
    "first_k_dense_replace": _leading_dense,
    "head_dim": lambda config: config.hidden_size // config.num_attention_heads,
    "hybrid_layer_pattern": lambda config: [int(kind == "sliding_attention") for kind in config.layer_types],
    "layernorm_epsilon": lambda config: config.rms_norm_eps,
    "moe_layer_freq": lambda config: [int(kind == "sparse") for kind in config.mlp_layer_types],
    "n_group": lambda config: 1,
    "rotary_dim": _rotary_dim,
    "route_norm": lambda config: True,
    "score_func": lambda config: "sigmoid",
    "scoring_func": lambda config: "sigmoid",
    "sliding_window_size": lambda config: config.sliding_window,
    "swa_head_dim": lambda config: config.head_dim,
    "swa_num_attention_heads": lambda config: config.num_attention_heads,
    "swa_num_key_value_heads": lambda config: config.num_key_value_heads,
    "swa_v_head_dim": lambda config: config.v_head_dim,
    "topk_group": lambda config: 1,
}


def published_fields(config: PreTrainedConfig, source: str) -> dict[str, Any]:
    """Return the fields that a model file reads, and that its configuration lacks."""
    found: dict[str, Any] = {}
    for name in sorted(set(_READ.findall(source)) & FIELDS.keys()):
        if _has(config, name):
            continue
        try:
            found[name] = FIELDS[name](config)
        except (AttributeError, TypeError):  # what it follows from is not there either: the file can do without it
            continue
    for name in config.sub_configs:
        if "attn" in name and not _has(getattr(config, name), "rope_theta"):
            found[name] = {"rope_theta": 10000.0}
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
