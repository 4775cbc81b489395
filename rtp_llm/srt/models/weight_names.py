"""Places of a checkpoint's tensors in a model, by the names that the model and its modules declare."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from rtp_llm.srt.layers.weights import COMMON_IGNORE, ShardId, declared_sources, packed_shard_ids, swap_part
from rtp_llm.srt.model_traits import ModelTraits

BASE_MODEL_PREFIX = "model."  # missing in the names of a checkpoint saved from the base model's class
_LAYER_NUMBER = re.compile(r"^(?:model\.)?layers\.(\d+)\.")


class Place(NamedTuple):
    name: str  # of the parameter or buffer
    shard_id: ShardId  # which of its sources; None: all of it


class WeightNames:
    """Maps a checkpoint's names to places in the model, and a parameter to the names that it is made of.

    Attributes:
        targets: every parameter and persistent buffer, under each of its names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.declared = ModelTraits.of(model)
        self.targets: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self._model = model
        self._ignore = [*self.declared.ignore, *COMMON_IGNORE]
        self._sources = {source: Place(*place) for source, place in declared_sources(model).items()}
        self._sources_of = _by_target(self._sources)
        self._names_of = _names_by_tensor(self.targets)
        self._wanted: dict[str, frozenset[ShardId]] = {}  # cache of ``wanted``

    def renamed(self, name: str) -> str:
        for pattern, replacement in self.declared.rename:
            name = re.sub(pattern, replacement, name)
        return name

    def find(self, name: str) -> Place | None:
        """Return the place of a renamed tensor; None if it has none."""
        if name in self.targets:
            return Place(name, None)
        if name in self._sources:
            return self._sources[name]
        for packed, sources in self.declared.packed_modules_mapping.items():
            for i, source in enumerate(sources):
                candidate = swap_part(name, source, packed)
                if candidate and candidate in self.targets:
                    return Place(candidate, self._shard_ids(candidate, packed)[i])
        return None

    def why_ignored(self, name: str, num_layers: int | None) -> str | None:
        """Return why a renamed tensor without a place may be ignored; None if it may not."""
        layer = _LAYER_NUMBER.match(name)
        pattern = next((pattern for pattern in self._ignore if re.search(pattern, name)), None)
        if pattern:
            return pattern
        if layer and num_layers is not None and int(layer[1]) >= num_layers:
            return f"layers from number {num_layers} on"
        return None

    def aliases(self, name: str) -> list[str]:
        """Return all names of a target, this one included."""
        return self._names_of[id(self.targets[name])]

    def distinct(self) -> list[str]:
        """One name of each target."""
        return [names[0] for names in self._names_of.values()]

    def parts(self, name: str) -> list[tuple[str, ShardId]]:
        """Return the checkpoint's tensors that are fused in a parameter, with shard ids; empty if it is one tensor."""
        if name in self._sources_of:
            return self._sources_of[name]
        for packed, sources in self.declared.packed_modules_mapping.items():
            names = [source for source in (swap_part(name, packed, source) for source in sources) if source]
            if names and len(names) == len(sources):
                return list(zip(names, self._shard_ids(name, packed), strict=True))
        return []

    def wanted(self, name: str) -> frozenset[ShardId]:
        """Return the shard ids of all parts of a parameter; only None if it is one tensor."""
        if name not in self._wanted:
            self._wanted[name] = frozenset(shard_id for _, shard_id in self.parts(name)) or frozenset([None])
        return self._wanted[name]

    def _shard_ids(self, name: str, packed: str) -> tuple[ShardId, ...]:
        """Return the layer's shard ids of the sources, in the order of ``packed_modules_mapping``."""
        layer = self._model.get_submodule(name.rpartition(".")[0])
        return packed_shard_ids(layer, packed, len(self.declared.packed_modules_mapping[packed]))


def _by_target(sources: Mapping[str, Place]) -> dict[str, list[tuple[str, ShardId]]]:
    """Return parameters -> the sources that they fuse, with shard ids; without parameters of one source."""
    by_target: defaultdict[str, list[tuple[str, ShardId]]] = defaultdict(list)
    for source, place in sources.items():
        if place.shard_id is not None:
            by_target[place.name].append((source, place.shard_id))
    return dict(by_target)


def _names_by_tensor(targets: dict[str, torch.Tensor]) -> dict[int, list[str]]:
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, target in targets.items():
        names[id(target)].append(name)
    return dict(names)
