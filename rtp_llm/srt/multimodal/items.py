"""Items, the processed media of a prompt: the encoder's input, positions in the prompt, and cache keys.

Everything here is host data. ``MultimodalInputs.encode`` makes bytes of it, which the core passes on unread. Torch is
imported with the first item: a server of a text model needs none.
"""

import hashlib
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from rtp_llm.srt.multimodal.media_error import MediaError

if TYPE_CHECKING:
    import torch

    from rtp_llm.srt.multimodal.packing import Packed

PAD_START = 1 << 40  # ids from here on stand for media; no vocabulary reaches them
_ID_BYTES = 7  # of the digest stream per id: ids stay below 2**57, well within 64 bits


class Modality(Enum):
    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"

    @staticmethod
    def all() -> list["Modality"]:
        return [Modality.IMAGE, Modality.VIDEO, Modality.AUDIO]


@dataclass(init=False)
class MultimodalDataItem:
    """One image, video or sound.

    Attributes that are not listed live in ``model_specific_data``: ``item.image_grid_thw`` reads and writes there.

    Args:
        modality: its kind.
        feature: the encoder's input, usually pixel values; a list if parts differ in shape.
        offsets: runs of placeholder positions in the prompt, ``(first, last)`` inclusive, in order. The encoder's rows
            go to these positions one after the other.
        precomputed_embeddings: [n, hidden], the encoder's output, instead of a feature.
        model_specific_data: further inputs of the model's encoder.
    """

    modality: Modality
    feature: "torch.Tensor | list[torch.Tensor] | None" = None
    offsets: list[tuple[int, int]] = field(default_factory=list)
    precomputed_embeddings: "torch.Tensor | None" = None
    model_specific_data: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        modality: Modality,
        feature: "torch.Tensor | list[torch.Tensor] | None" = None,
        offsets: Sequence[tuple[int, int]] = (),
        precomputed_embeddings: "torch.Tensor | None" = None,
        model_specific_data: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self.modality = modality
        self.feature = feature
        self.offsets = [(int(first), int(last)) for first, last in offsets]
        self.precomputed_embeddings = precomputed_embeddings
        self.model_specific_data = {**(model_specific_data or {}), **more}

    def __getattr__(self, name: str) -> Any:
        is_own = name.startswith("_") or name in _ITEM_FIELDS
        if not is_own and name in self.model_specific_data:
            return self.model_specific_data[name]
        raise AttributeError(f"a MultimodalDataItem of this model has no {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if name != "offsets":
            self.__dict__.pop("_digest", None)
        if name in _ITEM_FIELDS:
            object.__setattr__(self, name, value)
        else:
            self.model_specific_data[name] = value

    @property
    def num_tokens(self) -> int:
        """Placeholder positions in the prompt."""
        return sum(last - first + 1 for first, last in self.offsets)

    @property
    def positions(self) -> list[int]:
        return [position for first, last in self.offsets for position in range(first, last + 1)]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the encoder's input: kinds, shapes and contents. Computed once."""
        if "_digest" not in self.__dict__:
            from rtp_llm.srt.multimodal.packing import absorb

            content = hashlib.sha256()
            for part in (self.modality.value, self.feature, self.precomputed_embeddings, self.model_specific_data):
                absorb(content, part)
            self._digest = content.digest()
        return self._digest

    @property
    def hash(self) -> int:
        """The first 64 bits of the digest, for logs and cheap look-ups; equality needs the whole digest."""
        return int.from_bytes(self.digest[:8], "big")

    def pad_ids(self, num_ids: int) -> list[int]:
        """Return ids for the item's first ``num_ids`` positions, which are in no vocabulary.

        They come from an extendable-output function (SHAKE-256, FIPS 202) of the digest: equal items have
        equal ids, and ids of two items are equal with probability 2**-56 each.
        """
        stream = hashlib.shake_256(self.digest).digest(_ID_BYTES * num_ids)
        return [
            PAD_START + int.from_bytes(stream[start : start + _ID_BYTES], "big")
            for start in range(0, _ID_BYTES * num_ids, _ID_BYTES)
        ]

    @property
    def pad_value(self) -> int:
        """The id of the first position."""
        return self.pad_ids(1)[0]


_ITEM_FIELDS = {item.name for item in fields(MultimodalDataItem)}


@dataclass(slots=True)
class MultimodalInputs:
    """A prompt's media.

    ``mrope_positions`` [3, prompt tokens] int64 are the multimodal rotary positions (time, height, width) of the
    prompt; a generated token's are its place in the sequence plus ``mrope_position_delta``, three times.
    """

    mm_items: list[MultimodalDataItem]
    im_token_id: int | None = None
    im_start_id: int | None = None
    im_end_id: int | None = None
    slice_start_id: int | None = None
    slice_end_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    audio_start_id: int | None = None
    audio_end_id: int | None = None
    mrope_positions: "torch.Tensor | None" = None
    mrope_position_delta: int = 0

    @classmethod
    def from_processor_output(cls, output: "MultimodalProcessorOutput") -> Self:
        return cls(**{item.name: getattr(output, item.name) for item in fields(cls)})

    def contains_image_inputs(self) -> bool:
        return any(item.modality is Modality.IMAGE for item in self.mm_items)

    def token_id_of(self, modality: Modality) -> int | None:
        """Return the placeholder's id for media of this kind."""
        ids = {
            Modality.IMAGE: self.im_token_id,
            Modality.VIDEO: self.video_token_id,
            Modality.AUDIO: self.audio_token_id,
        }
        return ids[modality]

    def encode(self) -> bytes:
        from rtp_llm.srt.multimodal.packing import pack

        return pack([*[_form_of(item) for item in self.mm_items], self._rest()])

    def _rest(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "mm_items"}

    @classmethod
    def decode(cls, data: bytes | mmap.mmap) -> Self:
        """Return the inputs of ``encode``'s bytes, in a time independent of their size: tensors are made on first use,
        from a mapped file without a copy."""
        from rtp_llm.srt.multimodal.packing import Packed

        packed = Packed(data)
        *items, rest = packed.structure
        return cls([_PackedItem(form, packed) for form in items], **packed.value(rest))


@dataclass(slots=True)
class MultimodalProcessorOutput(MultimodalInputs):
    """The result of ``process_mm_data_async``: the prompt's ids, each placeholder repeated for each row of its item (or
    as the model's ``pad_input_ids`` expects), and the media."""

    input_ids: list[int] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make it from a dict of the same keys, which processors may return instead. Other keys are refused."""
        unknown = set(values) - {item.name for item in fields(cls)}
        if unknown:
            known = ", ".join(item.name for item in fields(cls))
            raise MediaError(f"a processor returned {', '.join(sorted(unknown))}, which nobody reads; known: {known}")
        return cls(**values)


def _form_of(item: MultimodalDataItem) -> dict[str, Any]:
    return {
        "modality": item.modality.value,
        "feature": item.feature,
        "offsets": item.offsets,
        "precomputed_embeddings": item.precomputed_embeddings,
        "model_specific_data": item.model_specific_data,
        "digest": item.digest.hex(),
    }


class _PackedItem(MultimodalDataItem):
    """An item of decoded inputs, whose encoder input is decoded on first use."""

    def __init__(self, form: Mapping[str, Any], packed: "Packed") -> None:
        self.modality = Modality(form["modality"])
        self.offsets = [(first, last) for first, last in form["offsets"]]
        self._digest = bytes.fromhex(form["digest"])
        self._form = form
        self._packed = packed

    @cached_property
    def feature(self) -> Any:  # type: ignore[override]  # it may be set, as any cached property
        return self._packed.value(self._form["feature"])

    @cached_property
    def precomputed_embeddings(self) -> Any:  # type: ignore[override]
        return self._packed.value(self._form["precomputed_embeddings"])

    @cached_property
    def model_specific_data(self) -> Any:  # type: ignore[override]
        return self._packed.value(self._form["model_specific_data"])


# pad_input_ids


def pad_mm_tokens(input_ids: Sequence[int], mm_inputs: MultimodalInputs) -> list[int]:
    """Return the ids with each item's placeholder positions (its ``offsets``) replaced by its pad ids, as most models'
    ``pad_input_ids`` do. The input is not changed."""
    padded = list(input_ids)
    for item in mm_inputs.mm_items:
        positions = item.positions
        if positions and not 0 <= positions[0] <= positions[-1] < len(padded):
            raise MediaError(
                f"an item's offsets {item.offsets} do not lie in the prompt of {len(padded)} tokens, in order"
            )
        for position, pad_id in zip(positions, item.pad_ids(len(positions)), strict=True):
            padded[position] = pad_id
    return padded


def pad_placeholders(_model: object, input_ids: list[int], mm_inputs: MultimodalInputs) -> list[int]:
    """``pad_mm_tokens`` as a model's method: ``pad_input_ids = pad_placeholders``. It does not use the model."""
    return pad_mm_tokens(input_ids, mm_inputs)


def pad_mm_token_pairs(
    input_ids: Sequence[int],
    mm_inputs: MultimodalInputs,
    data_token_pairs: Sequence[tuple[int, int]],
    data_start_token_ids: Sequence[int] | None = None,
) -> list[int]:
    """Replace ids between pairs of tokens by pad ids, set the items' offsets accordingly, and return the ids.

    For models that wrap an item in start and end tokens, in one or more pieces.

    Args:
        data_token_pairs: (start, end) token ids; ids strictly between are placeholders.
        data_start_token_ids: starts that begin the next item; None: every start does. Other pairs continue it.

    Raises:
        MediaError: starts and ends do not match, or the number of items differs.
    """
    ends = dict(data_token_pairs)
    begins = set(ends if data_start_token_ids is None else data_start_token_ids)
    runs: list[list[tuple[int, int]]] = []
    open_at, end_id = -1, -1
    for position, token_id in enumerate(input_ids):
        if open_at >= 0:
            if token_id == end_id:
                runs[-1].append((open_at + 1, position - 1))
                open_at = -1
        elif token_id in ends:
            if token_id in begins:
                runs.append([])
            if not runs:
                raise MediaError(f"token {token_id} at {position} goes on with an item, but none has begun")
            open_at, end_id = position, ends[token_id]
    if open_at >= 0:
        raise MediaError(f"the item that begins at {open_at} is not ended by token {end_id}")
    if len(runs) != len(mm_inputs.mm_items):
        raise MediaError(f"the prompt has places for {len(runs)} items, but there are {len(mm_inputs.mm_items)}")
    for item, item_runs in zip(mm_inputs.mm_items, runs, strict=True):
        item.offsets = [(first, last) for first, last in item_runs if first <= last]
    return pad_mm_tokens(input_ids, mm_inputs)


def vocabulary_ids(padded: Sequence[int], mm_inputs: MultimodalInputs) -> list[int]:
    """Return the output of a model's ``pad_input_ids`` with pad ids replaced by placeholder ids (0 if there is none).

    Raises:
        MediaError: pad ids are not at the items' offsets, in their order.
    """
    ids = list(padded)
    for item in mm_inputs.mm_items:
        token_id = mm_inputs.token_id_of(item.modality) or 0
        positions = item.positions
        if positions and not 0 <= positions[0] <= positions[-1] < len(ids):
            raise MediaError(f"an item's offsets {item.offsets} do not lie in the padded prompt of {len(ids)} tokens")
        if [padded[position] for position in positions] != item.pad_ids(len(positions)):
            raise MediaError(
                f"the padded prompt does not hold the item's pad ids at its offsets {item.offsets}: pad_input_ids must "
                "set both (pad_mm_tokens does)"
            )
        for position in positions:
            ids[position] = token_id
    strays = [position for position, token_id in enumerate(ids) if token_id >= PAD_START]
    if strays:
        raise MediaError(f"the padded prompt has pad ids at {strays[:3]}, where no item's offsets are")
    return ids


def media_blocks(mm_inputs: MultimodalInputs) -> list[tuple[int, int]]:
    """Return runs (first, last) of media positions, neighbours joined: blocks of two-way attention in Gemma 3."""
    blocks: list[tuple[int, int]] = []
    for first, last in sorted(run for item in mm_inputs.mm_items for run in item.offsets):
        if blocks and blocks[-1][1] + 1 == first:
            first = blocks.pop()[0]
        blocks.append((first, last))
    return blocks
