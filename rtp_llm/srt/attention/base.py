"""The port for attention back ends. docs/attention_backends.md shows a complete one."""

from abc import ABC, abstractmethod

import torch

from rtp_llm.srt.attention.encoder import attend_both_ways
from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch


class AttentionBackend(ABC):
    """Plans a step once for all layers, then runs each layer's attention over the paged cache.

    Each worker makes one, or two, without arguments. The runner calls ``plan`` once for each step; then each layer
    calls ``forward``, in the order of the model. A step has rows, one for each request that computes tokens in it, and
    row b computes tokens ``[extend_prefix_lens[b], seq_lens[b])`` of its sequence; there may be no rows. Tokens of all
    rows follow one another in q, k and v.

    Row b's token at position p is in page ``batch.page_tables[group][batch.req_pool_indices[b], p // page_size]`` of
    its layer's cache (``batch.kv_pool.layer(layer.layer_id)``), at offset ``p % page_size``. Only pages of tokens that
    some query of the row sees may be read: others may already belong to another request, or are the dummy page 0.

    Attributes:
        reads_shared_prefixes: it uses ``batch.shared_prefixes``; otherwise the scheduler does not look for any.
        replays: steps can be recorded (worker/step_recorder.py). Then only ``plan`` may read host lists of the
            batch, ``forward`` makes the same calls in all steps of the same shapes, and ``step_tensors`` lists what
            differs.
    """

    reads_shared_prefixes = False
    replays = False

    @classmethod
    def problem(cls, torch_device: str, dtype: torch.dtype) -> str | None:
        """Return why it cannot serve models in ``dtype`` on a device, as a sentence; None: it can."""
        return None

    @abstractmethod
    def plan(self, batch: ForwardBatch) -> None:
        """Prepare a step's metadata for all layers. Page tables and slots are filled already, keys are not.

        Layers differ in cache group and window: metadata that depends on these is made here for all groups of
        ``batch.kv_pool``, or by the first layer that needs it. This must not wait for the device.
        """

    def step_tensors(self) -> list[torch.Tensor]:
        """Return the tensors that ``plan`` made: all that ``forward`` reads besides the batch's and its arguments.

        Called only if ``replays`` is True: a recorded step runs again with the next step's values at its addresses.
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
        """Write the step's keys and values, then attend over the cache, so that a token sees itself.

        A query at position p sees the keys from ``layer.first_visible(p)`` up to p; where
        ``batch.visible_ends`` is given, also later ones before that position: not in all layers of a model, so it is
        read here and not in ``plan``. For one row it is what ``attention`` of ``kernels/reference.py`` computes.

        Args:
            q: [T, num_heads, head_dim], T the tokens of all rows.
            k, v: [T, num_kv_heads, head_dim] and [T, num_kv_heads, v_head_dim], to be written at the slots
                ``batch.out_cache_locs[group]`` [T]. Both None: the layer reads what another wrote in this step. ``v``
                alone None: the layer is latent, values are the first ``v_head_dim`` components of its keys.
            layer: the layer's description; the same object in every step.
            save_kv_cache: False: write nothing.
            sinks: [num_heads], a score for each head that takes part in the softmax and has no value.

        Returns:
            [T, num_heads * v_head_dim], in q's dtype.
        """

    def write(self, k: torch.Tensor, v: torch.Tensor | None, layer: AttentionSpec, batch: ForwardBatch) -> None:
        """Write the step's keys and values as ``forward`` does, and attend to nothing.

        Some layers' output is not wanted of all tokens. A second instance of the back end, whose ``plan`` was called
        with a batch of the others, then computes these, with neither ``k`` nor ``v``.
        """
        cache = batch.kv_pool.layer(layer.layer_id)
        batch.kv_pool.write(layer.layer_id, batch.out_cache_locs[cache.group], k, v)

    def forward_encoder(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionSpec, batch: ForwardBatch
    ) -> torch.Tensor:
        """Attend within each row's tokens of this step, both ways; nothing is cached.

        Only models whose prompts are computed in one step call this. With a window, tokens i and j see each other iff
        ``|i - j| < window``. A back end that has nothing faster need not override it.

        Args:
            q, k, v: as in ``forward``, v included.

        Returns:
            [T, num_heads * v_head_dim], in q's dtype.
        """
        return attend_both_ways(q, k, v, layer, batch.extend_seq_lens_cpu)
