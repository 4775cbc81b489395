"""Attention of a model that transformers runs: its calls are recorded once, then computed by our layers, in order."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.fallback.masks import UnservableModelError, examine, mask_of
from rtp_llm.srt.layers.radix_attention import RadixAttention

SERVING = "rtp_llm"  # name of our attention function; transformers makes no mask for it
PROBING = "rtp_llm_probe"  # the same function, but the mask of each layer is made and examined


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of attention in a forward pass. ``shared_with``: number of an earlier call with the same keys."""

    module: nn.Module
    num_heads: int
    head_dim: int
    num_kv_heads: int
    v_head_dim: int
    scaling: float
    logit_cap: float
    window: int | None
    shared_with: int | None


class Probe:
    """Records the calls of attention, and computes them so that the pass can go on."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.calls: list[AttentionCall] = []
        self._callers: dict[tuple[Any, ...], int] = {}  # keys and values -> number of the first call with them
        self._kept: list[torch.Tensor] = []  # so that no later tensor gets the address of one of them

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: Any,
        options: dict[str, Any],
    ) -> torch.Tensor:
        where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
        self._check_shapes(where, query, key, value)
        _check_options(where, options)
        if scaling is not None and not isinstance(scaling, (int, float)):
            raise UnservableModelError(f"{where}: its scores are scaled by a {type(scaling).__name__}, not by a number")
        window = mask_of(where, attention_mask).window
        handed = key.data_ptr(), value.data_ptr(), key.shape, value.shape, window
        self.calls.append(
            AttentionCall(
                module,
                num_heads=query.shape[1],
                head_dim=query.shape[3],
                num_kv_heads=key.shape[1],
                v_head_dim=value.shape[3],
                scaling=query.shape[3] ** -0.5 if scaling is None else float(scaling),
                logit_cap=float(options.get("softcap") or 0.0),
                window=window,
                shared_with=self._callers.get(handed),
            )
        )
        self._callers.setdefault(handed, len(self.calls) - 1)
        self._kept += [key, value]
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)

    def _check_shapes(self, where: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        for name, tensor in (("queries", query), ("keys", key), ("values", value)):
            if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != self.num_tokens:
                raise UnservableModelError(
                    f"{where}: its {name} are of shape {list(tensor.shape)}, not [1, heads, {self.num_tokens}, size] "
                    f"for {self.num_tokens} tokens: it does not attend over the tokens themselves"
                )
        if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
            raise UnservableModelError(
                f"{where}: {query.shape[1]} heads of queries of size {query.shape[3]}, {key.shape[1]} of keys of size "
                f"{key.shape[3]} and {value.shape[1]} of values do not fit together"
            )


# Tensors passed to attention that ours uses, or does not need because the batch has the same information.
_KNOWN_OPTIONS = {"s_aux", "position_ids", "cache_position", "logits_to_keep"}


def _check_options(where: str, options: dict[str, Any]) -> None:
    tensors = [name for name, value in options.items() if isinstance(value, torch.Tensor)]
    unknown = [name for name in tensors if name not in _KNOWN_OPTIONS]
    if unknown:
        raise UnservableModelError(f"{where}: attention is given {', '.join(unknown)}, which ours does not know")


class PagedAttention:
    """Computes the calls of attention, in the order in which the probe recorded them."""

    def __init__(self, calls: list[AttentionCall]) -> None:
        self.calls = calls
        self.layers = [_layer(call, layer_id) for call, layer_id in zip(calls, _layer_ids(calls), strict=True)]
        self._batch: ForwardBatch | None = None
        self._num_answered = 0

    @contextmanager
    def serving(self, batch: ForwardBatch) -> Iterator[None]:
        self._batch, self._num_answered = batch, 0
        try:
            yield
        finally:
            self._batch = None
        if self._num_answered != len(self.calls):
            raise RuntimeError(f"the model called attention {self._num_answered} times, not {len(self.calls)}")

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: Any,
        options: dict[str, Any],
    ) -> torch.Tensor:
        index = self._num_answered
        if self._batch is None or index >= len(self.calls) or self.calls[index].module is not module:
            raise RuntimeError(f"call {index} of attention, by {type(module).__name__}, is not the one seen at loading")
        self._num_answered += 1
        layer, is_shared = self.layers[index], self.calls[index].shared_with is not None
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        sinks = options.get("s_aux")
        out = layer(q, k, v, self._batch, save_kv_cache=not is_shared, sinks=None if sinks is None else sinks.view(-1))
        return out.view(1, -1, layer.spec.num_heads, layer.spec.v_head_dim)


def _layer(call: AttentionCall, layer_id: int) -> RadixAttention:
    return RadixAttention(
        call.num_heads,
        call.head_dim,
        call.scaling,
        call.num_kv_heads,
        layer_id,
        logit_cap=call.logit_cap,
        v_head_dim=call.v_head_dim,
        window=call.window,
    )


def _layer_ids(calls: list[AttentionCall]) -> list[int]:
    """Return layer ids in order; a call that shares the keys of another has its id."""
    ids: list[int] = []
    for call in calls:
        ids.append(len(set(ids)) if call.shared_with is None else ids[call.shared_with])
    return ids


def _attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls: q, k, v [1, heads, T, size] -> [1, T, heads, size of v]."""
    handler: Any = module.rtp_llm_attention
    return handler.attend(module, query, key, value, attention_mask, scaling, options), None


def _probing_mask(q_length: int, kv_length: int, mask_function: Any, device: Any = None, **_: Any) -> torch.Tensor:
    """Return a plain causal mask for the layers, with the result of ``examine`` for ``mask_function`` attached."""
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device).tril()
    mask.rtp_llm_mask = examine(mask_function, device)  # type: ignore[attr-defined]
    return mask


AttentionInterface.register(SERVING, _attention_function)
AttentionInterface.register(PROBING, _attention_function)
AttentionMaskInterface.register(PROBING, _probing_mask)
