"""Models that remember all they have read, exactly: a state from a wrong slot, or of a wrong position, changes answers.

They have no weights, and compute with whole numbers in float32.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.cache.spec import StateSpec, StateTensor
from rtp_llm.srt.distributed.parallel_state import get_tp_group
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.radix_attention import RadixAttention

VOCAB_SIZE = 61
MODULUS, CLASSES = 65521, 509
FACTORS = (31.0, 57.0)
TAIL_WEIGHTS = (1.0, 3.0, 5.0)
HEAD_DIM = 16


@dataclass
class HistoryConfig:
    vocab_size: int = VOCAB_SIZE
    hidden_size: int = HEAD_DIM
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    max_position_embeddings: int = 8192


class History(nn.Module):
    """Two rolling hashes of all tokens, and the last three tokens: states as of a recurrence and of a convolution."""

    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id

    def state_spec(self) -> StateSpec:
        return StateSpec((StateTensor("hash", (2,), "float32"), StateTensor("tail", (3,), "bfloat16")))

    def forward(self, input_ids: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return [T, 5] float32: the hashes and the last tokens after each token."""
        hashes, tails = (batch.state_pool.tensor(self.layer_id, name) for name in ("hash", "tail"))
        out = torch.empty(input_ids.shape[0], 5)
        for wave in batch.state_waves:
            ids = input_ids if wave.tokens is None else input_ids[wave.tokens]
            state = torch.cat([hashes[wave.load], tails[wave.load].float()], dim=1)
            if len(wave.cu_seqlens_cpu) - 1 == ids.shape[0]:
                state = found = _after(state, ids)
            else:
                found, state = _after_pieces(state, ids, wave.cu_seqlens_cpu)
            hashes[wave.store], tails[wave.store] = state[:, :2], state[:, 2:].bfloat16()
            if wave.tokens is None:
                return found
            out[wave.tokens] = found
        return out


def _after(state: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return states [N, 5] after one more token each."""
    token = (ids + 1).float()[:, None]
    hashes = torch.fmod(state[:, :2] * torch.tensor(FACTORS) + token, MODULUS)
    return torch.cat([hashes, state[:, 3:], token], dim=1)


def _after_pieces(state: torch.Tensor, ids: torch.Tensor, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states after each token [P, 5], and after each piece [N, 5]."""
    found, last = [], []
    for n, (begin, end) in enumerate(pairwise(cuts)):
        row = state[n : n + 1]
        for place in range(begin, end):
            row = _after(row, ids[place : place + 1])
            found.append(row)
        last.append(row)
    return torch.cat(found), torch.cat(last)


class HistoryForCausalLM(nn.Module):
    """Has a state and no attention."""

    config_class = HistoryConfig
    has_attention = False

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.history = History(layer_id=0)
        if self.has_attention:
            self.attn = RadixAttention(1, HEAD_DIM, 1.0, 1, layer_id=1)
        self.logits_processor = LogitsProcessor(config)
        self.lm_head = Scores()

    def load_weights(self, weights: Any) -> None:
        """There are none."""

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> LogitsProcessorOutput:
        found = self.history(input_ids, forward_batch)
        total = self._sum(input_ids, positions, forward_batch) if self.has_attention else torch.zeros(found.shape[0], 1)
        return self.logits_processor(input_ids, torch.cat([found, total], dim=1), self.lm_head, forward_batch)

    def _sum(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return the sum of all ids up to each token [T, 1], which attention finds as a mean."""
        v = input_ids.float()[:, None].expand(-1, HEAD_DIM).contiguous()
        mean = self.attn(torch.zeros_like(v), torch.zeros_like(v), v, batch)[:, :1]
        return torch.round(mean * (positions + 1)[:, None])


class HybridHistoryForCausalLM(HistoryForCausalLM):
    """Has attention beside a state."""

    has_attention = True


class Scores(nn.Module):
    """Takes the place of a head: scores [S, this rank's part of the vocabulary] that depend on all that was found."""

    bias = None

    def __init__(self) -> None:
        super().__init__()
        group = get_tp_group()
        self.first, self.count = -(-VOCAB_SIZE // group.world_size) * group.rank, -(-VOCAB_SIZE // group.world_size)
        object.__setattr__(self, "quant_method", self)  # not a module within itself

    def logits(self, layer: nn.Module, found: torch.Tensor, bias: None) -> torch.Tensor:
        v = torch.arange(self.first, self.first + self.count).float()
        tail = found[:, 2:5] @ torch.tensor(TAIL_WEIGHTS)
        mixed = found[:, :1] + found[:, 1:2] * v + tail[:, None] * (v * v) + found[:, 5:6] * (v + 7)
        return -torch.fmod(mixed, CLASSES)


def answer(prompt: list[int], num_new: int, has_attention: bool) -> list[int]:
    """What the model says after a prompt, computed from the whole text anew for each token."""
    ids = list(prompt)
    for _ in range(num_new):
        hashes = [0, 0]
        for token in ids:
            hashes = [(h * int(factor) + token + 1) % MODULUS for h, factor in zip(hashes, FACTORS, strict=True)]
        tail = [token + 1 for token in [-1, -1, -1, *ids][-3:]]
        weighted = sum(t * int(weight) for t, weight in zip(tail, TAIL_WEIGHTS, strict=True))
        total = sum(ids) if has_attention else 0
        scores = [
            -((hashes[0] + hashes[1] * v + weighted * v * v + total * (v + 7)) % CLASSES) for v in range(VOCAB_SIZE)
        ]
        ids.append(max(range(VOCAB_SIZE), key=lambda v: (scores[v], -v)))
    return ids[len(prompt) :]


def write_checkpoint(folder: Path, model_class: type) -> str:
    """Write a checkpoint without weights, for ``load_format="dummy"``."""
    config = {"architectures": [model_class.__name__], "model_type": "history", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
