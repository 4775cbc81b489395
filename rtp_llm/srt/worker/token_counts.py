"""How often tokens occur in requests that are penalised for it."""

from collections.abc import Sequence

import torch

from rtp_llm.srt.device.provider import DeviceProvider


class TokenCounts:
    """Counts of each generated token, and whether it is in the prompt, for rows that were added."""

    def __init__(self, vocab_size: int, provider: DeviceProvider) -> None:
        self._vocab_size = vocab_size
        self._provider, self._device = provider, provider.torch_device
        self._lines: dict[int, int] = {}  # row -> line of the tensors, which grow with the number of added rows
        self._free: list[int] = []
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=self._device)
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=self._device)

    def add(self, row: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        if not self._free:
            self._grow()
        line = self._lines[row] = self._free.pop()
        self._counts[line] = 0
        self._in_prompt[line] = False
        # ids that stand for media lie outside the vocabulary
        prompt = self._tensor([i for i in prompt_ids if 0 <= i < self._vocab_size])
        self._in_prompt[line].index_fill_(0, prompt, True)
        self.count([row] * len(output_ids), self._tensor(list(output_ids)))

    def remove(self, row: int) -> None:
        if row in self._lines:
            self._free.append(self._lines.pop(row))

    def count(self, rows: Sequence[int], token_ids: torch.Tensor) -> None:
        """Add one occurrence of ``token_ids[i]`` in ``rows[i]``."""
        if rows:
            lines = self._tensor([self._lines[row] for row in rows])
            ones = torch.ones(len(rows), dtype=torch.int32, device=self._device)
            self._counts.index_put_((lines, token_ids), ones, accumulate=True)

    def of(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, vocab_size]: counts of generated tokens (int32), and whether a token occurs at all (bool)."""
        lines = self._tensor([self._lines[row] for row in rows])
        counts = self._counts[lines]
        return counts, self._in_prompt[lines] | (counts > 0)

    def _grow(self) -> None:
        old = len(self._counts)
        new = max(4, 2 * old)
        self._free = list(range(new - 1, old - 1, -1))
        self._counts = torch.cat([self._counts, self._counts.new_zeros(new - old, self._vocab_size)])
        self._in_prompt = torch.cat([self._in_prompt, self._in_prompt.new_zeros(new - old, self._vocab_size)])

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return self._provider.to_device(values, torch.int64)
