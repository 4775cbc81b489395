"""Masks made by transformers: the window of tokens that they let a token see, or why we cannot serve them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

FAR = 1 << 20  # a position farther than any window


class UnservableModelError(ValueError):
    """The model cannot run with paged attention; the message says which part of it is missing here."""


@dataclass(slots=True)
class Mask:
    """A mask that lets a query see itself and the ``window - 1`` tokens before it; None: all of them."""

    window: int | None


def examine(mask_function: Any, device: Any) -> Mask | str:
    """Return the window of a mask function, or a sentence about why it has none.

    A mask function says for indices (batch, head, query, key) whether the query sees the key. It is tried for a query
    near the start and one far from it, since a window may be longer than a sequence that is cheap to compute.
    """
    if any(tensor.numel() > 1 for tensor in _captured_tensors(mask_function)):
        return "what a token sees depends on what the tokens are (those of an image, say), not on positions alone"
    near, far = (_seen_by(mask_function, query, device) for query in (1000, FAR))
    if near is None or far is None:
        return "it lets tokens see later ones (bidirectional attention), or hides tokens from themselves"
    window = int(far.sum())
    if not all(torch.equal(seen, _windowed(len(seen), window, device)) for seen in (near, far)):
        return "what a token sees is not a window of the tokens before it (chunked or blockwise attention)"
    return Mask(None if window == len(far) else window)


def _captured_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a function, or the functions that it is made of, read besides their arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _captured_tensors(item)
    else:
        for cell in getattr(value, "__closure__", None) or ():
            yield from _captured_tensors(cell.cell_contents)


def _windowed(num_keys: int, window: int, device: Any) -> torch.Tensor:
    """[num_keys] bool: True for the last ``window`` keys."""
    return torch.arange(num_keys, device=device) >= num_keys - window


def _seen_by(mask_function: Any, query: int, device: Any) -> torch.Tensor | None:
    """[query + 1] bool: the keys up to its own that a query sees; None if it sees later ones or not its own."""
    keys = torch.arange(query + 65, device=device)
    zeros = torch.zeros_like(keys)
    seen = mask_function(zeros, zeros, torch.full_like(keys, query), keys).expand(len(keys))
    return seen[: query + 1] if bool(seen[query]) and not bool(seen[query + 1 :].any()) else None


def mask_of(where: str, attention_mask: Any) -> Mask:
    """Return the Mask that a layer's attention mask was made of; a layer may have cut it, which leaves a view.

    Raises:
        UnservableModelError: the mask is not one that we can serve.
    """
    found: Any = None
    if isinstance(attention_mask, torch.Tensor):
        found = getattr(attention_mask, "rtp_llm_mask", None) or getattr(attention_mask._base, "rtp_llm_mask", None)
    if attention_mask is None:
        found = "it has no mask: it lets tokens see later ones, or attends to something else (cross-attention)"
    elif found is None:
        found = (
            "the model makes its own mask, which may hide more than later tokens, or adds a bias by position to it "
            "(ALiBi, relative positions). What transformers' create_causal_mask or create_sliding_window_causal_mask "
            "makes is known (transformers.masking_utils)"
        )
    if isinstance(found, str):
        raise UnservableModelError(f"{where}: {found}")
    return found
