"""The port of what runs decode steps without the Python of their layers: recorded once, then replayed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput

Forward = Callable[[ForwardBatch], LogitsProcessorOutput]


class StepRecorder(ABC):
    """Made once, after the model is loaded, by the runner; a device names its class (``DeviceProvider.step_recorder``).

    The modules' ``prepare_for_forward`` and the back end's ``plan`` have been called before ``run``. What they made of
    a step their ``step_tensors()`` name; what else is of a step lies in the batch's tensors and ``out_cache_locs``.
    Page tables and cache lie where they always do.

    Attributes:
        sizes: numbers of rows that steps are recorded for, in ascending order. A batch of decodes gets dummy rows up to
            the next of them. None: batches of any size are recorded as they are.
        as_recorded: what a replay calls instead of a kernel or an operation of torch, given its name and what computes
            it; for a profile.
    """

    sizes: Sequence[int] = ()
    as_recorded: Callable[[str, Callable[..., Any]], Callable[..., Any]] | None = None

    def __init__(self, forward: Forward, attn_backend: AttentionBackend, step_modules: Sequence[Any]) -> None:
        """``step_modules``: those with ``prepare_for_forward``."""
        self._forward, self._attn_backend, self._step_modules = forward, attn_backend, step_modules

    @abstractmethod
    def takes(self, batch: ForwardBatch) -> bool:
        """Whether ``run`` is to compute this batch; the model itself computes all others."""

    @abstractmethod
    def run(self, batch: ForwardBatch) -> LogitsProcessorOutput:
        """What the model's forward pass returns. Logits are valid until the next step."""
