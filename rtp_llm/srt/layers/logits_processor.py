"""From hidden states to logits, and from logits to log-probabilities."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.distributed.parallel_state import get_tp_group
from rtp_llm.srt.forward_batch import ForwardBatch, LogprobRow
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.plan import TokenLogprob

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Tokens whose prompt logits are computed at a time: 128 rows of a vocabulary of 150,000 are 77 MB in float32.
ROWS_PER_PIECE = 128


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of N tokens, and of alternatives at their positions. They stay on the device until ``read``.

    Line i has the token itself, then the best ones, then the chosen ones: ``ids`` [N, columns] int64 and ``values``
    [N, columns] float32. A line may use fewer columns than there are: ``top_nums[i]``, ``chosen_nums[i]``.
    """

    ids: torch.Tensor
    values: torch.Tensor
    top_nums: Sequence[int]
    chosen_nums: Sequence[int]

    @classmethod
    def join(cls, pieces: "Sequence[Logprobs]") -> "Logprobs":
        """Concatenate pieces of equally many columns."""
        if len(pieces) == 1:
            return pieces[0]
        return cls(
            torch.cat([piece.ids for piece in pieces]),
            torch.cat([piece.values for piece in pieces]),
            [num for piece in pieces for num in piece.top_nums],
            [num for piece in pieces for num in piece.chosen_nums],
        )

    def read(self) -> list[TokenLogprob]:
        """Return the numbers as Python objects; wait for the device if they are on one."""
        first_chosen = self.ids.shape[1] - max(self.chosen_nums, default=0)
        lines = zip(self.ids.tolist(), self.values.tolist(), self.top_nums, self.chosen_nums, strict=True)
        result = []
        for ids, values, top_num, chosen_num in lines:
            entries = list(zip(values, ids, strict=True))
            top = entries[1 : min(1 + top_num, first_chosen)]
            result.append(TokenLogprob(ids[0], values[0], top, entries[first_chosen : first_chosen + chosen_num]))
        return result


@dataclass(frozen=True, slots=True)
class LaterLogits:
    """Logits [S, vocab_size] that are not computed yet, since they would take much memory at once.

    ``hidden_states`` are [S, hidden_size]; ``logits_of`` maps some of their rows [N, hidden_size] to their logits
    [N, vocab_size], of which ``rows_at_once`` do not take too much.
    """

    hidden_states: torch.Tensor
    logits_of: Callable[[torch.Tensor], torch.Tensor]
    rows_at_once: int

    def __len__(self) -> int:
        return len(self.hidden_states)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LaterLogits":
        return LaterLogits(change(self.hidden_states), self.logits_of, self.rows_at_once)

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Compute pieces of about equal size, one after the other; give the rows of each, and its logits."""
        size = -(-len(self) // -(-len(self) // self.rows_at_once))
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, self.logits_of(self.hidden_states[rows])


class LogitsProcessorOutput:
    """The result of a model's forward.

    Args:
        next_token_logits: [S, vocab_size] float32, one row for each of ``forward_batch.sample_rows``; or how they are
            computed later.
        prompt_logprobs: parallel to ``forward_batch.prompt_logprobs``.
        hidden_states: [T, num_layers_captured * hidden_size], only where the model captures layers for a drafter.
        pooled_states: [P, hidden_size], the last hidden states of ``forward_batch.pooled_tokens``, or what a model
            makes pooled outputs of in their place; None if that is.
    """

    __slots__ = ("_logits", "hidden_states", "pooled_states", "prompt_logprobs")

    def __init__(
        self,
        next_token_logits: torch.Tensor | LaterLogits,
        prompt_logprobs: list[Logprobs],
        hidden_states: torch.Tensor | None = None,
        pooled_states: torch.Tensor | None = None,
    ) -> None:
        self._logits = next_token_logits
        self.prompt_logprobs = prompt_logprobs
        self.hidden_states = hidden_states
        self.pooled_states = pooled_states

    @classmethod
    def of_encoder(cls, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> "LogitsProcessorOutput":
        """Return the output of a model that makes hidden states [T, hidden_size] and no logits."""
        none = hidden_states.new_empty((0, 0), dtype=torch.float32)
        return cls(none, [], pooled_states=pooled_states(hidden_states, forward_batch))

    @property
    def next_token_logits(self) -> torch.Tensor:
        """[S, vocab_size] float32. They are all in memory from now on, and may be changed or replaced."""
        if isinstance(self._logits, LaterLogits):
            self._logits = self._logits.logits_of(self._logits.hidden_states)
        return self._logits

    @next_token_logits.setter
    def next_token_logits(self, logits: torch.Tensor) -> None:
        self._logits = logits

    @property
    def num_rows(self) -> int:
        """Rows of ``next_token_logits``."""
        return len(self._logits)

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Give rows of ``next_token_logits`` and their logits, a piece at a time; nothing without rows."""
        if isinstance(self._logits, LaterLogits):
            yield from self._logits.pieces()
        elif len(self._logits):
            yield slice(0, len(self._logits)), self._logits

    def first(self, num_rows: int, num_tokens: int) -> "LogitsProcessorOutput":
        """Return the output of the first rows and tokens only."""
        return self._changed(lambda of_rows: of_rows[:num_rows], lambda of_tokens: of_tokens[:num_tokens])

    def first_pooled(self, count: int) -> "LogitsProcessorOutput":
        """Return the output with the first ``count`` of its pooled states only."""
        assert self.pooled_states is not None
        return LogitsProcessorOutput(self._logits, self.prompt_logprobs, self.hidden_states, self.pooled_states[:count])

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LogitsProcessorOutput":
        """Return an output with other tensors of the same contents."""
        return self._changed(change, change)

    def _changed(
        self, of_rows: Callable[[torch.Tensor], torch.Tensor], of_tokens: Callable[[torch.Tensor], torch.Tensor]
    ) -> "LogitsProcessorOutput":
        return LogitsProcessorOutput(
            self._logits.mapped(of_rows) if isinstance(self._logits, LaterLogits) else of_rows(self._logits),
            self.prompt_logprobs,
            None if self.hidden_states is None else of_tokens(self.hidden_states),
            self.pooled_states,
        )


