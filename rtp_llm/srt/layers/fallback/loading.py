"""Weights into transformers' own classes."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from rtp_llm.srt.distributed.parallel_state import get_world
from rtp_llm.srt.layers.fallback.masks import UnservableModelError
from rtp_llm.srt.layers.quantization.base import QuantizationConfig


def refuse_setting(quant_config: QuantizationConfig | None) -> None:
    """Raise UnservableModelError on several ranks, and for quantized weights."""
    if get_world().shape.size > 1:
        raise UnservableModelError(
            "models that run through transformers cannot be shared by ranks: use --tp-size 1 and --pp-size 1"
        )
    if quant_config is not None and not quant_config.dequantizes_rest:
        raise UnservableModelError(
            f"models that run through transformers are not quantized (by {quant_config.get_name()}) here"
        )


def loaded(
    model_class: type[PreTrainedModel],
    config: Any,
    device: torch.device,
    weights: Iterable[tuple[str, torch.Tensor]],
    unused: str | None = None,
) -> PreTrainedModel:
    """Load as transformers does, with its renamings, conversions and ties.

    Args:
        unused: a regular expression of parameters that may be missing, or lack a place, since nothing reads them.

    Raises:
        ValueError: the weights do not fit the class; it names those that are missing or too many.
    """
    with torch.device("cpu"), without_progress_bar():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=torch.get_default_dtype(),
            output_loading_info=True,
        )
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(key for key in map(str, info.get(kind) or ()) if not (unused and re.search(unused, key)))
        if keys:
            problems.append(f"{len(keys)} {kind.replace('_', ' ')}:\n  " + "\n  ".join(keys))
    if problems:
        raise ValueError(f"the checkpoint does not fit {model_class.__name__}:\n" + "\n".join(problems))
    return model.to(device)


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Disable transformers' progress bar of loading within the context."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
