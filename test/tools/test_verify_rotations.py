"""Rotations that ``rtp-llm verify`` measures from what goes in and comes out, and the layouts of fused projections."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rtp_llm.srt.layers.rotary import get_rope
from rtp_llm.tools.verify.fused_layouts import fused_parts
from rtp_llm.tools.verify.measured_rotation import measure, measured_difference
from rtp_llm.tools.verify.trace import KEYS, QUERIES, VALUES

NUM_TOKENS, HEAD_DIM, TOLERANCE = 40, 16, 1e-4
POSITIONS = torch.arange(NUM_TOKENS)
CONFIG = SimpleNamespace(hidden_size=64)


def heads(num_heads: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(NUM_TOKENS, num_heads * HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def rotated(x: torch.Tensor, positions: torch.Tensor = POSITIONS, **options: Any) -> torch.Tensor:
    rope = get_rope(HEAD_DIM, **options)
    rope.prepare_for_forward(cast(Any, SimpleNamespace(positions=positions, mrope_positions=None)))
    return rope(positions, x, x)[0]


def last_rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last 8 components of each head."""
    flipped = x.unflatten(1, (-1, HEAD_DIM)).roll(8, dims=2).flatten(1)
    return rotated(flipped, rotary_dim=8).unflatten(1, (-1, HEAD_DIM)).roll(-8, dims=2).flatten(1)


def put_back_as_halves(x: torch.Tensor) -> torch.Tensor:
    turned = rotated(x, is_neox_style=False).unflatten(1, (-1, HEAD_DIM // 2, 2))
    return turned.transpose(2, 3).flatten(1)


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs", "cause"),
    [
        (dict(base=5e6), dict(), "rotary base: ours 5e+06, the reference's 10000"),
        (dict(base=100.0, rotary_dim=8), dict(rotary_dim=8), "exponents divided by 16 (the size of a head)"),
        (dict(is_neox_style=False), dict(), "rotary layout: ours pairs neighbours"),
        (dict(rotary_dim=8), dict(), "rotated components of a head: ours the first 8, the reference's the first 16"),
        (dict(positions=POSITIONS + 1), dict(), "positions are off by +1"),
        (dict(positions=-POSITIONS), dict(), "ours turns in the other direction"),
        (dict(base=5e8, is_neox_style=False), dict(is_neox_style=False), "rotary base: ours 5e+08, the"),
        (
            dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
            dict(),
            "frequencies, or positions, are the reference's times 0.25",
        ),
    ],
)
def test_rotations_are_told_apart(ours: dict[str, Any], theirs: dict[str, Any], cause: str, num_heads: int) -> None:
    x = heads(num_heads)
    pair = rotated(x, **ours), rotated(x, **theirs)
    right, causes = measured_difference(x, pair, HEAD_DIM, POSITIONS, TOLERANCE, CONFIG)
    assert right is not None and len(causes) == 1 and cause in causes[0], causes


def test_what_no_rotary_embedding_of_the_engine_does() -> None:
    x = heads(3)
    for ours, theirs, cause in (
        (last_rotated(x), rotated(x, rotary_dim=8), "ours the last 8, the reference's the first 8"),
        (put_back_as_halves(x), rotated(x, is_neox_style=False), "put back as halves (is_neox_style=True), though"),
        (1.2 * rotated(x), rotated(x), "factor of what is rotated: ours 1.2, the reference's 1"),
    ):
        _, causes = measured_difference(x, (ours, theirs), HEAD_DIM, POSITIONS, TOLERANCE, CONFIG)
        assert len(causes) == 1 and cause in causes[0], causes


def test_what_is_no_rotation_is_not_measured() -> None:
    x = heads(2)
    for other in (x, heads(2, seed=1), x + rotated(x), rotated(x).flip(0)):
        assert measure(x, other, HEAD_DIM, POSITIONS, TOLERANCE) is None
    assert measured_difference(x, (rotated(x), rotated(x)), HEAD_DIM, POSITIONS, TOLERANCE, CONFIG)[1] == []
    assert measure(x, rotated(x), HEAD_DIM, 2 * POSITIONS, TOLERANCE) is None  # positions are to rise by one


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_fused_projections_are_taken_apart(num_kv_heads: int) -> None:
    parts = {QUERIES: heads(4), KEYS: heads(num_kv_heads, 1), VALUES: heads(num_kv_heads, 2)}
    blocks = torch.cat([parts[name] for name in (KEYS, QUERIES, VALUES)], dim=1)
    by_head = torch.cat([x.unflatten(1, (num_kv_heads, -1)) for x in parts.values()], dim=2).flatten(1)
    for output, layout in ((blocks, "in blocks (all keys, all queries, all values)"), (by_head, "head by head (each ")):
        for name, right in parts.items():
            found = [text for text, x in fused_parts(output, name, 4, num_kv_heads) if torch.equal(x, right)]
            assert any(text.startswith(layout) for text in found), found
    assert not list(fused_parts(torch.zeros(3, 50), KEYS, 4, num_kv_heads))
