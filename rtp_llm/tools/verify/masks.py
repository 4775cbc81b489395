"""What the reference's mask of attention says: a window, chunks, or something else that is added to the scores."""

from typing import Any

import torch

from rtp_llm.tools.verify.attention_watch import HIDDEN


def window_of(mask: Any, num_tokens: int) -> int | None:
    """Return the number of keys that the last query sees; None: all."""
    if not isinstance(mask, torch.Tensor):
        return None
    last = mask[0, 0, -1, :num_tokens]
    seen = int((last if mask.dtype == torch.bool else last > HIDDEN).sum())
    return None if seen == num_tokens else seen


def chunk_of(mask: Any, num_tokens: int) -> int | None:
    """Return the number of tokens in each of the parts that see themselves alone; None: there are no such."""
    if not isinstance(mask, torch.Tensor) or mask.shape[-2] < num_tokens:
        return None
    seen = mask[0, 0, :num_tokens, :num_tokens].cpu()
    seen = seen if seen.dtype == torch.bool else seen > HIDDEN
    size = int(seen[:, 0].sum())  # queries that see the first token
    return size if 0 < size < num_tokens and bool((seen == _usual(num_tokens, None, size)).all()) else None


def _usual(num_tokens: int, window: int | None, chunk: int | None) -> torch.Tensor:
    """Return which keys queries see, [tokens, tokens]."""
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    if chunk is not None:
        parts = torch.arange(num_tokens) // chunk
        visible &= parts[:, None] == parts
    return visible


def bias_of(mask: Any, num_tokens: int, window: int | None, chunk: int | None) -> torch.Tensor | None:
    """Return what is added to the scores, [1 or heads, tokens, tokens]; None: it only hides later tokens, and those
    before the window or outside of the query's chunk."""
    if not isinstance(mask, torch.Tensor) or mask.shape[-2] < num_tokens:
        return None
    added = mask[0, :, :num_tokens, :num_tokens].detach().cpu()
    added = torch.zeros(added.shape).masked_fill(~added, float("-inf")) if added.dtype == torch.bool else added.float()
    visible = added > HIDDEN
    usual = _usual(num_tokens, window, chunk)
    if bool((visible == usual).all()) and not bool(added[visible].any()):
        return None
    return added.masked_fill(~visible, float("-inf"))
