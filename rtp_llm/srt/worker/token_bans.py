"""Tokens that a request must not generate: all but ``allowed_token_ids``, and those that would complete a bad word.

Everything stays on the device: a bad word of several tokens bans its last one if the tokens before it were generated
last, which is a comparison of two small tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.sampling_params import SamplingParams

ANY = -1  # in a word's beginning: matches any token, and no token
NOTHING = -2  # in a row's last tokens: before the first


@dataclass(slots=True, eq=False)
class _Bans:
    """The bans of one request.

    Args:
        always: [vocab_size] bool, the ids that are banned at every position; None: there are none.
        beginnings: [words, length] int64, all but the last token of the words of several, ANY before shorter ones.
        ends: [words] int64, their last tokens.
        last_tokens: [length] int64, the newest tokens generated, NOTHING before the first.
    """

    always: torch.Tensor | None
    beginnings: torch.Tensor
    ends: torch.Tensor
    last_tokens: torch.Tensor


def has_bans(params: SamplingParams) -> bool:
    return params.allowed_token_ids is not None or bool(params.bad_words_ids)


def words_of_several(params: SamplingParams) -> list[list[int]]:
    """Return the bad words of several tokens."""
    return [word for word in params.bad_words_ids if len(word) > 1]


def always_allowed(params: SamplingParams, vocab_size: int) -> np.ndarray:
    """[ceil(vocab_size / 32)] int32, in the form of TokenMasks: tokens that are not banned at every position."""
    bits = np.full((vocab_size + 31) // 32 * 32, params.allowed_token_ids is None)
    bits[params.allowed_token_ids or []] = True
    bits[[word[0] for word in params.bad_words_ids if len(word) == 1]] = False
    return np.packbits(bits, bitorder="little").view(np.int32)


class TokenBans:
    """The bans of all rows that have any."""

    def __init__(self, vocab_size: int, provider: DeviceProvider) -> None:
        self._vocab_size = vocab_size
        self._provider = provider
        self._rows: dict[int, _Bans] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def add(self, row: int, params: SamplingParams, output_ids: Sequence[int]) -> None:
        """Add a request's bans, if it has any. ``output_ids``: tokens that it has generated already."""
        if not has_bans(params):
            return
        several = words_of_several(params)
        length = max((len(word) - 1 for word in several), default=0)
        beginnings = [[ANY] * (length + 1 - len(word)) + word[:-1] for word in several]
        newest = list(output_ids[-length:]) if length else []
        self._rows[row] = _Bans(
            self._always(params),
            self._tensor(beginnings).reshape(len(several), length),
            self._tensor([word[-1] for word in several]),
            self._tensor([NOTHING] * (length - len(newest)) + newest),
        )

    def _always(self, params: SamplingParams) -> torch.Tensor | None:
        single = [word[0] for word in params.bad_words_ids if len(word) == 1]
        if params.allowed_token_ids is None and not single:
            return None
        banned = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._provider.torch_device)
        if params.allowed_token_ids is not None:
            banned.fill_(True)
            banned[self._tensor(params.allowed_token_ids)] = False
        banned[self._tensor(single)] = True
        return banned

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)

    def observe(self, rows: Sequence[int], token_ids: torch.Tensor) -> None:
        """Note that ``token_ids[i]`` ([S] int64) was generated in ``rows[i]``."""
        for i, row in enumerate(rows):
            bans = self._rows.get(row)
            if bans is not None and len(bans.last_tokens):
                bans.last_tokens = torch.cat([bans.last_tokens[1:], token_ids[i : i + 1]])

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        """Set the logits of banned tokens to -inf, in place. A bad word whose ban would leave no token is allowed."""
        for i, row in enumerate(rows):
            bans = self._rows.get(row)
            if bans is None:
                continue
            line = logits[i]
            if bans.always is not None:
                line.masked_fill_(bans.always, -torch.inf)
            if len(bans.ends):
                same = (bans.beginnings == bans.last_tokens) | (bans.beginnings == ANY)
                penalties = torch.where(same.all(dim=1), -torch.inf, 0.0).to(line.dtype)
                left = line.index_put((bans.ends,), penalties, accumulate=True)
                line.copy_(torch.where(left.amax() == -torch.inf, line, left))

    def _tensor(self, values: list) -> torch.Tensor:
        return self._provider.to_device(values, torch.int64)
