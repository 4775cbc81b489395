"""How ``rtp-llm verify`` tells poolings of a tower's rows apart, and steps from one of the reference's tensors on."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.pooling_causes import explain_pooling
from rtp_llm.tools.verify.step_causes import step_between
from rtp_llm.tools.verify.trace import INPUT, OUTPUT, Parts, Place, Trace, VisionCall

PARTS = Parts("model.language_model", "model.language_model.embed_tokens", "lm_head")
TOWER, POOLED = Place("model.tower.norm", OUTPUT), Place("model.projector.norm", INPUT)
Pool = Callable[[torch.Tensor], torch.Tensor]  # of [images, columns, height, width]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def evidence_of(ours: dict[Place, torch.Tensor], theirs: dict[Place, torch.Tensor]) -> Evidence:
    traces = []
    for tensors in (ours, theirs):
        trace = Trace(8, parts=PARTS)
        trace.tensors = tensors
        traces.append(trace)
    return Evidence(nn.Module(), nn.Module(), nn.Module(), *traces, 1e-4, {}, cast(Any, None))


def pooled(ours: Pool, theirs: Pool, grid: tuple[int, int] = (6, 4), images: int = 2) -> str | None:
    given = noise(images, 24, *grid)
    rows = given.flatten(2).transpose(1, 2).flatten(0, 1)
    sides = [{TOWER: rows, POOLED: pool(given).flatten(2).transpose(1, 2).flatten(0, 1)} for pool in (ours, theirs)]
    evidence = evidence_of(*sides)
    lengths = (grid[0] * grid[1],) * images
    evidence.theirs.add_vision_call("model.tower", VisionCall(1, 1.0, lengths, None))
    return explain_pooling(evidence, POOLED)


def mean(grids: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(grids, 2)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (lambda x: F.max_pool2d(x, 2), mean, "the maximum over windows of 2 x 2 in a grid of 6 x 4"),
        (mean, lambda x: F.max_pool2d(x, 2), "the mean over windows of 2 x 2 in a grid of 6 x 4"),
        (lambda x: 4 * mean(x), mean, "the sum over windows of 2 x 2 in a grid of 6 x 4"),
        (mean, lambda x: 5 * mean(x), None),  # another factor is no other pooling
        (mean, mean, None),
        (lambda x: x[:, :, ::2, ::2], mean, "the first patch of windows of 2 x 2"),
        (lambda x: F.avg_pool2d(x, (1, 4)), mean, "the mean over windows of 1 x 4 in a grid of 6 x 4"),
        (
            lambda x: F.max_pool2d(x, 2).transpose(2, 3),
            mean,
            "the maximum over windows of 2 x 2 in a grid of 6 x 4, column by column",
        ),
        (lambda x: mean(x).transpose(2, 3), mean, None),  # an order of rows, which is told as such
        (lambda x: F.avg_pool2d(x, 3, 2, 1), mean, "the mean over windows of 3 x 3, 2 x 2 apart, in a grid of 6 x 4"),
        (lambda x: mean(x.reshape(x.shape[0], -1, 4, 6)), mean, "the mean over windows of 2 x 2 in a grid of 4 x 6"),
        (lambda x: F.interpolate(x, (3, 2), mode="bicubic"), mean, "a bicubic interpolation"),
        (lambda x: noise(2, 24, 3, 2, seed=1), mean, None),
    ],
)
def test_poolings_are_told_apart(ours: Pool, theirs: Pool, said: str | None) -> None:
    found = pooled(ours, theirs)
    if said is None:
        assert found is None
    else:
        assert found is not None and found.startswith(f"it is {said}"), found
        assert ", of output of model.tower.norm; the reference's is the " in found


def test_rests_of_a_grid_that_no_window_fills() -> None:
    found = pooled(lambda x: F.avg_pool2d(x, 2, ceil_mode=True), lambda x: F.adaptive_avg_pool2d(x, 3), (5, 5), 1)
    assert found is not None and found.startswith(
        "it is the mean, the rest of a row in smaller windows over 3 x 3 parts in a grid of 5 x 5"
    )
    assert found.endswith("the reference's is the mean of adaptive windows over 3 x 3 parts in a grid of 5 x 5")


LAYERS = [Place(f"model.language_model.layers.{i}", OUTPUT) for i in range(3)]
NORMS = [Place(f"model.language_model.layers.{i}.norm", part) for i in (1, 2) for part in (INPUT, OUTPUT)]
VIEW = Place("model.tower.merger", OUTPUT)


def streams(at_layer: int) -> dict[Place, torch.Tensor]:
    """A residual stream, to whose rows 2 to 4 a tower's are added behind a layer."""
    view, x = noise(3, 16, seed=5), noise(8, 16, seed=6)
    tensors = {VIEW: view}
    for i, layer in enumerate(LAYERS[:2]):
        x = x + noise(8, 16, seed=i)
        tensors[layer] = x
        x = x.clone()
        if i == at_layer:
            x[2:5] += view
        tensors |= {NORMS[2 * i]: x, NORMS[2 * i + 1]: F.normalize(x)}
    return tensors


def test_what_is_added_too_late_is_named_with_where_it_is() -> None:
    evidence = evidence_of(streams(1), streams(0))
    rows = "(to 3 of 8 rows, the first of them row 2)"
    added = f"to which the reference then adds {VIEW} {rows}; ours adds that to {LAYERS[1]}"
    assert step_between(evidence, NORMS[0], LAYERS[0]) == added


def test_steps_are_additions_or_modules() -> None:
    x, y, z = (noise(8, 16, seed=seed) for seed in (1, 2, 3))
    given, made = NORMS[:2]
    theirs = {LAYERS[0]: x, given: x + y, made: z, LAYERS[1]: y}
    evidence = evidence_of(theirs, {LAYERS[2]: y} | theirs)
    assert step_between(evidence, made, given) == f"of which {made.module} makes what the reference has here"
    assert step_between(evidence, given, made) == f"which {made.module} makes of what the reference has here"
    assert step_between(evidence, given, LAYERS[0]) == f"to which the reference then adds {LAYERS[2]}"
    assert step_between(evidence, LAYERS[1], given) == f"which is what the reference has here and {LAYERS[0]}"
    assert step_between(evidence, made, LAYERS[0]) is None