class LogitsProcessor(nn.Module):
    """Applies the head, only to the tokens whose logits are wanted.

    Args:
        config: ``vocab_size`` is read.
        logit_scale: a factor of the logits.
        soft_cap: c replaces each scaled logit l by ``c * tanh(l / c)``; None: the configuration's
            ``final_logit_softcapping``, if it has one.
    """

    def __init__(
        self, config: "PretrainedConfig", logit_scale: float | None = None, soft_cap: float | None = None
    ) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.logit_scale = logit_scale
        self.soft_cap: float | None = soft_cap or getattr(config, "final_logit_softcapping", None)
        self.tp_group = get_tp_group()
        self.pooled_token_ids: list[int] | None = None  # pooled outputs are made of these tokens' logits, not of states
        most_bytes = built_for().logit_bytes_at_once
        self.rows_at_once = None if most_bytes is None else max(1, most_bytes // (4 * self.vocab_size))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        hidden_states: torch.Tensor,
        lm_head: VocabParallelEmbedding,
        forward_batch: ForwardBatch,
        aux_hidden_states: Sequence[torch.Tensor] | None = None,
    ) -> LogitsProcessorOutput:
        """Compute the logits to sample from, or leave them for later if they are many, and the prompt logprobs that are
        wanted.

        Args:
            input_ids: [T]; part of the call shape that model files share, not needed here.
            hidden_states: [T, hidden_size], after the last norm.
            lm_head: the head, or the embedding if they are tied.
            aux_hidden_states: of captured layers, [T, hidden_size] each; returned side by side in ``hidden_states``.
        """
        sample_rows = forward_batch.sample_rows  # in order: if there are as many as tokens, they are all tokens
        sampled = hidden_states if len(sample_rows) == len(hidden_states) else hidden_states[sample_rows]
        if self.rows_at_once is None or len(sampled) <= self.rows_at_once:
            logits: torch.Tensor | LaterLogits = self.logits(sampled, lm_head)
        else:
            logits = LaterLogits(sampled, lambda rows: self.logits(rows, lm_head), self.rows_at_once)
        return LogitsProcessorOutput(
            next_token_logits=logits,
            prompt_logprobs=[
                prompt_logprobs(row, lambda token_rows: self.logits(hidden_states[token_rows], lm_head))
                for row in forward_batch.prompt_logprobs
            ],
            hidden_states=torch.cat(list(aux_hidden_states), dim=-1) if aux_hidden_states else None,
            pooled_states=self._pooled(hidden_states, lm_head, forward_batch),
        )

    def _pooled(
        self, hidden_states: torch.Tensor, lm_head: VocabParallelEmbedding, forward_batch: ForwardBatch
    ) -> torch.Tensor | None:
        """[P, hidden_size], or the logits [P, tokens] of ``pooled_token_ids``; None if none are wanted."""
        states, ids = pooled_states(hidden_states, forward_batch), self.pooled_token_ids
        if states is None or ids is None:
            return states
        pieces = states.split(ROWS_PER_PIECE) if len(states) else [states]
        return torch.cat([self.logits(piece, lm_head)[:, ids] for piece in pieces])

    def logits(self, hidden_states: torch.Tensor, lm_head: VocabParallelEmbedding) -> torch.Tensor:
        """[N, hidden_size] -> [N, vocab_size] float32: scale, gather over ranks, cut the padding, cast, soft cap."""
        if hidden_states.shape[0] == 0:
            return hidden_states.new_empty((0, self.vocab_size), dtype=torch.float32)
        logits = lm_head.quant_method.logits(lm_head, hidden_states, lm_head.bias)
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        logits = self.tp_group.all_gather(logits)[:, : self.vocab_size]
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits


