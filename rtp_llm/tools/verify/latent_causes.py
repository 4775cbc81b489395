"""Causes of other scores in multi-head latent attention."""

from collections.abc import Iterator

import torch

from rtp_llm.tools.verify.evidence import Evidence, Finding
from rtp_llm.tools.verify.latent import ROTATED, products
from rtp_llm.tools.verify.locate import relative_error
from rtp_llm.tools.verify.own_rotation import own_rotation
from rtp_llm.tools.verify.rope_causes import Rotated, Rotation, RotationTrials
from rtp_llm.tools.verify.trace import KEYS, LATENT, OUTPUT, QUERIES, UNROTATED, Place


def explain_scores(evidence: Evidence, place: Place, error: float) -> Finding:
    """Explain other scores of one part. What the projections give agrees."""
    search = _explain_rotated if place.part == ROTATED else _explain_plain
    cause = search(evidence, place)
    return Finding(place.module, place.part, error, [cause] if cause else [])


def _explain_plain(evidence: Evidence, place: Place) -> str | None:
    """Try other parts of the projections' outputs."""
    ours, theirs = evidence.pair(place)
    size = evidence.ours.latent_sizes[place.module]
    q = evidence.theirs.tensors[Place(place.module, QUERIES)]
    k = evidence.theirs.tensors[Place(place.module, KEYS)]
    call = evidence.theirs.calls[place.module]
    q, k = q.unflatten(1, (call.num_heads, -1))[..., :-size], k.unflatten(1, (call.num_heads, -1))[..., :-size]
    sources = dict(_heads_of_projections(evidence, place.module, call.num_heads))
    for text, other_q, other_k in (
        *((f"queries are {text}", other, k) for text, other in _windows(sources, q.shape[-1], len(q))),
        *((f"keys are {text}", q, other) for text, other in _windows(sources, k.shape[-1], len(k))),
    ):
        result = products(other_q, other_k)
        if evidence.same(ours, result) and not evidence.same(theirs, result):
            return f"{text}, not what the reference takes: parts of a projection in another order"
    return None


def _heads_of_projections(evidence: Evidence, name: str, num_heads: int) -> Iterator[tuple[str, torch.Tensor]]:
    for place, tensor in evidence.theirs.tensors.items():
        if place.part == OUTPUT and place.module.startswith(f"{name}.") and tensor.shape[1] % num_heads == 0:
            yield place.module, tensor.unflatten(1, (num_heads, -1))


def _windows(sources: dict[str, torch.Tensor], size: int, num_rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the first and the last ``size`` components of each head of each projection."""
    for name, heads in sources.items():
        if heads.shape[-1] > size and len(heads) == num_rows:
            yield f"the first {size} components of each head of {name}", heads[..., :size]
            yield f"the last {size} components of each head of {name}", heads[..., -size:]


def _explain_rotated(evidence: Evidence, place: Place) -> str | None:
    rope = evidence.our_modules.get(evidence.ours.ropes.get(place.module, ""))
    ours, theirs = evidence.pair(place)
    unrotated = [evidence.ours.tensors.get(Place(place.module, UNROTATED[part])) for part in (QUERIES, KEYS)]
    size, num_tokens = evidence.ours.latent_sizes[place.module], evidence.theirs.num_tokens
    if rope is None or unrotated[0] is None or unrotated[1] is None:
        return _explain_own(evidence, place, size)
    first = num_tokens - len(unrotated[1])
    rotated = Rotated(unrotated[1], first, num_tokens, size)
    trials = LatentRotationTrials(evidence.config, rope, rotated, unrotated[0])
    return trials.one_sided(ours, theirs, evidence.tolerance) or trials.explain(ours, theirs, evidence.tolerance)


def _explain_own(evidence: Evidence, place: Place, size: int) -> str | None:
    """Explain rotated keys of the last ``size`` components, or queries, of code of the model file's own."""
    name, call = place.module, evidence.theirs.calls[place.module]
    for part, heads in ((KEYS, 1), (QUERIES, call.num_heads)):
        ours = evidence.ours.tensors[Place(name, LATENT[part])].unflatten(1, (heads, -1))[..., -size:]
        theirs = evidence.theirs.tensors[Place(name, part)].unflatten(1, (call.num_heads, -1))[:, :heads, -size:]
        windows = _windows(dict(_heads_of_projections(evidence, name, heads)), size, len(theirs))
        sources = [(text, heads_of.flatten(1)) for text, heads_of in windows]
        if any(evidence.same(ours.flatten(1), tensor) for _, tensor in sources):
            return f"{part} are not rotated"
        found = own_rotation(evidence, sources, (ours.flatten(1), theirs.flatten(1)), size)
        if found:
            return f"{part}: {found}"
    return None


class LatentRotationTrials(RotationTrials):
    """Trials that rotate queries and keys alike, and compare scores."""

    def __init__(self, config: object, rope: object, rotated: Rotated, queries: torch.Tensor) -> None:
        super().__init__(config, rope, rotated)  # type: ignore[arg-type]
        self._queries = queries.unflatten(1, (-1, rotated.head_dim))

    def _unrotated(self) -> torch.Tensor:
        return products(self._queries, self._keys())

    def _keys(self) -> torch.Tensor:
        return self._rotated.before.unflatten(1, (-1, self._rotated.head_dim))

    def _apply(self, rotation: Rotation) -> torch.Tensor | None:
        turned = self._turned(rotation)
        return None if turned is None else products(*turned)

    def _turned(self, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor] | None:
        keys, num = self._keys(), len(self._queries)
        padded = torch.zeros(len(keys), *self._queries.shape[1:])
        padded[len(keys) - num :] = self._queries
        turned = self._rotate(rotation, padded, keys)
        return None if turned is None else (turned[0][len(keys) - num :], turned[1])

    def _is(self, result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
        return result.shape == expected.shape and relative_error(result, expected) <= tolerance

    def one_sided(self, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> str | None:
        """Try whether ours turns only queries, or only keys."""
        for rotation in self._rotations():
            turned = self._turned(rotation)
            if turned is None or not self._is(products(*turned), theirs, tolerance):
                continue
            if self._is(products(turned[0], self._keys()), ours, tolerance):
                return "it rotates queries only, not keys"
            if self._is(products(self._queries, turned[1]), ours, tolerance):
                return "it rotates keys only, not queries"
            return None
        return None
