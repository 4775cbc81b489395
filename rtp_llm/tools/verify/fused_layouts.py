"""The layouts in which checkpoints store queries, keys and values in one projection."""

from collections.abc import Iterator
from itertools import permutations

import torch

from rtp_llm.tools.verify.trace import KEYS, QUERIES, VALUES

_PARTS = (QUERIES, KEYS, VALUES)


def fused_parts(
    output: torch.Tensor, part: str, num_heads: int, num_kv_heads: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield how queries, keys or values may lie in a projection's output [tokens, size], and them, [tokens, heads *
    head_dim]; nothing if the output has another size than all three."""
    group, total = num_heads // num_kv_heads, num_heads + 2 * num_kv_heads
    if output.shape[1] % total:
        return
    head_dim = output.shape[1] // total
    sizes = {QUERIES: group, KEYS: 1, VALUES: 1}
    for order in permutations(_PARTS):
        named = ", ".join(name if group > 1 and name == QUERIES else _ONE[name] for name in order)
        by_head = output.unflatten(1, (num_kv_heads, group + 2, head_dim)).split([sizes[p] for p in order], dim=2)
        whose = "each key head" if group > 1 else "each head"
        yield f"head by head ({whose} has its {named} side by side)", by_head[order.index(part)].flatten(1)
        blocks = output.split([sizes[p] * num_kv_heads * head_dim for p in order], dim=1)
        yield f"in blocks (all {', all '.join(order)})", blocks[order.index(part)]
    if group == 1:
        turns = output.unflatten(1, (num_heads, head_dim, 3))
        yield "component by component (query, key and value take turns)", turns[..., _PARTS.index(part)].flatten(1)


_ONE = {QUERIES: "query", KEYS: "key", VALUES: "value"}
