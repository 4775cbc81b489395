"""Draws whose parameters lie on the device, so that a recorded step draws for whichever rows it is repeated.

``sampler.draw`` takes parameters of the host. Both draw the same tokens.
"""

from collections.abc import Mapping

import torch

from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker.philox import exponential

DRAWN_AT_ONCE = 16  # rows; a draw keeps a few dozen float64 copies of its logits


class DrawTable:
    """What rows draw by: a line for each row of the worker.

    ``numbers`` are [rows, 3] float64: temperature, top_p (infinite: all tokens), min_p. ``counts`` are [rows, 3] int64:
    top_k (the vocabulary's size: all tokens), the seed, and 1 for rows that draw, 0 for greedy ones.
    """

    def __init__(self, num_rows: int, vocab_size: int, provider: DeviceProvider) -> None:
        self._vocab_size, self._provider = vocab_size, provider
        device = provider.torch_device
        self.numbers = torch.tensor([1.0, torch.inf, 0.0], dtype=torch.float64).repeat(num_rows, 1).to(device)
        self.counts = torch.tensor([vocab_size, 0, 0]).repeat(num_rows, 1).to(device)
        self._draw = provider.find("draw_rows", torch.float32) or draw_rows

    def write(self, rows: Mapping[int, tuple[SamplingParams, int]]) -> None:
        """Set rows' parameters and seeds (as int64)."""
        if not rows:
            return
        numbers, counts = [], []
        for params, seed in rows.values():
            temperature = 1.0 if params.is_greedy else params.temperature
            numbers.append([temperature, params.top_p if params.top_p < 1 else torch.inf, params.min_p])
            top_k = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
            counts.append([top_k, seed, int(not params.is_greedy)])
        places = self._provider.to_device(list(rows), torch.int64)
        self.numbers[places] = self._provider.to_device(numbers, torch.float64)
        self.counts[places] = self._provider.to_device(counts, torch.int64)

    def draw(self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return a token for each line of logits [S, vocab_size]; those of greedy rows mean nothing.

        Args:
            rows, positions: [S] int64: each line's row, and the index in its sequence of the token that is drawn.
        """
        temperature, top_p, min_p = self.numbers[rows].unbind(1)
        top_k, seeds, _ = self.counts[rows].unbind(1)
        return self._draw(logits, temperature, top_k, top_p, min_p, seeds, positions)

    def draws(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [S] bool: which of these rows [S] are not greedy."""
        return self.counts[rows, 2] > 0


def draw_rows(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Draw one token per row; see ``sampler.draw``, and ``sampler.kept_weights`` for what is dropped.

    Args:
        logits: [S, vocab_size] float32; each row has a finite maximum, or its token means nothing.
        temperature, top_p, min_p: [S] float64; top_p infinite: all tokens.
        top_k, seeds, positions: [S] int64; top_k the vocabulary's size: all tokens.

    Returns:
        [S] int64.
    """
    columns = (logits, temperature, top_k, top_p, min_p, seeds, positions)
    pieces = zip(*(column.split(DRAWN_AT_ONCE) for column in columns), strict=True)
    return torch.cat([_draw_piece(*piece) for piece in pieces])


def _draw_piece(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    weights = logits.double().sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature[:, None]).exp_()
    weights = _cut(weights, top_k[:, None], top_p[:, None])
    weights = weights.masked_fill(weights < min_p[:, None], 0)
    return (exponential(seeds, positions, logits.shape[-1]) / weights).argmin(dim=-1)


def _cut(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Apply top_k and top_p, [rows, 1] each, to weights [rows, vocab_size].

    All weights above a cutoff are kept, and of those that equal it as many as top_p needs, the lowest ids first.
    """
    largest = weights.sort(dim=-1, descending=True).values
    weights = weights.masked_fill(weights < largest.gather(1, top_k - 1), 0)
    ranks = torch.arange(largest.shape[1], device=largest.device)
    largest = largest.masked_fill(ranks >= top_k, 0)
    total = weights.cumsum(dim=-1)[:, -1:]  # a sum whose rounding does not depend on the number of rows
    before = (largest.cumsum(dim=-1) - largest) / total
    num_kept = ((before < top_p) & (largest > 0)).sum(dim=-1, keepdim=True).clamp_(min=1)
    cutoff = largest.gather(1, num_kept - 1)
    first_equal = (largest > cutoff).sum(dim=-1, keepdim=True)
    num_equal = ((top_p - before.gather(1, first_equal)) * total / cutoff).ceil().clamp_(min=1)
    equal = weights == cutoff
    keep = (weights > cutoff) | (equal & (equal.cumsum(dim=-1) <= num_equal))
    return weights.masked_fill(~keep, 0)
