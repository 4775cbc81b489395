"""Causes of other queries and keys where the model file rotates them by code of its own, or takes them of a fused
projection in another layout."""

from collections.abc import Iterable, Iterator

import torch

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.fused_layouts import fused_parts
from rtp_llm.tools.verify.measured_rotation import measure, measured_difference
from rtp_llm.tools.verify.trace import OUTPUT, QUERIES, Place


def explain_own_rotation(evidence: Evidence, place: Place) -> str | None:
    """Return how our rotation of queries or keys is another one than the reference's, or of something else; None: it is
    no rotation."""
    return own_rotation(evidence, _unrotated(evidence, place), evidence.pair(place), head_dim_at(evidence, place))


def own_rotation(
    evidence: Evidence,
    sources: Iterable[tuple[str, torch.Tensor]],
    pair: tuple[torch.Tensor, torch.Tensor],
    head_dim: int,
) -> str | None:
    """Return how our rotation is another one than the reference's.

    Args:
        sources: what may be rotated, with names: [tokens, heads * head_dim].
        pair: ours and the reference's, of the same last tokens.
    """
    positions = positions_of(evidence)
    if positions is None:
        return None
    our_names, right_names = [], []
    for name, before in sources:
        num = min(len(before), *map(len, pair))
        given, rotated, at = before[-num:], (pair[0][-num:], pair[1][-num:]), positions[-num:]
        right, texts = measured_difference(given, rotated, head_dim, at, evidence.tolerance, evidence.config)
        if texts:
            return "; ".join(texts)
        if right is not None:
            right_names.append(name)
        elif measure(given, rotated[0], head_dim, at, evidence.tolerance) is not None:
            our_names.append(name)
    return f"it rotates {our_names[0]}; the reference {right_names[0]}" if our_names and right_names else None


def fused_sources(evidence: Evidence, place: Place) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what queries or keys may be of the reference's fused projections in an attention block, by layouts."""
    call = evidence.theirs.calls[place.module]
    size = head_dim_at(evidence, place) * (call.num_heads + 2 * call.num_kv_heads)
    for p, output in _outputs(evidence, place):
        if output.shape[1] == size:
            for text, tensor in fused_parts(output, place.part, call.num_heads, call.num_kv_heads):
                yield f"in {p.module} {text}", tensor


def _unrotated(evidence: Evidence, place: Place) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the reference may rotate: outputs of modules of the block, the last first, and parts of them."""
    width = evidence.theirs.tensors[place].shape[1]
    for p, output in _outputs(evidence, place):
        if output.shape[1] == width:
            yield str(p), output
    for text, tensor in fused_sources(evidence, place):
        yield f"{place.part} as they lie {text}", tensor


def _outputs(evidence: Evidence, place: Place) -> Iterator[tuple[Place, torch.Tensor]]:
    for p, tensor in reversed(evidence.theirs.tensors.items()):
        if p.part == OUTPUT and p.module.startswith(f"{place.module}."):
            yield p, tensor


def head_dim_at(evidence: Evidence, place: Place) -> int:
    call = evidence.theirs.calls[place.module]
    heads = call.num_heads if place.part == QUERIES else call.num_kv_heads
    return evidence.theirs.tensors[place].shape[1] // heads


def positions_of(evidence: Evidence) -> torch.Tensor | None:
    """Return [num_tokens]; None: tokens have three, which are not the same."""
    positions = evidence.theirs.positions
    if positions is None:
        return torch.arange(evidence.theirs.num_tokens)
    if positions.dim() == 1:
        return positions
    return positions[0] if bool((positions == positions[:1]).all()) else None
