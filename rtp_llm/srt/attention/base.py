"""The port that attention back ends fill."""

from abc import ABC, abstractmethod

import torch

from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch


class AttentionBackend(ABC):
    """Plans a step once for all layers, then runs each layer's attention over the paged cache.

    Invariants: ``plan`` is called once per step before any ``forward``; ``forward`` first writes the step's keys and
    values to ``batch.out_cache_locs``, then attends over everything the request has in the cache, so that a token sees
    itself. Only pages of tokens that a query can see are read: others may already belong to someone else. Attention is
    causal, but for what ``batch.visible_ends`` adds.
    """

    reads_shared_prefixes = False  # whether ``batch.shared_prefixes`` is of use to it
    replays = False  # whether decode steps can be recorded: see worker/step_recorder.py

    @classmethod
    def problem(cls, torch_device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot serve models in ``dtype`` on a device, as a sentence; None: it can."""
        return None

    @abstractmethod
    def plan(self, batch: ForwardBatch) -> None:
        """Builds the step's metadata. Host lists of ``batch`` may be used; device tensors need no synchronisation."""

    def step_tensors(self) -> list[torch.Tensor]:
        """What ``plan`` made, all that ``forward`` reads of a step besides the batch's tensors and its arguments.

        Only where ``replays`` holds: then a step's kernels are run again with other numbers at the same addresses.
        """
        raise NotImplementedError

    @abstractmethod
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: AttentionSpec,
        batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            q: [T, num_heads, head_dim]; k: [T, num_kv_heads, head_dim]; v: [T, num_kv_heads, v_head_dim].
                ``k`` and ``v`` are None where the layer reads another layer's cache, ``v`` alone where it is latent.
            sinks: [num_heads], see ``RadixAttention``; None: no sinks.

        Returns:
            [T, num_heads * v_head_dim].
        """
