"""Multi-head latent attention (DeepSeek-V2, 2024), compared in a form that both ways of computing it have.

Ours keeps latents and applies the key projection to queries; the reference makes keys and values of the latents. Their
scores are the same, so these are compared: of the part without positions, and of the rotated part.
"""

import torch

from rtp_llm.tools.verify.trace import ATTENDED, INPUT, KEYS, LATENT, QUERIES, Place, Trace

PLAIN, ROTATED = "scores of the part without positions", "scores of the rotated part"


def add_latent_scores(ours: Trace, theirs: Trace) -> None:
    """Add comparable places to both traces, for each latent attention of ours."""
    for name, call in ours.calls.items():
        latents = (Place(name, LATENT[QUERIES]), Place(name, LATENT[KEYS]))
        if name not in theirs.calls or any(place not in ours.tensors for place in latents):
            continue
        theirs.latent_sizes[name] = ours.latent_sizes[name]
        q, k = (ours.tensors[place] for place in latents)
        plain, rotated = _scores(q.unflatten(1, (call.num_heads, -1)), k[:, None], ours.latent_sizes[name])
        ours.insert_after(latents[1], {Place(name, PLAIN): plain, Place(name, ROTATED): rotated})
        theirs.insert_after(Place(name, KEYS), their_scores(theirs, name))
        attended = _projected(theirs, name)
        if attended is not None and attended in ours.tensors:
            ours.insert_before(attended, {Place(name, ATTENDED): ours.tensors[attended]})


def their_scores(trace: Trace, name: str) -> dict[Place, torch.Tensor]:
    """Return the reference's scores of a latent attention, by place; empty if it recorded none."""
    if name not in trace.calls or Place(name, QUERIES) not in trace.tensors:
        return {}
    call = trace.calls[name]
    q = trace.tensors[Place(name, QUERIES)].unflatten(1, (call.num_heads, -1))
    k = trace.tensors[Place(name, KEYS)].unflatten(1, (call.num_kv_heads, -1))
    plain, rotated = _scores(q, k, trace.latent_sizes[name])
    return {Place(name, PLAIN): plain, Place(name, ROTATED): rotated}


def _scores(q: torch.Tensor, k: torch.Tensor, rotated_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, heads, d] and [S, heads or 1, d] -> [T, heads * S] of all but the last ``rotated_size`` components, and of
    those, without a factor. Later tokens are as earlier ones: nothing is masked."""
    parts = (slice(None, -rotated_size), slice(-rotated_size, None))
    plain, rotated = (products(q[..., part], k[..., part]) for part in parts)
    return plain, rotated


def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.einsum("thd,shd->ths", q, k.expand(-1, q.shape[1], -1)).flatten(1)


def _projected(theirs: Trace, name: str) -> Place | None:
    """Return the input of the module that gets the attention's output."""
    output = theirs.tensors.get(Place(name, ATTENDED))
    for place, tensor in theirs.tensors.items():
        is_child = place.module.startswith(f"{name}.") and place.part == INPUT
        if output is not None and is_child and tensor.shape == output.shape and torch.equal(tensor, output):
            return place
    return None
