"""Why prompts in one step are computed otherwise than each alone."""

from collections.abc import Sequence

import torch

from rtp_llm.tools.verify.locate import relative_error
from rtp_llm.tools.verify.trace import Place, Trace


def explain_batch(place: Place, together: Trace, alone: Sequence[Trace], tolerance: float) -> str:
    """Return how the rows of prompts that are computed together differ at a place from those of each alone."""
    own, lens = together.tensors[place], [trace.num_tokens for trace in alone]
    right = [trace.tensors[place] for trace in alone]
    wrong = [
        n for n, (part, whole) in enumerate(zip(own.split(lens), right, strict=True)) if _differ(part, whole, tolerance)
    ]
    where = f"only where several prompts are computed in one step: {_which(wrong, len(lens))}. Each alone agrees. "
    positions = together.positions
    if positions is not None and positions.dim() == 1:
        expected = torch.cat([torch.arange(length) for length in lens])
        if len(positions) == len(expected) and not torch.equal(positions, expected):
            token = int((positions != expected).nonzero()[0])
            mine, yours = int(positions[token]), int(expected[token])
            return f"{where}Positions are others from the step's token {token} on: {mine}, alone {yours}"
    if wrong and wrong[0] > 0:
        return f"{where}Something reads over the end of the prompt before, as a shift, a sum or a state would"
    return f"{where}Something is computed over the tokens of all prompts, as a mean or a sum of the step would be"


def _differ(own: torch.Tensor, right: torch.Tensor, tolerance: float) -> bool:
    return relative_error(own, right) > tolerance


def _which(wrong: Sequence[int], num: int) -> str:
    if len(wrong) == num:
        return "all of them differ"
    return f"number {', '.join(str(n + 1) for n in wrong)} of {num} differs"
