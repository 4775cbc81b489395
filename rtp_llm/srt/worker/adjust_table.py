"""Penalties, biases and bans whose parameters lie on the device, so that a recorded step applies them to any rows.

``Sampler._adjust`` takes those of the host. Both change logits in the same order and to the same numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker.token_bans import always_allowed, words_of_several

MOST_BIASES, MOST_STOPS, MOST_WORDS, MOST_LENGTH = 1024, 64, 256, 8  # of a row; LENGTH: of a word's beginning
IN_PROMPT = 1 << 30  # added to the count of a token of the prompt
ANY, NOTHING = -1, -2  # in a word's beginning; before the first token
COUNTED, BIASES, STOPS, WORDS, FIRST_END = range(5)  # columns of ``sizes``
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What changes the logits of one row. ``first_end``: index in its sequence of the first token that may end it."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    stop_ids: Sequence[int]
    first_end: int

    def fits(self) -> bool:
        """Whether a line of the table has room for it."""
        words = words_of_several(self.params)
        return (
            len(self.params.logit_bias) <= MOST_BIASES
            and len(self.stop_ids) <= MOST_STOPS
            and len(words) <= MOST_WORDS
            and all(len(word) <= MOST_LENGTH + 1 for word in words)
        )

    @property
    def is_counted(self) -> bool:
        params = self.params
        return bool(params.frequency_penalty or params.presence_penalty) or params.repetition_penalty != 1.0


class AdjustTable:
    """What changes the logits of rows: a line for each row of the worker, in all tensors.

    Attributes:
        penalties: [rows, 3] float32: frequency, presence, repetition.
        counts: [rows, vocab_size] int32: how often a token was generated, and IN_PROMPT if the prompt has it.
        allowed: [rows, ceil(vocab_size / 32)] int32: tokens that are not banned at every position, as TokenMasks.words.
        bias_ids: [rows, MOST_BIASES] int64; bias_values: float32; stop_ids: [rows, MOST_STOPS] int64.
        beginnings: [rows, MOST_WORDS, MOST_LENGTH] int64: all but the last token of bad words, ANY before shorter ones;
            ends: [rows, MOST_WORDS] int64: their last tokens.
        last_tokens: [rows, MOST_LENGTH] int64: the newest that were generated, NOTHING before the first.
        sizes: [rows, 5] int64: 1 for rows whose tokens are counted, numbers of biases, of stop ids and of words, and
            the index in its sequence of the first token that may be a stop id.
    """

    def __init__(self, num_rows: int, vocab_size: int, provider: DeviceProvider) -> None:
        self._vocab_size, self._provider, device = vocab_size, provider, provider.torch_device
        num_words = (vocab_size + 31) // 32
        self.penalties = torch.tensor([0.0, 0.0, 1.0]).repeat(num_rows, 1).to(device)
        self.counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)
        self.allowed = torch.full((num_rows, num_words), -1, dtype=torch.int32, device=device)
        self.bias_ids = torch.zeros(num_rows, MOST_BIASES, dtype=torch.int64, device=device)
        self.bias_values = torch.zeros(num_rows, MOST_BIASES, dtype=torch.float32, device=device)
        self.stop_ids = torch.zeros(num_rows, MOST_STOPS, dtype=torch.int64, device=device)
        self.beginnings = torch.full((num_rows, MOST_WORDS, MOST_LENGTH), ANY, dtype=torch.int64, device=device)
        self.ends = torch.zeros(num_rows, MOST_WORDS, dtype=torch.int64, device=device)
        self.last_tokens = torch.full((num_rows, MOST_LENGTH), NOTHING, dtype=torch.int64, device=device)
        self.sizes = torch.zeros(num_rows, 5, dtype=torch.int64, device=device)
        self._adjust = provider.find("adjust_rows", torch.float32) or adjust_rows
        self._count = provider.find("count_rows", torch.float32) or count_rows

    def write(self, rows: Mapping[int, Adjustment | None]) -> None:
        """Set rows' lines; None: nothing changes the row's logits."""
        if not rows:
            return
        places, given = self._ids(rows), list(rows.values())
        self.penalties[places] = self._provider.to_device([_penalties(each) for each in given], torch.float32)
        self.sizes[places] = self._ids(_sizes(each) for each in given)
        for row, each in rows.items():
            if each is not None:
                self._write_lists(row, each)

    def _write_lists(self, row: int, given: Adjustment) -> None:
        params, to_device = given.params, self._provider.to_device
        if given.is_counted:
            counts = self.counts[row]
            counts.zero_()
            inside = [i for i in given.prompt_ids if 0 <= i < self._vocab_size]  # ids that stand for media lie outside
            counts.index_fill_(0, self._ids(inside), IN_PROMPT)
            outputs = self._ids(given.output_ids)
            counts.index_put_((outputs,), torch.ones_like(outputs, dtype=torch.int32), accumulate=True)
        if num := len(params.logit_bias):
            # a larger value than float32 has would make NaN of a logit that is -inf
            values = [min(max(value, -LARGEST), LARGEST) for value in params.logit_bias.values()]
            self.bias_ids[row, :num] = self._ids(params.logit_bias)
            self.bias_values[row, :num] = to_device(values, torch.float32)
        if given.stop_ids:
            self.stop_ids[row, : len(given.stop_ids)] = self._ids(given.stop_ids)
        self._provider.copy_to_device(self.allowed[row], always_allowed(params, self._vocab_size))
        if words := words_of_several(params):
            beginnings = [[ANY] * (MOST_LENGTH + 1 - len(word)) + word[:-1] for word in words]
            self.beginnings[row, : len(words)] = to_device(beginnings, torch.int64)
            self.ends[row, : len(words)] = self._ids(word[-1] for word in words)
            newest = list(given.output_ids[-MOST_LENGTH:])
            self.last_tokens[row] = self._ids([NOTHING] * (MOST_LENGTH - len(newest)) + newest)

    def _ids(self, values: Iterable) -> torch.Tensor:
        return self._provider.to_device(list(values), torch.int64)

    def adjust(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        mask_lines: torch.Tensor | None = None,
        words: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``adjust_rows``."""
        return self._adjust(logits, rows, positions, self, mask_lines, words)

    def count(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """See ``count_rows``."""
        self._count(rows, tokens, self)


def _penalties(given: Adjustment | None) -> list[float]:
    if given is None:
        return [0.0, 0.0, 1.0]
    return [given.params.frequency_penalty, given.params.presence_penalty, given.params.repetition_penalty]


def _sizes(given: Adjustment | None) -> list[int]:
    if given is None:
        return [0] * 5
    num_words = len(words_of_several(given.params))
    return [int(given.is_counted), len(given.params.logit_bias), len(given.stop_ids), num_words, given.first_end]


def adjust_rows(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    table: AdjustTable,
    mask_lines: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return logits [S, vocab_size] float32 after penalties, masks, biases and bans, as ``Sampler.sample`` orders them.

    Args:
        rows, positions: [S] int64: each line's row, and the index in its sequence of the token that is drawn.
        mask_lines: [S] int64, the line of ``words`` that masks a row, -1: none does; words: as in TokenMasks.
    """
    table_sizes = table.sizes[rows]
    counts = torch.where(table_sizes[:, COUNTED, None] > 0, table.counts[rows], 0)
    frequency, presence, repetition = table.penalties[rows].split(1, dim=1)
    generated = counts & (IN_PROMPT - 1)
    scores = logits - generated * frequency
    scores -= (generated > 0) * presence
    scores = torch.where(counts > 0, torch.where(scores > 0, scores / repetition, scores * repetition), scores)
    scores = scores.masked_fill(~_bits(table.allowed[rows], logits.shape[1]), -torch.inf)
    if mask_lines is not None and words is not None:
        allowed = _bits(words[mask_lines.clamp(min=0)], logits.shape[1])
        scores = scores.masked_fill(~allowed & (mask_lines >= 0)[:, None], -torch.inf)
    is_bias = _below(table_sizes[:, BIASES], MOST_BIASES)
    scores = scores.scatter_add(1, table.bias_ids[rows], torch.where(is_bias, table.bias_values[rows], 0.0))
    beginnings = table.beginnings[rows]
    same = ((beginnings == table.last_tokens[rows][:, None]) | (beginnings == ANY)).all(dim=2)
    scores = _without(scores, table.ends[rows], same & _below(table_sizes[:, WORDS], MOST_WORDS))
    scores = scores.clamp(max=LARGEST)
    too_early = (positions < table_sizes[:, FIRST_END])[:, None]
    return _without(scores, table.stop_ids[rows], too_early & _below(table_sizes[:, STOPS], MOST_STOPS))


def _bits(words: torch.Tensor, num: int) -> torch.Tensor:
    """[S, words] int32 -> [S, num] bool."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(1)[:, :num].bool()


def _below(nums: torch.Tensor, most: int) -> torch.Tensor:
    """[S] -> [S, most] bool: the first ``nums`` of each."""
    return torch.arange(most, device=nums.device) < nums[:, None]


def _without(scores: torch.Tensor, ids: torch.Tensor, banned: torch.Tensor) -> torch.Tensor:
    """Set the ids that are banned ([S, n] both) to -inf, except in rows that would have no other value left."""
    times = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device).scatter_add(1, ids, banned.int())
    left = scores.masked_fill(times > 0, -torch.inf)
    return torch.where(left.amax(dim=1, keepdim=True) == -torch.inf, scores, left)


def count_rows(rows: torch.Tensor, tokens: torch.Tensor, table: AdjustTable) -> None:
    """Note that ``tokens[i]`` was generated in ``rows[i]``, both [S] int64. Only the row of dummies is there twice."""
    counted = table.sizes[rows, COUNTED].int()
    table.counts.index_put_((rows, tokens), counted, accumulate=True)
    table.last_tokens[rows] = torch.cat([table.last_tokens[rows][:, 1:], tokens[:, None]], dim=1)
