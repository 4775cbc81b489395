"""The check after loading: logits of two sequences, computed plainly and in pieces through our cache, are compared."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from rtp_llm.srt.attention.torch import TorchAttention
from rtp_llm.srt.forward_batch import ForwardBatch, ForwardMode, StateWave
from rtp_llm.srt.kv_pool import KVPool
from rtp_llm.srt.layers.fallback.masks import UnservableModelError
from rtp_llm.srt.state_pool import StatePool

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Lengths of the two sequences, and the ends of the pieces that they are computed in.
CHECKED_LENS = (12, 9)
CHECKED_PIECES = ((5, 3), (10, 6), (11, 8), (12, 9))
# Relative difference of a token's logits that is more than rounding. In 16 bits, near ties of a router may go either
# way, which changes a few tokens much: there it holds for the median of each piece.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def check_sequences(config: "PretrainedConfig", device: torch.device) -> list[torch.Tensor]:
    """Return two sequences of random ids, none of them special."""
    text_config = config.get_text_config()
    special = {getattr(text_config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")}
    ids = [i for i in range(min(text_config.vocab_size, 4096)) if i not in special]
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(len(ids), (sum(CHECKED_LENS),), generator=generator, device="cpu")
    return list(torch.tensor(ids, device="cpu")[drawn].to(device).split(CHECKED_LENS))


def check_batch(
    sequences: list[torch.Tensor],
    starts: tuple[int, ...],
    ends: tuple[int, ...],
    pool: KVPool,
    attention: TorchAttention,
    state_pool: StatePool | None = None,
) -> ForwardBatch:
    """Make a batch of tokens [start, end) of each sequence; their slots follow one another, from page 1 on.

    Sequence i has the states of slot i + 1.
    """
    device = sequences[0].device

    def tensor(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    firsts = [1 + sum(CHECKED_LENS[:i]) for i in range(len(sequences))]
    table = torch.stack([first + torch.arange(max(CHECKED_LENS), device=device) for first in firsts]).int()
    positions = [torch.arange(start, end, device=device) for start, end in zip(starts, ends, strict=True)]
    slots = torch.cat([row[of_row].long() for row, of_row in zip(table, positions, strict=True)])
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(sequences),
        input_ids=torch.cat([ids[start:end] for ids, start, end in zip(sequences, starts, ends, strict=True)]),
        positions=torch.cat(positions),
        req_pool_indices=tensor(range(len(sequences))),
        seq_lens=tensor(ends),
        extend_prefix_lens=tensor(starts),
        extend_seq_lens=tensor(counts),
        extend_start_loc=tensor(sum(counts[:i]) for i in range(len(counts))),
        seq_lens_cpu=list(ends),
        extend_prefix_lens_cpu=list(starts),
        extend_seq_lens_cpu=counts,
        prompt_lens_cpu=[len(ids) for ids in sequences],
        page_tables=[table] * len(pool.groups),
        out_cache_locs=[slots] * len(pool.groups),
        kv_pool=pool,
        attn_backend=attention,
        sample_rows=tensor([]),
        state_pool=state_pool,
        state_waves=[] if state_pool is None else [_wave(starts, counts, device)],
    )


def _wave(starts: Sequence[int], counts: Sequence[int], device: torch.device) -> StateWave:
    store = range(1, len(starts) + 1)
    load = [slot if start else 0 for slot, start in zip(store, starts, strict=True)]
    bounds = [0, *accumulate(counts)]
    tensors = [torch.tensor(values, device=device) for values in (load, [*store], bounds)]
    return StateWave(tensors[0], tensors[1], tensors[2], bounds)


def compare(expected: list[torch.Tensor], ours: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Raise UnservableModelError if logits [tokens, vocab_size] of the sequences differ by more than rounding."""
    worst = 0.0
    for index, (theirs, mine) in enumerate(zip(expected, ours, strict=True)):
        for piece in errors(mine, theirs[:, : mine.shape[1]]).split(
            [end - start for start, end in piece_bounds(index)]
        ):
            error = piece.max() if dtype == torch.float32 else piece.median()
            worst = max(worst, float(error.nan_to_num(torch.inf)))
    if not worst <= TOLERANCE[dtype]:
        raise UnservableModelError(
            f"its logits for sequences computed together, in pieces and through the cache differ by {worst:.2g} of "
            "their size from those that it computes by itself: something in it besides attention depends on other "
            "tokens of a step or on their number (a convolution, a recurrence, positions that it counts by itself), or "
            "its attention does more than it tells"
        )


def errors(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[tokens]: distance of logits [tokens, vocab_size] from the expected ones, relative to the spread of these."""
    return (logits - expected).norm(dim=-1) / (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)


def piece_bounds(index: int) -> list[tuple[int, int]]:
    ends = [piece[index] for piece in CHECKED_PIECES]
    return list(zip([0, *ends], ends, strict=False))
