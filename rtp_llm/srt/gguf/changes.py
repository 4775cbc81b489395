"""What llama.cpp's converter does to tensors, undone.

A model's form names a change for the tensors that it was done to: ``changes=[("q_proj", "permuted_queries")]``. Changes
move rows by torch's own operations, so they do not care whether a tensor lies in blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Change = Callable[[Sequence[torch.Tensor], "PretrainedConfig"], torch.Tensor]
"""Called with the GGUF's tensors that are one of the checkpoint's (``GGUFForm.names``; mostly one), and the language
model's configuration; returns the checkpoint's tensor."""


def num_key_heads(config: "PretrainedConfig") -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _permuted(num_heads: Callable[["PretrainedConfig"], int]) -> Change:
    """Undo that pairs of rotated features, which the checkpoint has in two halves of a head, were put side by side."""

    def undo(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
        (tensor,) = tensors
        return tensor.unflatten(0, (num_heads(config), -1, 2)).transpose(1, 2).flatten(0, 2)

    return undo


def _plus_one(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """Undo that 1 was added to a norm's weight."""
    (tensor,) = tensors
    return tensor - 1


def _transposed(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """Undo that the inputs, which the checkpoint has first, were put last."""
    (tensor,) = tensors
    return tensor.transpose(-1, -2)


def _by_head(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """Undo that queries, keys and values of a fused tensor were put together.

    The checkpoint has the queries of one key head, its key and its value, then those of the next. How many key heads
    there are follows from the number of rows.
    """
    (tensor,) = tensors
    num_heads = config.num_attention_heads
    num_keys = (tensor.shape[0] * num_heads // config.hidden_size - num_heads) // 2
    group = num_heads // num_keys
    heads = tensor.unflatten(0, (num_keys * (group + 2), -1))
    q, k, v = heads.split([num_keys * group, num_keys, num_keys])
    return torch.cat((q.unflatten(0, (num_keys, group)), k[:, None], v[:, None]), dim=1).flatten(0, 2)


def _latent(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """Undo that ``kv_b_proj`` was split, into keys [heads, kv_lora_rank, size] and values [heads, size, kv_lora_rank].

    It is [heads * (size of keys + size of values), kv_lora_rank]. Files of early 2025 and before have it whole.
    """
    if len(tensors) == 1:
        return tensors[0]
    keys, values = tensors
    return torch.cat((keys.transpose(1, 2), values.to(keys.dtype)), dim=1).flatten(0, 1)


def _log_decay(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """Undo that ``A_log``, of one dimension, was made ``A = -exp(A_log)``."""
    (tensor,) = tensors
    return (-tensor).log().flatten()


def _flat(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """Undo that a vector was given further dimensions."""
    (tensor,) = tensors
    return tensor.flatten()


def _convolution(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """Undo that the weight of a convolution of single channels lost its dimension of one, [channels, 1, kernel]."""
    (tensor,) = tensors
    return tensor.reshape(-1, 1, tensor.shape[-1])


# Gated DeltaNet: value heads, of which neighbours share a key head, and which the converter orders otherwise: first
# one of each key head, then the next of each.


def _value_heads(config: "PretrainedConfig") -> tuple[int, int]:
    """Return how many value heads share a key head, and how many key heads there are."""
    return config.linear_num_value_heads // config.linear_num_key_heads, config.linear_num_key_heads


def _tiled_heads(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """Undo that rows of value heads were ordered otherwise."""
    (tensor,) = tensors
    return tensor.unflatten(0, (*_value_heads(config), -1)).transpose(0, 1).flatten(0, 2)


def _tiled_values(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """As ``_tiled_heads``, of rows of queries and keys, which stay, and of values."""
    (tensor,) = tensors
    size = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return torch.cat((tensor[:size], _tiled_heads([tensor[size:]], config)))


def _tiled_inputs(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """As ``_tiled_heads``, of columns. Blocks stay where they are no longer than a head."""
    (tensor,) = tensors
    shared, num_keys = _value_heads(config)
    if shared == 1:
        return tensor
    heads = tensor.split(config.linear_value_head_dim, dim=1)
    return torch.cat([heads[i * num_keys + key] for key in range(num_keys) for i in range(shared)], dim=1)


def _by_key_head(tensors: Sequence[torch.Tensor], config: "PretrainedConfig") -> torch.Tensor:
    """Undo that queries, keys and values became one tensor and gates another.

    The checkpoint has a key head's query, key, values and gates, then those of the next; so have files of 2025.
    """
    if len(tensors) == 1:
        return tensors[0]
    qkv, gates = tensors
    num_keys, key_size = config.linear_num_key_heads, config.linear_num_key_heads * config.linear_key_head_dim
    parts = *qkv.split([key_size, key_size, qkv.shape[0] - 2 * key_size]), gates
    return torch.cat([part.unflatten(0, (num_keys, -1)) for part in parts], dim=1).flatten(0, 1)


CHANGES: Mapping[str, Change] = {
    "permuted_queries": _permuted(lambda config: config.num_attention_heads),
    "permuted_keys": _permuted(num_key_heads),
    "plus_one": _plus_one,
    "transposed": _transposed,
    "by_head": _by_head,
    "latent": _latent,
    "log_decay": _log_decay,
    "flat": _flat,
    "convolution": _convolution,
    "tiled_heads": _tiled_heads,
    "tiled_values": _tiled_values,
    "tiled_inputs": _tiled_inputs,
    "by_key_head": _by_key_head,
}
