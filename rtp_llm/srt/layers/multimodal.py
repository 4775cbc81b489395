"""Media in a forward pass: encoded once, and put at the places of their placeholders."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.media_encoder import Encoder, MediaEncoder
from rtp_llm.srt.multimodal.embedding_cache import EmbeddingCache
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem


class Placement(NamedTuple):
    """Rows ``item_rows`` of an item's embedding belong at the batch's flattened tokens ``token_rows``."""

    item: MultimodalDataItem
    item_rows: list[int]
    token_rows: list[int]
    token_id: int  # what stands there in the prompt
    batch_row: int


def placements(forward_batch: ForwardBatch) -> list[Placement]:
    """Return the placements of items among this step's tokens; items outside of them are left out."""
    if forward_batch.mm_inputs is None:
        return []  # without reading the batch's lists, so that decode steps are replayed
    placed = []
    starts = accumulate(forward_batch.extend_seq_lens_cpu, initial=0)
    for row, (inputs, start) in enumerate(zip(forward_batch.mm_inputs, starts, strict=False)):
        if inputs is None:
            continue
        prefix, count = forward_batch.extend_prefix_lens_cpu[row], forward_batch.extend_seq_lens_cpu[row]
        for item in inputs.mm_items:
            item_rows, positions = rows_within(item.offsets, prefix, prefix + count)
            if item_rows:
                token_rows = [start + position - prefix for position in positions]
                token_id = inputs.token_id_of(item.modality) or 0
                placed.append(Placement(item, item_rows, token_rows, token_id, row))
    return placed


