"""Causes of different attention outputs, found by computing attention again with the reference's tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from typing import Any

import torch

from rtp_llm.srt.kernels import reference
from rtp_llm.tools.verify.locate import relative_error
from rtp_llm.tools.verify.number_names import scaling_name
from rtp_llm.tools.verify.trace import ATTENDED, KEYS, QUERIES, UNROTATED, VALUES, AttentionCall, Place, Trace

MAX_CHANGES = 2
MIN_DISTANCE = 3  # tokens from which slopes are seen
CAUSAL, THEIRS, SLOPES, AHEAD = "causal", "theirs", "slopes", "ahead"


@dataclass(frozen=True)
class Attending:
    """Parameters of attention.

    Args:
        is_tiled: query head h reads key head ``h % num_kv_heads``, not its group's.
        mask: what is added to the scores: nothing but the causal mask and the window, the reference's own, our slopes
            times distances, or the causal mask with the later tokens that other layers of the reference see.
        chunk: tokens of each part that sees itself alone.
    """

    scaling: float
    window: int | None
    logit_cap: float
    has_sinks: bool
    is_tiled: bool = False
    mask: str = CAUSAL
    chunk: int | None = None


class AttentionTrials:
    def __init__(self, name: str, ours: Trace, theirs: Trace, config: Any) -> None:
        self._name = name
        self._all = {
            other: (theirs.tensors[Place(other, KEYS)], theirs.tensors[Place(other, VALUES)])
            for other in theirs.calls
            if all(Place(other, part) in theirs.tensors for part in (KEYS, VALUES))
        }
        self._states = [theirs.tensors[Place(name, part)] for part in (QUERIES, KEYS, VALUES)]
        self._first = theirs.first_position(Place(name, QUERIES))
        self._starts = ours.starts
        self._cached = {
            other: (ours.tensors[Place(other, KEYS)], ours.tensors[Place(other, VALUES)])
            for other in self._all
            if all(Place(other, part) in ours.tensors for part in (KEYS, VALUES))
        }
        self._unrotated = ours.tensors.get(Place(name, UNROTATED[KEYS]))
        self._ours, self._theirs = ours.tensors[Place(name, ATTENDED)], theirs.tensors[Place(name, ATTENDED)]
        self._call, self._own_call, self._config = theirs.calls[name], ours.calls[name], config
        self._ahead = next((seen for call in theirs.calls.values() if (seen := _seen_ahead(call)) is not None), None)

    def explain(self, tolerance: float) -> str | None:
        """Return why our attention's output is not the reference's; None: no trial explains it."""
        right = _of(self._call)
        if not self._is(right, self._theirs, tolerance):
            return None
        found = next((trial for trial in self._trials(right) if self._is(trial, self._ours, tolerance)), None)
        if found is None:
            return self._of_another_layer(right, tolerance) or self._of_the_cache(right, tolerance)
        if found.mask == SLOPES and (slopes := _slopes_of(self._call.bias)) is not None:
            return f"slopes of the bias by distance: ours {_few(self._own_call.slopes)}, the reference's {_few(slopes)}"
        changes = [
            _change(field.name, getattr(found, field.name), getattr(right, field.name))
            for field in fields(found)
            if getattr(found, field.name) != getattr(right, field.name)
        ]
        if found.scaling != right.scaling:
            head_dim = self._states[0].shape[-1] // self._call.num_heads
            mine, yours = (scaling_name(value, head_dim, self._config) for value in (found.scaling, right.scaling))
            changes[0] += f" (ours is {mine}, the reference's {yours})" if mine and yours else ""
        return "; ".join(changes)

    def _of_another_layer(self, right: Attending, tolerance: float) -> str | None:
        """Try keys and values, or one of them, of the reference's other layers, as layers that share them may do."""
        for other in self._all:
            keys, values = self._all[other]
            if any(x.shape != own.shape for x, own in zip((keys, values), self._states[1:], strict=True)):
                continue
            for text, k, v in (
                ("keys and values", keys, values),
                ("keys", keys, self._states[2]),
                ("values", self._states[1], values),
            ):
                if relative_error(self._attend(right, (self._states[0], k, v)), self._ours) <= tolerance:
                    of = next((n for n in self._all if torch.equal(self._all[n][0], self._states[1])), self._name)
                    return f"{text} are those of {other}, in the reference those of {of}"
        return None

    def _of_the_cache(self, right: Attending, tolerance: float) -> str | None:
        """Try what is read of earlier pieces of the prompt: nothing, or keys and values of another layer."""
        if right.mask != CAUSAL or len(self._starts) < 2:
            return None
        q, keys, values = self._states
        nothing = "tokens of a later piece see their own piece alone: what earlier pieces have in the cache is not read"
        trials: list[tuple[str, torch.Tensor | None, torch.Tensor | None]] = [(nothing, None, None)]
        trials += [
            (f"of earlier pieces it reads keys and values of {name}: the cache of another layer (layer_id)", k, v)
            for name, (k, v) in self._cached.items()
            if name != self._name and k.shape == keys.shape and v.shape == values.shape
        ]
        if self._unrotated is not None and self._unrotated.shape == keys.shape:
            trials.append(("keys of earlier pieces are not rotated in the cache", self._unrotated, values))
        for text, old_keys, old_values in trials:
            outputs = []
            for start, end in zip(self._starts, [*self._starts[1:], len(keys)], strict=True):
                begin = max(start, self._first)
                if begin >= end:
                    continue
                own = (q[begin - self._first : end - self._first], keys[start:end], values[start:end])
                if old_keys is None or old_values is None:
                    outputs.append(self._attend(right, own, begin - start))
                else:
                    states = (own[0], torch.cat([old_keys[:start], own[1]]), torch.cat([old_values[:start], own[2]]))
                    outputs.append(self._attend(right, states, begin))
            if relative_error(torch.cat(outputs), self._ours) <= tolerance:
                return text
        return None

    def _trials(self, right: Attending) -> Iterator[Attending]:
        """Yield one change of the reference's parameters, then two; our layer's own parameters come first."""
        own, window, head_dim = _of(self._own_call), right.window, self._states[0].shape[-1] // self._call.num_heads
        windows = [own.window, None] + ([] if window is None else [window - 1, window + 1])
        chunks = [own.chunk, None] + ([] if right.chunk is None else [right.chunk - 1, right.chunk + 1])
        other: dict[str, list[Any]] = {
            "scaling": [own.scaling, head_dim**-0.5, 1 / head_dim, 1.0, *self._by_hidden_size()],
            "window": windows,
            "logit_cap": [own.logit_cap, 0.0],
            "has_sinks": [own.has_sinks, False],
            "is_tiled": [True],
            "mask": [mask for mask in self._masks() if mask != right.mask],
            "chunk": chunks,
        }
        for num_changes in range(1, MAX_CHANGES + 1):
            for names in combinations(other, num_changes):
                for values in product(*(other[name] for name in names)):
                    yield replace(right, **dict(zip(names, values, strict=True)))

    def _by_hidden_size(self) -> list[float]:
        size = getattr(self._config, "hidden_size", None)
        return [size**-0.5] if isinstance(size, int) and size > 0 else []

    def _masks(self) -> list[str]:
        return [
            CAUSAL,
            *([THEIRS] if self._call.bias is not None else []),
            *([SLOPES] if self._own_call.slopes is not None else []),
            *([AHEAD] if self._ahead is not None else []),
        ]

    def _is(self, trial: Attending, expected: torch.Tensor, tolerance: float) -> bool:
        return relative_error(self._attend(trial), expected) <= tolerance

    def _attend(
        self, trial: Attending, states: Sequence[torch.Tensor] | None = None, first: int | None = None
    ) -> torch.Tensor:
        """``first``: the place of the first query among the keys; None: that of the first that is recorded."""
        first = self._first if first is None else first
        q, k, v = (
            tensor.unflatten(-1, (heads, -1))
            for tensor, heads in zip(
                states or self._states, (self._call.num_heads, *[self._call.num_kv_heads] * 2), strict=True
            )
        )
        if trial.is_tiled:
            k, v = (x.repeat(1, self._call.num_heads // self._call.num_kv_heads, 1) for x in (k, v))
        sinks = self._call.sinks if trial.has_sinks else None
        if trial.mask == THEIRS and self._call.bias is not None:
            return _attend_biased(q, k, v, trial, self._call.bias[:, self._first :], sinks).flatten(1)
        if trial.mask == AHEAD and self._ahead is not None:
            bias = _bias_of(self._ahead, trial.window)
            return _attend_biased(q, k, v, trial, bias[:, self._first :], sinks).flatten(1)
        slopes = self._own_call.slopes if trial.mask == SLOPES else None
        return reference.attention(
            *(q, k, v, trial.scaling, first, trial.window, trial.logit_cap, sinks),
            alibi_slopes=slopes,
            chunk=trial.chunk,
        ).flatten(1)


def _attend_biased(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, trial: Attending, bias: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention of [n, heads, d] to [tokens, kv heads, d] with a bias [1 or heads, n, tokens]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * trial.scaling
    if trial.logit_cap:
        scores = trial.logit_cap * (scores / trial.logit_cap).tanh()
    scores = scores + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    return torch.einsum("hts,shd->thd", scores.softmax(-1)[..., : len(k)], v)


def _seen_ahead(call: AttentionCall) -> torch.Tensor | None:
    """Return which later tokens a layer sees, [tokens, tokens] bool; None: none."""
    seen = None if call.bias is None else call.bias[0].isfinite().triu(1)
    return seen if seen is not None and bool(seen.any()) else None


def _bias_of(ahead: torch.Tensor, window: int | None) -> torch.Tensor:
    """[1, tokens, tokens]: zero where a token sees another, these later ones among them, else minus infinity."""
    visible = torch.ones_like(ahead).tril() | ahead
    visible = visible if window is None else visible.triu(1 - window)
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[None]


def _slopes_of(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Return by how much a key that is one token farther scores less, of each head; None: it is not so."""
    if bias is None or bias.shape[-1] < MIN_DISTANCE or not bool(bias[:, -1].isfinite().all()):
        return None
    steps = bias[:, -1].diff(dim=-1)
    return steps[:, 0] if torch.allclose(steps, steps[:, :1].expand_as(steps), rtol=1e-2, atol=1e-6) else None


def _few(slopes: torch.Tensor | None) -> str:
    values = [] if slopes is None else slopes[:4].tolist()
    return ", ".join(f"{value:.4g}" for value in values) + ", ..."


def _of(call: AttentionCall) -> Attending:
    mask = CAUSAL if call.bias is None else THEIRS
    return Attending(call.scaling, call.window, call.logit_cap, call.sinks is not None, mask=mask, chunk=call.chunk)


def _change(name: str, ours: Any, theirs: Any) -> str:
    match name:
        case "scaling":
            return f"attention scaling: ours {ours:.6g}, the reference's {theirs:.6g}"
        case "window":
            off = "" if None in (ours, theirs) or abs(ours - theirs) != 1 else " (off by one)"
            return f"attention window, own token included: ours {_window(ours)}, the reference's {_window(theirs)}{off}"
        case "chunk":
            return f"chunks that see themselves alone: ours {_window(ours)}, the reference's {_window(theirs)}"
        case "logit_cap":
            return f"soft cap of the scores: ours {ours or 'none'}, the reference's {theirs or 'none'}"
        case "has_sinks":
            return "attention sinks: " + ("ours has them, the reference not" if ours else "missing in ours")
        case "mask":
            return f"what a token sees: ours {_MASKS[ours]}, the reference {_MASKS[theirs]}"
        case _:
            return "key/value heads are repeated in another order: query head h reads head h % num_kv_heads"


_MASKS = {
    CAUSAL: "only what lies before it",
    THEIRS: "by its own mask (later tokens too, such as an image's, or a bias by distance)",
    SLOPES: "what lies before it, less by distance (ALiBi)",
    AHEAD: "later tokens too, such as an image's, as in other layers",
}


def _window(window: int | None) -> str:
    return "none" if window is None else f"{window} tokens"
