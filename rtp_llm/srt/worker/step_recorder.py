"""The port for step recorders, which record a step once and replay it without the Python of its layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput

Forward = Callable[[ForwardBatch], LogitsProcessorOutput]


class StepRecorder(ABC):
    """Records and replays steps: decodes and small prompts. The runner makes one, after the model is loaded, of the
    class that the device names (``DeviceProvider.step_recorder``).

    The modules' ``prepare_for_forward`` and the back end's ``plan`` have been called before ``run``. Their
    ``step_tensors()`` list the tensors that these made for the step; the step's other inputs are the batch's tensors
    and ``out_cache_locs``. Page tables and cache have the same addresses in every step.

    Attributes:
        sizes: numbers of rows that steps are recorded for, in ascending order. A batch of decodes gets dummy rows up to
            the next of them. None: batches of any size are recorded as they are.
        as_recorded: for a profile: called with the name and the function of a kernel or torch operation, returns the
            function that a replay calls in its place.
        pads_prompts: prompts may get dummy tokens: the runner then has a row and a page that no request owns.
        dummy_row: that row; None: there is none.
    """

    sizes: Sequence[int] = ()
    pads_prompts = False
    dummy_row: int | None = None
    as_recorded: Callable[[str, Callable[..., Any]], Callable[..., Any]] | None = None

    def __init__(self, forward: Forward, attn_backend: AttentionBackend, step_modules: Sequence[Any]) -> None:
        """``step_modules``: the model's modules with ``prepare_for_forward``."""
        self._forward, self._attn_backend, self._step_modules = forward, attn_backend, step_modules

    def with_dummies(self, batch: ForwardBatch) -> ForwardBatch:
        """Return a batch of prompts or whole inputs with dummy rows and tokens after its own, up to a size that steps
        are recorded for; as it is by default. Called before the step is planned; dummies' hidden states are dropped,
        and they are never sampled."""
        return batch

    @abstractmethod
    def takes(self, batch: ForwardBatch) -> bool:
        """Whether ``run`` computes this batch; the model itself computes all others."""

    @abstractmethod
    def run(self, batch: ForwardBatch) -> LogitsProcessorOutput:
        """Return the result of the model's forward pass. Logits are valid until the next step."""
