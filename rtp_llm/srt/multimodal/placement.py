"""Placement of media in a prompt, before the core gets it, so that the core's loop never sees pixels."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rtp_llm.srt.multimodal.items import MediaError, MultimodalInputs, media_blocks, pad_placeholders, vocabulary_ids
from rtp_llm.srt.multimodal.media_store import MediaStore
from rtp_llm.srt.request_spec import PromptMedia
from rtp_llm.srt.sampling_params import InvalidRequest

logger = logging.getLogger(__name__)


class MediaPlacementError(InvalidRequest):
    """A model's ``pad_input_ids`` cannot place a prompt's media."""


class MediaPlacer:
    """Places media in prompts by a model's ``pad_input_ids``. Thread-safe; one thread at a time calls the method.

    Args:
        build: makes an instance of the model without weights, whose method is called. It is called once, for the first
            prompt. None: ``pad_placeholders``, which needs no model.
        store: keeps the media for workers in other processes. None: they are in this one.
    """

    def __init__(self, build: Callable[[], Any] | None = None, store: MediaStore | None = None) -> None:
        self._build = build
        self._store = store
        self._model: Any = None
        self._lock = threading.Lock()

    def place(self, prompt_ids: Sequence[int], inputs: MultimodalInputs) -> tuple[list[int], PromptMedia]:
        """Return the prompt's ids, of the vocabulary and perhaps more than came, and its media.

        Raises:
            MediaPlacementError: what ``pad_input_ids`` returned is not consistent with the media, or it fails.
            MediaError: the media cannot be encoded for a model.
            OSError: they cannot be stored.
        """
        for item in inputs.mm_items:
            _ = item.digest  # first: invalid media would otherwise look misplaced
        try:
            ids, cache_keys = self._padded(prompt_ids, inputs)
        except Exception as error:  # of any kind, from a model's method
            logger.debug("media cannot be placed in the prompt", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            raise MediaPlacementError(f"the media cannot be placed in the prompt: {reason}") from error
        content = inputs.encode()
        stored = content if self._store is None else self._store.put(content)
        return ids, PromptMedia(stored, cache_keys, media_blocks(inputs))

    def _padded(self, prompt_ids: Sequence[int], inputs: MultimodalInputs) -> tuple[list[int], list[int]]:
        """Return the prompt's ids, and the same with pad ids at media positions."""
        before = [list(item.offsets) for item in inputs.mm_items]
        padded = [int(token_id) for token_id in self._pad(list(prompt_ids), inputs)]
        ids = vocabulary_ids(padded, inputs)
        if inputs.mrope_positions is not None and before != [item.offsets for item in inputs.mm_items]:
            raise MediaError("pad_input_ids moved media whose rotary positions the processor had already computed")
        return ids, padded

    def _pad(self, prompt_ids: list[int], inputs: MultimodalInputs) -> Sequence[int]:
        if self._build is None:
            return pad_placeholders(None, prompt_ids, inputs)
        with self._lock:
            if self._model is None:
                self._model = self._build()
            return self._model.pad_input_ids(prompt_ids, inputs)