def pooled_states(hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor | None:
    """Return the rows of [T, hidden_size] that pooled outputs are made of; None if there are none in the step."""
    tokens = forward_batch.pooled_tokens
    if tokens is None:
        return None
    return hidden_states if len(tokens) == len(hidden_states) else hidden_states[tokens]  # tokens are in order


def prompt_logprobs(row: LogprobRow, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> Logprobs:
    """Compute a row's prompt logprobs, some tokens at a time: their softmax is as large as their logits.

    Args:
        logits_of: maps some of ``row.token_rows`` [N] to their logits [N, vocab_size].
    """
    pieces = []
    for token_rows, targets in zip(
        row.token_rows.split(ROWS_PER_PIECE), row.targets.split(ROWS_PER_PIECE), strict=True
    ):
        num_rows, num_chosen = len(token_rows), len(row.token_ids)
        chosen = row.token_ids.expand(num_rows, -1)
        top_nums, chosen_nums = [row.top_num] * num_rows, [num_chosen] * num_rows
        pieces.append(token_logprobs(logits_of(token_rows), targets, top_nums, chosen, chosen_nums))
    return Logprobs.join(pieces)


def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    top_nums: Sequence[int],
    chosen: torch.Tensor | None = None,
    chosen_nums: Sequence[int] | None = None,
) -> Logprobs:
    """Compute log-probabilities of one token per row of logits, and of the best and the chosen tokens.

    Args:
        logits: [N, vocab_size], unmodified by sampling parameters; the softmax is taken in float32.
        targets: [N] int64 token ids.
        top_nums: number of the best tokens to list, per row (at most the vocabulary).
        chosen: [N, most] int64, other ids whose log-probabilities are wanted, in this order; None: none.
        chosen_nums: number of ids of its line of ``chosen`` that each row wants; at least one row wants all.
    """
    num_rows, vocab_size = logits.shape
    chosen_nums = [0] * num_rows if chosen_nums is None else chosen_nums
    num_chosen = num_rows if chosen is None else len(chosen)
    if not len(targets) == len(top_nums) == len(chosen_nums) == num_chosen == num_rows:
        raise ValueError(
            f"token_logprobs needs one target, top_num and list of chosen ids per row of logits: "
            f"{num_rows} rows, but {len(targets)}, {len(top_nums)} and {num_chosen} ({len(chosen_nums)} lengths)"
        )
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    columns = [targets[:, None]]
    max_top = min(max(top_nums, default=0), vocab_size)
    if max_top:
        columns.append(logprobs.topk(max_top, dim=-1).indices)
    if chosen is not None:
        columns.append(chosen)
    ids = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    return Logprobs(ids, logprobs.gather(1, ids), top_nums, chosen_nums)
