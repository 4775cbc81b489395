"""What the metadata of models with recurrent layers say, for the forms of their files."""

from collections.abc import Mapping
from typing import Any

from rtp_llm.srt.gguf.header import GGUFError

FLAT = "flat"
# Changes of Mamba 2's tensors, by the ends of their names.
MAMBA2_CHANGES = (
    (r"\.A_log$", "log_decay"),
    (r"\.D$", FLAT),
    (r"\.conv1d\.weight$", "convolution"),
    (r"\.(mixer|mamba)\.norm\.weight$", FLAT),
)
FULL_ATTENTION, LINEAR_ATTENTION = "full_attention", "linear_attention"


def kinds_of_layers(metadata: Mapping[str, Any], recurrent: str = LINEAR_ATTENTION) -> list[str]:
    """Return the kind of each layer: ``full_attention`` if it has key heads, else ``recurrent``."""
    return [FULL_ATTENTION if heads else recurrent for heads in _key_heads(metadata)]


def num_key_heads(metadata: Mapping[str, Any]) -> int:
    """Return the number of key heads of layers that have any."""
    return max(_key_heads(metadata))


def state_head_dim(metadata: Mapping[str, Any]) -> int:
    """Return the size of a recurrent layer's heads (of values): all of them together, by their number."""
    architecture = metadata["general.architecture"]
    size, number = (metadata[f"{architecture}.ssm.{key}"] for key in ("inner_size", "time_step_rank"))
    if number < 1 or size % number:
        raise GGUFError(
            f"`{architecture}.ssm.inner_size` is {size}, which are no whole heads: `{architecture}.ssm.time_step_rank` "
            f"is {number}"
        )
    return int(size // number)


def by_layer(metadata: Mapping[str, Any], key: str) -> list[Any]:
    """Return the values of a key, without the architecture's prefix, of all layers; one value is that of each."""
    architecture = metadata["general.architecture"]
    value, num_layers = metadata[f"{architecture}.{key}"], metadata[f"{architecture}.block_count"]
    values = value if isinstance(value, list) else [value] * num_layers
    if len(values) != num_layers:
        raise GGUFError(f"`{architecture}.{key}` has {len(values)} values, but there are {num_layers} layers")
    return values


def _key_heads(metadata: Mapping[str, Any]) -> list[int]:
    return by_layer(metadata, "attention.head_count_kv")
