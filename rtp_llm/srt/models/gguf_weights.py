"""The weights of a GGUF file as a checkpoint's: under its names, with what the converter changed undone."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.gguf.changes import CHANGES
from rtp_llm.srt.gguf.file import GGUFFile, GGUFTensor
from rtp_llm.srt.gguf.form import GGUFForm, declared_forms
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.names import PART, checkpoint_names
from rtp_llm.srt.kernels.block_tensor import BlockTensor
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES
from rtp_llm.srt.layers.weights import Weights
from rtp_llm.srt.models.mapped_pages import MappedFile
from rtp_llm.srt.models.weight_files import Progress
from rtp_llm.srt.models.weight_names import WeightNames

logger = logging.getLogger(__name__)

PLAIN_TYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
VALUES_AT_ONCE = 1 << 20  # that the gguf package dequantizes


def gguf_weights(
    files: Sequence[Path], model: nn.Module, model_config: ModelConfig, progress: Progress | None = None
) -> Weights:
    """Yield ``(name, tensor)`` of every tensor, in the order of the file; blocks as a BlockTensor in the default dtype.

    As with ``read_weights``, a tensor is a view of a memory map, and its pages are dropped when the next is requested.

    Args:
        files: of one GGUF, all its parts.

    Raises:
        GGUFError: a file is damaged, a tensor is of a type that cannot be read, or the model's class declares no form
            for the file; from this call, not from the iterator.
    """
    file = GGUFFile.open(files[0], with_vocabulary=False)
    form = _form(type(model), file)
    _check_types(file.tensors.values(), torch.get_default_dtype())
    names = WeightNames(model)
    to_checkpoint = checkpoint_names(
        file.architecture,
        file.tensors,
        form.names,
        lambda name: names.find(names.renamed(name)),
        lambda name: names.why_ignored(names.renamed(name), model_config.num_layers),
    )
    reading = _Reading(file, form, to_checkpoint, names.declared.weight_defaults, model_config)
    return chain(reading.run(progress), _of_metadata(file, form, names))


class _Reading:
    """One reading of a file. ``defaults``: parameters that take another one's values where the file has none."""

    def __init__(
        self,
        file: GGUFFile,
        form: GGUFForm,
        names: Mapping[str, str],
        defaults: Mapping[str, str],
        model_config: ModelConfig,
    ) -> None:
        self.file, self.form, self.names = file, form, names
        self.config: Any = model_config.hf_text_config
        present = set(names.values())
        self.copies = {other: name for name, other in defaults.items() if name not in present}
        self.sources: defaultdict[str, list[str]] = defaultdict(list)  # checkpoint name -> the file's, in this order
        for name in sorted(names, key=self._rank):
            self.sources[names[name]].append(name)
        self.waiting: dict[str, torch.Tensor] = {}  # tensors of the file that others belong to

    def _rank(self, name: str) -> int:
        """The place of a tensor among those that are one of the checkpoint's: as the form lists them."""
        pattern = re.sub(r"^blk\.\d+\.", "blk.{bid}.", name)
        order = list(self.form.names)
        return next((order.index(key) for key in (pattern, pattern.rpartition(".")[0]) if key in order), len(order))

    def run(self, progress: Progress | None) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = sorted((self.file.tensors[name] for name in self.names), key=lambda tensor: tensor.data.data_ptr())
        total, done = sum(path.stat().st_size for path in self.file.paths), 0
        mapped = [MappedFile(path) for path in self.file.paths]
        for tensor in tensors:
            yield from self._named(tensor)
            for part in mapped:
                part.drop(tensor.data)
            done += tensor.nbytes
            if progress:
                progress(min(done, total), total)
        if progress:
            progress(total, total)

    def _named(self, tensor: GGUFTensor) -> Iterator[tuple[str, torch.Tensor]]:
        name = self.names[tensor.name]
        self.waiting[tensor.name] = as_torch(tensor, torch.get_default_dtype())
        if not all(source in self.waiting for source in self.sources[name]):
            return
        whole = self._undone(name, [self.waiting.pop(source) for source in self.sources[name]])
        if PART not in name:
            yield name, whole
            if name in self.copies:
                yield self.copies[name], whole
            return
        for number, part in enumerate(whole.unbind(0)):
            yield name.replace(PART, str(number)), part

    def _undone(self, name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
        found = [change for pattern, change in self.form.changes if re.search(pattern, name.replace(PART, "0"))]
        if len(tensors) > 1 and not found:
            raise GGUFError(f"{', '.join(self.sources[name])} are {name} together, but no change of the form says how")
        for change in found:
            try:
                tensors = [CHANGES[change](tensors, self.config)]
            except (RuntimeError, ValueError) as error:
                sources = ", ".join(self.sources[name])
                raise GGUFError(f"{sources} {list(tensors[0].shape)} cannot be {change}: {error}") from error
        return tensors[0]


def _of_metadata(file: GGUFFile, form: GGUFForm, names: WeightNames) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of one number that layers have as values of the metadata."""
    for key, pattern in form.values.items():
        values = file.metadata.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, float) for value in values):
            raise GGUFError(f"`{key}` must be a list of numbers, not {values!r:.40}")
        for layer, value in enumerate(values):
            name = pattern.replace("{bid}", str(layer))
            if place := names.find(names.renamed(name)):
                yield name, torch.full_like(names.targets[place.name], value)


def as_torch(tensor: GGUFTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a view of a tensor's data; a BlockTensor in ``dtype``, or computed values, where it is not of numbers."""
    kind = tensor.type.name
    if kind in PLAIN_TYPES:
        return tensor.data.view(PLAIN_TYPES[kind])
    if kind in BLOCK_TYPES:
        return BlockTensor(tensor.data, kind, dtype)
    rows = tensor.data.flatten(0, -2) if tensor.data.dim() > 1 else tensor.data[None]
    values = torch.empty(len(rows), tensor.shape[-1], dtype=dtype, device="cpu")
    size = max(1, VALUES_AT_ONCE // tensor.shape[-1])
    for start in range(0, len(rows), size):
        piece = gguf.quants.dequantize(rows[start : start + size].numpy(), tensor.type)
        values[start : start + size] = torch.from_numpy(piece)
    return values.view(tensor.shape)


def _form(model_class: type[nn.Module], file: GGUFFile) -> GGUFForm:
    forms = [form for form in declared_forms(model_class) if form.architecture == file.architecture]
    for form in forms:
        if unknown := {change for _, change in form.changes} - CHANGES.keys():
            raise GGUFError(
                f"{model_class.__name__}.gguf: unknown changes {', '.join(unknown)}; have {', '.join(CHANGES)}"
            )
    matching = [form for form in forms if form.matches is None or form.matches(file.metadata)]
    if not matching:
        raise GGUFError(
            f"{file.paths[0]} is of architecture {file.architecture!r}, for which {model_class.__name__} declares no "
            "form: it would be a GGUFForm in its attribute `gguf`"
        )
    return max(matching, key=lambda form: form.matches is not None)


def _check_types(tensors: Iterable[GGUFTensor], dtype: torch.dtype) -> None:
    """Refuse types that cannot be read; log the others, with a warning for those that do not stay in their blocks."""
    counts: Counter[str] = Counter()
    computed: Counter[str] = Counter()  # bytes as values
    for tensor in tensors:
        kind = tensor.type.name
        counts[kind] += 1
        if kind not in PLAIN_TYPES and kind not in BLOCK_TYPES:
            if not _is_readable(tensor.type):
                raise GGUFError(
                    f"tensor {tensor.name!r} is of type {kind}, which cannot be read; have "
                    f"{', '.join([*PLAIN_TYPES, *BLOCK_TYPES])} and what the gguf package can dequantize"
                )
            computed[kind] += prod(tensor.shape) * dtype.itemsize
    logger.info("types of tensors: %s", ", ".join(f"{number} {kind}" for kind, number in counts.most_common()))
    if computed:
        logger.warning(
            "tensors of %s are loaded as values in %s, since no products read these blocks: they take %.1f GB",
            ", ".join(computed),
            str(dtype).removeprefix("torch."),
            computed.total() / 1e9,
        )


def _is_readable(kind: gguf.GGMLQuantizationType) -> bool:
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True
