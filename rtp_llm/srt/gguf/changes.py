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


CHANGES: Mapping[str, Change] = {
    "permuted_queries": _permuted(lambda config: config.num_attention_heads),
    "permuted_keys": _permuted(num_key_heads),
    "plus_one": _plus_one,
    "transposed": _transposed,
    "by_head": _by_head,
    "latent": _latent,
}
