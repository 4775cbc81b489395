"""Encodes the media items of a step: together, and each alone if that fails, so that one item fails for itself."""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch

from rtp_llm.srt.distributed.parallel_state import get_tp_group
from rtp_llm.srt.multimodal.embedding_cache import EmbeddingCache
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem

Encoder = Callable[[list[MultimodalDataItem]], torch.Tensor]

logger = logging.getLogger(__name__)


class MediaEncoder:
    """Encodes items by the functions of a model, or finds what was encoded before.

    Args:
        encoder_of: returns the encoder of a modality, or raises.
        check: raises an error for an embedding [rows, size] that does not fit its item.
        cache: takes what is encoded.
        isolates: what is raised for an item becomes its result, on all ranks alike. False: errors are raised.
    """

    def __init__(
        self,
        encoder_of: Callable[[Modality], Encoder],
        check: Callable[[MultimodalDataItem, torch.Tensor], None],
        cache: EmbeddingCache,
        isolates: bool,
    ) -> None:
        self._encoder_of, self._check, self._cache, self._isolates = encoder_of, check, cache, isolates

    def embeddings(self, items: Iterable[MultimodalDataItem]) -> dict[bytes, torch.Tensor | Exception]:
        """Return, by digest, all rows of each item: precomputed, from the cache, or encoded with others of its kind;
        or what was raised for it."""
        found: dict[bytes, torch.Tensor | Exception] = {}
        missing: dict[Modality, dict[bytes, MultimodalDataItem]] = {}
        for item in items:
            given = item.precomputed_embeddings
            known = given if given is not None else self._cache.get(item.digest)
            if known is None:
                missing.setdefault(item.modality, {})[item.digest] = item
            else:
                found[item.digest] = self._checked(item, known)
        for modality, those in missing.items():
            found.update(zip(those, self._encode(modality, list(those.values())), strict=True))
        return found

    def _checked(self, item: MultimodalDataItem, known: torch.Tensor) -> torch.Tensor | Exception:
        try:
            self._check(item, known)
        except ValueError as error:
            if not self._isolates:
                raise
            return error
        return known

    def _encode(self, modality: Modality, items: list[MultimodalDataItem]) -> Sequence[torch.Tensor | Exception]:
        if not self._isolates:
            return self._keep(items, self._encode_together(modality, items))
        embeddings: Sequence[torch.Tensor] = []
        own_error: Exception | None = None
        try:
            embeddings = self._encode_together(modality, items)
        except Exception as raised:  # a model's code raises any kind
            own_error = raised
        error = _agreed(own_error)
        if error is None:  # on any rank: what one rank finds again, all must
            return self._keep(items, embeddings)
        if len(items) == 1:
            if error is own_error:
                logger.error("an item of kind %s cannot be encoded", modality.value, exc_info=error)
            return [error]
        logger.warning(
            "%d items of kind %s cannot be encoded together, so each is tried alone: %s: %s",
            len(items),
            modality.value,
            type(error).__name__,
            error,
        )
        return [self._encode(modality, [item])[0] for item in items]

    def _encode_together(self, modality: Modality, items: list[MultimodalDataItem]) -> list[torch.Tensor]:
        """Return the rows of each item.

        Raises:
            ValueError: the number of rows is not that of the placeholders, or their size is wrong.
        """
        rows = self._encoder_of(modality)(items)
        counts = [item.num_tokens for item in items]
        if not isinstance(rows, torch.Tensor) or rows.dim() != 2 or rows.shape[0] != sum(counts):
            given = list(rows.shape) if isinstance(rows, torch.Tensor) else f"a {type(rows).__name__}"
            raise ValueError(
                f"the encoder of kind {modality.value} gave {given} for {len(counts)} items with "
                f"{counts} placeholders: it must give [{sum(counts)}, hidden]"
            )
        embeddings = list(rows.split(counts))
        for item, embedding in zip(items, embeddings, strict=True):
            self._check(item, embedding)
        return embeddings

    def _keep(self, items: list[MultimodalDataItem], embeddings: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        for item, embedding in zip(items, embeddings, strict=True):
            self._cache.put(item.digest, embedding.clone() if len(items) > 1 else embedding)
        return embeddings


def _agreed(error: Exception | None) -> Exception | None:
    """Return an error on every rank if there is one on any, so that all go the same way."""
    group = get_tp_group()
    if group.world_size == 1:
        return error
    flag = torch.tensor([error is not None], dtype=torch.int32, device=group.device)
    failed = [rank for rank, flag in enumerate(group.all_gather(flag).tolist()) if flag]
    if not failed:
        return None
    return error or RuntimeError(f"the encoder failed on rank {failed[0]}: its log has the reason")
