"""Texts that part in 16 bits: compared again in float32, where rounding hides less."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rtp_llm.srt.checkpoint import read_model_config
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.prompts import Prompt
from rtp_llm.tools.verify.sides import OurModel, TheirModel

TIE_GAP = 1e-4  # float32 logits closer than this are a tie: either token is right


@dataclass(frozen=True)
class Parting:
    """The first token that transformers would have chosen otherwise.

    Args:
        index: of the output token.
        token_id: transformers' choice.
        gap: how far transformers' logit of ours lies below the one of its own.
        same_in_float32: whether the texts are equal there; None: not tried.
    """

    index: int
    token_id: int
    gap: float
    same_in_float32: bool | None = None


def parting(output_ids: Sequence[int], logits: torch.Tensor) -> Parting | None:
    """Return where transformers' logits [tokens, vocab_size] choose another token; None: nowhere, but for ties."""
    for i, (token_id, row) in enumerate(zip(output_ids, logits, strict=True)):
        gap = float(row.max() - row[token_id])
        if gap > TIE_GAP:
            return Parting(i, int(row.argmax()), gap)
    return None


def same_in_float32(args: ServerArgs, options: VerifyOptions, prompts: Sequence[Prompt]) -> list[bool]:
    """Return of each prompt whether ours and transformers' texts are equal in float32. ``--model-class`` is registered.

    Both models are loaded once more.
    """
    args = replace(args, dtype="float32")
    config = read_model_config(args)
    max_len = max(len(prompt.ids) for prompt in prompts) + options.max_new_tokens
    ours, theirs = OurModel(args, config, max_len), TheirModel(args, config)
    same = []
    for prompt in prompts:
        cut_len = ours.cut_of(prompt, options.cut_len)
        output_ids, _ = ours.run(prompt, cut_len, options.max_new_tokens)
        logits = theirs.run(prompt, cut_len, output_ids)[-len(output_ids) :]
        same.append(parting(output_ids, logits) is None)
    return same
