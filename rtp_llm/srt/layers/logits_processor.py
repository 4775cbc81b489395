"""From hidden states to logits, and from logits to log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.distributed.parallel_state import get_tp_group
from rtp_llm.srt.forward_batch import ForwardBatch, LogprobRow
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.plan import TokenLogprob

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Prompt logits are made for so many tokens at a time: 128 rows of a vocabulary of 150,000 are 77 MB in float32.
ROWS_PER_PIECE = 128


@dataclass(slots=True)
class LogitsProcessorOutput:
    """What a model's forward returns.

    ``next_token_logits``: [S, vocab_size] float32, one row for each of ``forward_batch.sample_rows``.
    ``prompt_logprobs``: parallel to ``forward_batch.prompt_logprobs``.
    ``hidden_states``: [T, num_layers_captured * hidden_size], only where the model captures layers for a drafter.
    """

    next_token_logits: torch.Tensor
    prompt_logprobs: list[list[TokenLogprob]]
    hidden_states: torch.Tensor | None = None


class LogitsProcessor(nn.Module):
    """Applies the head to the few tokens whose logits are wanted, never to all tokens of a step.

    Reads ``config.vocab_size`` and, where the configuration has it, ``config.final_logit_softcapping``.
    """

    def __init__(self, config: "PretrainedConfig", logit_scale: float | None = None) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.logit_scale = logit_scale
        self.soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.tp_group = get_tp_group()

    def forward(
        self,
        input_ids: torch.Tensor | None,
        hidden_states: torch.Tensor,
        lm_head: VocabParallelEmbedding,
        forward_batch: ForwardBatch,
        aux_hidden_states: Sequence[torch.Tensor] | None = None,
    ) -> LogitsProcessorOutput:
        """Logits to sample from, and the prompt logprobs that were asked for.

        Args:
            input_ids: [T]; part of the call shape that model files share, not needed here.
            hidden_states: [T, hidden_size], after the last norm.
            lm_head: the head, or the embedding where they are tied.
            aux_hidden_states: captured layers' [T, hidden_size] each; returned side by side in ``hidden_states``.
        """
        sample_rows = forward_batch.sample_rows  # in order: where there are as many as tokens, they are all
        sampled = hidden_states if len(sample_rows) == len(hidden_states) else hidden_states[sample_rows]
        return LogitsProcessorOutput(
            next_token_logits=self._logits(sampled, lm_head),
            prompt_logprobs=[
                self._prompt_logprobs(hidden_states, lm_head, row) for row in forward_batch.prompt_logprobs
            ],
            hidden_states=torch.cat(list(aux_hidden_states), dim=-1) if aux_hidden_states else None,
        )

    def _logits(self, hidden_states: torch.Tensor, lm_head: VocabParallelEmbedding) -> torch.Tensor:
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

    def _prompt_logprobs(
        self, hidden_states: torch.Tensor, lm_head: VocabParallelEmbedding, row: LogprobRow
    ) -> list[TokenLogprob]:
        result: list[TokenLogprob] = []
        for start in range(0, len(row.token_rows), ROWS_PER_PIECE):
            token_rows = row.token_rows[start : start + ROWS_PER_PIECE]
            targets = row.targets[start : start + ROWS_PER_PIECE]
            logits = self._logits(hidden_states[torch.tensor(token_rows, device=hidden_states.device)], lm_head)
            num_rows = len(token_rows)
            result += token_logprobs(logits, targets, [row.top_num] * num_rows, [row.token_ids] * num_rows)
        return result


def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor | Sequence[int],
    top_nums: Sequence[int],
    chosen: Sequence[Sequence[int]],
) -> list[TokenLogprob]:
    """Log-probabilities of one token per row of logits, with the best ones and chosen ones beside it.

    Args:
        logits: [N, vocab_size], unmodified by sampling parameters; the softmax is taken in float32.
        targets: N token ids.
        top_nums: how many of the best tokens to list, per row (more than the vocabulary gives the vocabulary).
        chosen: per row, the ids whose log-probabilities are wanted, in the order of the answer.
    """
    num_rows = logits.shape[0]
    if not len(targets) == len(top_nums) == len(chosen) == num_rows:
        raise ValueError(
            f"token_logprobs needs one target, top_num and list of chosen ids per row of logits: "
            f"{num_rows} rows, but {len(targets)}, {len(top_nums)} and {len(chosen)}"
        )
    if num_rows == 0:
        return []
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    target_ids = torch.as_tensor(targets, dtype=torch.int64, device=logits.device)
    target_logprobs = logprobs.gather(1, target_ids[:, None])[:, 0].tolist()
    tops = _top_logprobs(logprobs, top_nums)
    chosens = _chosen_logprobs(logprobs, chosen)
    return [TokenLogprob(*fields) for fields in zip(target_ids.tolist(), target_logprobs, tops, chosens, strict=True)]


def _top_logprobs(logprobs: torch.Tensor, top_nums: Sequence[int]) -> list[list[tuple[float, int]]]:
    max_num = min(max(top_nums), logprobs.shape[1])
    if max_num == 0:
        return [[] for _ in top_nums]
    values, ids = logprobs.topk(max_num, dim=-1)
    rows = zip(values.tolist(), ids.tolist(), top_nums, strict=True)
    return [list(zip(row_values[:num], row_ids[:num], strict=True)) for row_values, row_ids, num in rows]


def _chosen_logprobs(logprobs: torch.Tensor, chosen: Sequence[Sequence[int]]) -> list[list[tuple[float, int]]]:
    max_num = max(len(ids) for ids in chosen)
    if max_num == 0:
        return [[] for _ in chosen]
    padded = [[*ids, *([0] * (max_num - len(ids)))] for ids in chosen]
    values = logprobs.gather(1, torch.tensor(padded, device=logprobs.device)).tolist()
    return [list(zip(row[: len(ids)], ids, strict=True)) for row, ids in zip(values, chosen, strict=True)]