def rows_within(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[list[int], list[int]]:
    """Return the item's rows at positions [begin, end), and those positions. The cost does not grow with runs outside
    of them, so a decode step pays next to nothing."""
    rows: list[int] = []
    positions: list[int] = []
    row = 0
    for first, last in offsets:
        reached = range(max(first, begin), min(last + 1, end))
        rows += range(row + reached.start - first, row + reached.start - first + len(reached))
        positions += reached
        row += last - first + 1
    return rows, positions


def general_mm_embed_routine(
    input_ids: torch.Tensor,
    forward_batch: ForwardBatch,
    language_model: nn.Module,
    multimodal_model: Any = None,
    data_embedding_funcs: Mapping[Modality, Encoder] | None = None,
    placeholder_tokens: Mapping[Modality, Sequence[int]] | None = None,
    use_deepstack: Mapping[Modality, bool] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Embed text and media, then run ``language_model(input_ids=None, forward_batch=, input_embeds=, **kwargs)``.

    Args:
        input_ids: [T], the vocabulary's ids, placeholders where media are.
        language_model: has ``get_input_embeddings()``.
        multimodal_model: has ``get_image_feature(items)``, ``get_video_feature``, ``get_audio_feature`` for the media
            that it takes: each returns [rows of all items, hidden], an item's rows in the order of its placeholders.
        data_embedding_funcs: used instead of these methods, by modality.
        placeholder_tokens: the ids that may stand for media; any other is an error.
        use_deepstack: for these modalities encoders return [rows, hidden * (1 + k)]: the first layer's input, then
            what is added after each of k layers (Meng et al. 2024). The language model gets the latter as
            ``input_deepstack_embeds`` [T, hidden * k], zero for text, or None if this step has no such media.
        kwargs: passed on to the language model, ``positions`` among them.

    Returns:
        The language model's hidden states.

    Raises:
        ValueError: an encoder is missing, or its number of rows is not that of the placeholders; or a placeholder is
            not in ``placeholder_tokens``. With ``forward_batch.row_errors``, this and what an encoder raises is written
            there instead, for each row of the batch with such an item, whose placeholders are left as text.
    """
    get_input_embeddings: Any = language_model.get_input_embeddings
    hidden_states: torch.Tensor = get_input_embeddings()(input_ids)
    hidden_size = hidden_states.shape[1]
    deep_kinds = {modality for modality, is_deep in (use_deepstack or {}).items() if is_deep}
    deepstack: torch.Tensor | None = None
    for place, embedding in _embedded(
        placements(forward_batch),
        partial(_encoder_of, multimodal_model, data_embedding_funcs or {}),
        partial(_check_embedding, hidden_size, deep_kinds),
        placeholder_tokens or {},
        forward_batch,
    ):
        rows = embedding[place.item_rows].to(hidden_states)
        if place.item.modality in deep_kinds:
            rows, more = rows.split([hidden_size, rows.shape[1] - hidden_size], dim=1)
            if deepstack is None:
                deepstack = hidden_states.new_zeros(hidden_states.shape[0], more.shape[1])
            deepstack[place.token_rows] = more
        hidden_states[place.token_rows] = rows
    if use_deepstack:
        kwargs["input_deepstack_embeds"] = deepstack
    return language_model(input_ids=None, forward_batch=forward_batch, input_embeds=hidden_states, **kwargs)


def _embedded(
    placed: Sequence[Placement],
    encoder_of: Callable[[Modality], Encoder],
    check: Callable[[MultimodalDataItem, torch.Tensor], None],
    placeholder_tokens: Mapping[Modality, Sequence[int]],
    forward_batch: ForwardBatch,
) -> list[tuple[Placement, torch.Tensor]]:
    """Return the placements with all rows of their items; leave out those of rows that have an error.

    Raises:
        Exception: ``forward_batch`` collects no errors.
    """
    if not placed:
        return []
    errors = getattr(forward_batch, "row_errors", None)  # a batch made outside of the engine may have none
    cache = forward_batch.embedding_cache or EmbeddingCache(0)
    encoder = MediaEncoder(encoder_of, check, cache, isolates=errors is not None)
    embeddings = encoder.embeddings(place.item for place in placed)
    embedded = []
    for place in placed:
        result = embeddings[place.item.digest]
        if isinstance(result, torch.Tensor) and not _is_wrong_placeholder(place, placeholder_tokens):
            embedded.append((place, result))
            continue
        error = result if isinstance(result, Exception) else _wrong_placeholder(place, placeholder_tokens)
        if errors is None:
            raise error
        message = f"media of this request cannot be encoded: {type(error).__name__}: {error}"
        errors.setdefault(place.batch_row, message)
    return embedded


def _encoder_of(model: Any, functions: Mapping[Modality, Encoder], modality: Modality) -> Encoder:
    name = f"get_{modality.value}_feature"
    encoder: Encoder | None = functions.get(modality) or getattr(model, name, None)
    if encoder is None:
        raise ValueError(f"{type(model).__name__} takes no media of kind {modality.value}: it has no {name}")
    return encoder


def _check_embedding(
    hidden_size: int, deep_kinds: Collection[Modality], item: MultimodalDataItem, embedding: torch.Tensor
) -> None:
    """Raise ValueError for an embedding that does not fit its item, or the language model."""
    if embedding.shape[0] != item.num_tokens:
        raise ValueError(
            f"an item of kind {item.modality.value} has {item.num_tokens} placeholders in the prompt, but "
            f"{embedding.shape[0]} embeddings"
        )
    size, is_deep = embedding.shape[1], item.modality in deep_kinds
    if size % hidden_size if is_deep else size != hidden_size:
        raise ValueError(
            f"an embedding of kind {item.modality.value} has {size} values, but the language model takes "
            f"{'multiples of ' if is_deep else ''}{hidden_size}"
        )


def _is_wrong_placeholder(place: Placement, placeholder_tokens: Mapping[Modality, Sequence[int]]) -> bool:
    return place.token_id not in placeholder_tokens.get(place.item.modality, [place.token_id])


def _wrong_placeholder(place: Placement, placeholder_tokens: Mapping[Modality, Sequence[int]]) -> ValueError:
    return ValueError(
        f"token {place.token_id} stands for media of kind {place.item.modality.value}: only "
        f"{list(placeholder_tokens[place.item.modality])} may"
    )
