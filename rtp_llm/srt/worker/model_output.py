"""What a model's forward pass must return."""

from collections.abc import Callable

import torch
from torch import nn

from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput
from rtp_llm.srt.model_traits import ModelTraits


def check_output(output: object, model: nn.Module, traits: ModelTraits, batch: ForwardBatch) -> None:
    """Raise TypeError or ValueError for an output of the wrong type or size, before it fails in the sampler."""
    name = type(model).__name__
    if not isinstance(output, LogitsProcessorOutput):
        method = "forward" if traits.forward_batch is None else "forward_batch"
        raise TypeError(
            f"{name}.{method} must return a LogitsProcessorOutput, which LogitsProcessor makes, not "
            f"{type(output).__name__}"
        )
    num_rows, expected = output.num_rows, batch.sample_rows.shape[0]
    if num_rows != expected:
        raise ValueError(
            f"{name} returned {num_rows} rows of next_token_logits, not {expected}: there must be one for each of "
            "forward_batch.sample_rows, which LogitsProcessor picks out"
        )


def encoded_output(forward: Callable[[ForwardBatch], object], batch: ForwardBatch) -> LogitsProcessorOutput:
    """Run a model that makes hidden states and no tokens.

    Raises:
        TypeError, ValueError: it returned something else.
    """
    states = forward(batch)
    if isinstance(states, LogitsProcessorOutput):  # of a decoder's, without rows to draw from
        return states
    if not isinstance(states, torch.Tensor):
        raise TypeError(
            f"a model with generates = False returns hidden states [tokens, size], not {type(states).__name__}"
        )
    if len(states) != batch.num_tokens:
        raise ValueError(f"the model returned {len(states)} rows of hidden states for {batch.num_tokens} tokens")
    return LogitsProcessorOutput.of_encoder(states, batch)
