"""What scales logits: factors of the head's product."""

import torch

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.number_names import factor_reason, value_name


def scaled_logits(evidence: Evidence, ours: torch.Tensor, theirs: torch.Tensor, raw: torch.Tensor) -> str:
    """Return how our logits are scaled, if they are a multiple of the reference's: by the head's product, if both are
    multiples of that."""
    config = evidence.config
    pairs = ((ours, raw), (theirs, raw), (ours, theirs))
    mine, yours, factor = (float((x * y).sum() / y.square().sum()) for x, y in pairs)
    text = f"they are the reference's times {factor:.6g}"
    if not evidence.same(ours, mine * raw) or not evidence.same(theirs, yours * raw):
        return f"{text}: {factor_reason(factor, config)}"
    right = f"the reference by {value_name(yours, config)}" if abs(yours - 1) > 1e-3 else "the reference does not"
    return f"{text}: ours multiplies the head's product by {value_name(mine, config)}, {right}"


def missing_scale(evidence: Evidence, theirs: torch.Tensor, raw: torch.Tensor) -> str:
    """Return the cause of logits that are the head's product."""
    factor = float((theirs * raw).sum() / raw.square().sum())
    is_scaled = evidence.same(theirs, factor * raw)
    scale = f": the reference multiplies it by {value_name(factor, evidence.config)}" if is_scaled else ""
    return f"they are the head's product itself: a scale or a soft cap of the logits is missing{scale}"
