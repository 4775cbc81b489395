"""Media in a forward pass: encoded once, and put at the places of their placeholders."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.multimodal.embedding_cache import EmbeddingCache
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem

Encoder = Callable[[list[MultimodalDataItem]], torch.Tensor]


class Placement(NamedTuple):
    """Rows ``item_rows`` of an item's embedding belong at the batch's flattened tokens ``token_rows``."""

    item: MultimodalDataItem
    item_rows: list[int]
    token_rows: list[int]
    token_id: int  # what stands there in the prompt


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
                placed.append(Placement(item, item_rows, token_rows, inputs.token_id_of(item.modality) or 0))
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
            not in ``placeholder_tokens``.
    """
    get_input_embeddings: Any = language_model.get_input_embeddings
    hidden_states: torch.Tensor = get_input_embeddings()(input_ids)
    placed = placements(forward_batch)
    deepstack: torch.Tensor | None = None
    if placed:
        encoders = _encoders(placed, multimodal_model, data_embedding_funcs)
        for place, embedding in zip(placed, _encode(placed, encoders, forward_batch), strict=True):
            if placeholder_tokens is not None:
                _check_placeholder(place, placeholder_tokens)
            rows = embedding[place.item_rows].to(hidden_states)
            if use_deepstack and use_deepstack.get(place.item.modality):
                rows, more = rows.split([hidden_states.shape[1], rows.shape[1] - hidden_states.shape[1]], dim=1)
                if deepstack is None:
                    deepstack = hidden_states.new_zeros(hidden_states.shape[0], more.shape[1])
                deepstack[place.token_rows] = more
            hidden_states[place.token_rows] = rows
    if use_deepstack:
        kwargs["input_deepstack_embeds"] = deepstack
    return language_model(input_ids=None, forward_batch=forward_batch, input_embeds=hidden_states, **kwargs)


def _encoders(
    placed: list[Placement], model: Any, functions: Mapping[Modality, Encoder] | None
) -> dict[Modality, Encoder]:
    """Return an encoder for each modality in the step, except where all items have precomputed embeddings."""
    encoders: dict[Modality, Encoder] = {}
    for modality in {place.item.modality for place in placed if place.item.precomputed_embeddings is None}:
        name = f"get_{modality.value}_feature"
        encoder = (functions or {}).get(modality) or getattr(model, name, None)
        if encoder is None:
            raise ValueError(f"{type(model).__name__} takes no media of kind {modality.value}: it has no {name}")
        encoders[modality] = encoder
    return encoders


def _encode(
    placed: list[Placement], encoders: Mapping[Modality, Encoder], forward_batch: ForwardBatch
) -> list[torch.Tensor]:
    """Return all rows of each placement's item: precomputed, from the cache, or encoded with others of its kind."""
    cache = forward_batch.embedding_cache or EmbeddingCache(0)
    found: dict[bytes, torch.Tensor] = {}
    missing: dict[Modality, dict[bytes, MultimodalDataItem]] = {}
    for item, *_ in placed:
        known = item.precomputed_embeddings if item.precomputed_embeddings is not None else cache.get(item.digest)
        if known is not None:
            found[item.digest] = known
        else:
            missing.setdefault(item.modality, {})[item.digest] = item
    for modality, items in missing.items():
        embeddings = encoders[modality](list(items.values()))
        counts = [item.num_tokens for item in items.values()]
        if embeddings.dim() != 2 or embeddings.shape[0] != sum(counts):
            raise ValueError(
                f"the encoder of kind {modality.value} gave {list(embeddings.shape)} for {len(counts)} items with "
                f"{counts} placeholders: it must give [{sum(counts)}, hidden]"
            )
        for digest, embedding in zip(items, embeddings.split(counts), strict=True):
            found[digest] = embedding
            cache.put(digest, embedding.clone() if len(counts) > 1 else embedding)
    for item, *_ in placed:
        if found[item.digest].shape[0] != item.num_tokens:
            raise ValueError(
                f"an item of kind {item.modality.value} has {item.num_tokens} placeholders in the prompt, but "
                f"{found[item.digest].shape[0]} embeddings"
            )
    return [found[item.digest] for item, *_ in placed]


def _check_placeholder(place: Placement, placeholder_tokens: Mapping[Modality, Sequence[int]]) -> None:
    allowed = placeholder_tokens.get(place.item.modality)
    if allowed is not None and place.token_id not in allowed:
        raise ValueError(
            f"token {place.token_id} stands for media of kind {place.item.modality.value}: only {list(allowed)} may"
        )
