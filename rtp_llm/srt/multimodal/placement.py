"""Where media go in a prompt: decided before the core gets it, so that its loop never sees pixels."""

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
    """A model's ``pad_input_ids`` cannot put a prompt's media into it."""


class MediaPlacer:
    """Puts media into prompts as a model's ``pad_input_ids`` says. Thread-safe; the method is called by one thread at a
    time.

    Args:
        build: makes an instance of the model without weights, to be asked. It is called once, when the first prompt
            comes. None: ``pad_placeholders``, which asks nothing of the model.
        store: keeps the media for workers in other processes. None: they are in this one.
    """

    def __init__(self, build: Callable[[], Any] | None = None, store: MediaStore | None = None) -> None:
        self._build = build
        self._store = store
        self._model: Any = None
        self._lock = threading.Lock()

    def place(self, prompt_ids: Sequence[int], inputs: MultimodalInputs) -> tuple[list[int], PromptMedia]:
        """The prompt's ids, of the vocabulary, perhaps more of them than came, and its media.

        Raises:
            MediaPlacementError: what ``pad_input_ids`` returned is not consistent with the media, or it fails.
            MediaError: the media are nothing that can be given to a model.
            OSError: they cannot be stored.
        """
        for item in inputs.mm_items:
            _ = item.digest  # else media that no model could get would seem to be in the wrong place
        try:
            ids, cache_keys = self._padded(prompt_ids, inputs)
        except Exception as error:  # whatever a model's method may raise; told to whoever asked
            logger.debug("media cannot be placed in the prompt", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            raise MediaPlacementError(f"the media cannot be placed in the prompt: {reason}") from error
        content = inputs.encode()
        stored = content if self._store is None else self._store.put(content)
        return ids, PromptMedia(stored, cache_keys, media_blocks(inputs))

    def _padded(self, prompt_ids: Sequence[int], inputs: MultimodalInputs) -> tuple[list[int], list[int]]:
        """The prompt's ids, and with pad ids where media are."""
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
