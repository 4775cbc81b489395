"""Weights of the whole vocabulary for an input, by the head for masked tokens (SPLADE: Formal et al., 2021)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.logits_processor import LogitsProcessor
from rtp_llm.srt.layers.pooler import Head, Pooler

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROWS_AT_ONCE = 256  # tokens: with a vocabulary of 250,000 their logits are 256 MB in float32


class MaskedLMHead(nn.Module):
    """From hidden states [N, hidden_size] to the logits [N, vocab_size] of masked tokens, in float32.

    Args:
        transform: the layers before the product with the embedding.
        embedding: the model's; a head of its own takes its place unless the configuration ties them.
        decoder_bias: such a head has a bias of its own, ``decoder.bias``, in place of ``bias``, which is read for
            checkpoints without it: let ``weight_defaults`` of the model say so.
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        transform: nn.Module,
        embedding: VocabParallelEmbedding,
        bias: bool = True,
        decoder_bias: bool = False,
    ) -> None:
        super().__init__()
        self.transform = transform
        is_tied = getattr(config, "tie_word_embeddings", True)
        self.decoder = (
            embedding if is_tied else ParallelLMHead(config.vocab_size, config.hidden_size, bias=decoder_bias)
        )
        self.bias = nn.Parameter(torch.empty(config.vocab_size)) if bias else None
        self.logits_processor = LogitsProcessor(config)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.logits_processor.logits(self.transform(states), self.decoder).float()
        return logits if self.bias is None or self.decoder.bias is not None else logits + self.bias.float()


class Splade(Pooler):
    """One line of the vocabulary's size: of each token log(1 + relu(logit)), the largest over the input, or the sum.

    Args:
        sums: the sum over the input, as in the first version.
        twice: the logarithm is taken twice, as in OpenSearch's models (2025).
    """

    def __init__(self, width: int, head: Head | None, sums: bool = False, twice: bool = False) -> None:
        super().__init__("max", width, head)
        self.sums, self.twice = sums, twice

    def __call__(
        self,
        states: torch.Tensor,
        counts: torch.Tensor,
        dimensions: int | None = None,
        normalize: bool | None = None,
    ) -> torch.Tensor:
        """See Pooler. There is no last step that a request might leave out."""
        lines = [self._line(part) for part in states.split(counts.tolist())]
        return torch.stack(lines)[:, :dimensions]

    def _line(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, size] of one input -> [width]. Logits of a few tokens at a time are in memory."""
        line: torch.Tensor | None = None
        for piece in states.split(ROWS_AT_ONCE):
            logits = piece if self.head is None else self.head(piece.to(self._head_dtype))
            weights = logits.float().relu().log1p()
            weights = weights.log1p() if self.twice else weights
            part = weights.sum(dim=0) if self.sums else weights.amax(dim=0)
            line = part if line is None else line + part if self.sums else torch.maximum(line, part)
        assert line is not None
        return line


def splades(config: "PretrainedConfig", head: MaskedLMHead) -> dict[str, Pooler]:
    """Return the outputs of a model with a head for masked tokens besides its vectors."""
    return {"sparse": Splade(config.vocab_size, head)}
