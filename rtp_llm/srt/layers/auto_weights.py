"""Weights for model files that load them by a method of their own, in the form of vLLM's.

    def load_weights(self, weights):
        mapper = WeightsMapper(orig_to_new_prefix={"transformer.": "model."}, orig_to_new_stacked=...)
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)

A model file needs none of this if names alone tell where tensors belong: see ``packed_modules_mapping`` and ``rename``.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.layers.weights import (
    COMMON_IGNORE,
    ShardId,
    Weights,
    declared_sources,
    fill,
    packed_shard_ids,
    shape_of,
    swap_part,
)
from rtp_llm.srt.model_traits import ModelTraits

__all__ = ["AutoWeightsLoader", "WeightsMapper", "maybe_remap_kv_scale_name"]

logger = logging.getLogger(__name__)

_KV_SCALE = re.compile(r"(^|[._])([qkv]|kv)(_cache)?[._](scale|zero_point)$")


@dataclass(frozen=True)
class WeightsMapper:
    """Changes names of a checkpoint's tensors, by rules that all apply, in the order of the attributes.

    None in place of a new part drops the tensor. ``|`` joins the rules of two mappers; the right one's win.

    Attributes:
        orig_to_new_renaming: objects with ``rename_source_key(name) -> (name, _)``, such as transformers'
            ``WeightRenaming``.
        orig_to_new_regex: regular expressions, of which every match is replaced.
        orig_to_new_substr: parts of names; the first occurrence is replaced.
        orig_to_new_stacked: parts of names -> new part, and the shard of that parameter that the tensor is; a tuple of
            shards lie in it side by side, and a list of shards each get all of it.
        orig_to_new_prefix, orig_to_new_suffix: beginnings and ends.
    """

    orig_to_new_renaming: Sequence[Any] = ()
    orig_to_new_regex: Mapping[str | re.Pattern[str], str | None] = field(default_factory=dict)
    orig_to_new_substr: Mapping[str, str | None] = field(default_factory=dict)
    orig_to_new_stacked: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    orig_to_new_prefix: Mapping[str, str | None] = field(default_factory=dict)
    orig_to_new_suffix: Mapping[str, str | None] = field(default_factory=dict)

    def __or__(self, other: "WeightsMapper") -> "WeightsMapper":
        rules = {rule.name: {**getattr(self, rule.name), **getattr(other, rule.name)} for rule in fields(self)[1:]}
        return WeightsMapper([*self.orig_to_new_renaming, *other.orig_to_new_renaming], **rules)

    def map_name(self, name: str) -> str | None:
        """Return the new name; None: the tensor is dropped."""
        placed = self._placed(name)
        return None if placed is None else placed[0]

    def apply(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors under their new names. One that is a shard has it as its attribute ``shard_id``."""
        for name, tensor in weights:
            placed = self._placed(name)
            if placed is None:
                continue
            new_name, shards = placed
            if shards is None:
                yield new_name, tensor
                continue
            for shard_id in shards if isinstance(shards, list) else [shards]:
                shard = tensor.detach()  # an object of its own, on the same memory
                shard.shard_id = shard_id  # type: ignore[attr-defined]
                yield new_name, shard

    def apply_list(self, names: Iterable[str]) -> list[str]:
        return [new_name for name in names if (new_name := self.map_name(name)) is not None]

    def apply_dict(self, values: Mapping[str, Any]) -> dict[str, Any]:
        placed = ((self.map_name(name), value) for name, value in values.items())
        return {name: value for name, value in placed if name is not None}

    def _placed(self, name: str) -> tuple[str, Any] | None:
        """Return the new name and the shard or shards (None: it is not one); None if the tensor is dropped."""
        for renaming in self.orig_to_new_renaming:
            name, _ = renaming.rename_source_key(name)
        for pattern, new in self.orig_to_new_regex.items():
            compiled = re.compile(pattern) if isinstance(pattern, str) else pattern  # also one of the package regex
            if compiled.search(name):
                if new is None:
                    return None
                name = compiled.sub(new, name)
        for part, new in self.orig_to_new_substr.items():
            if part in name:
                if new is None:
                    return None
                name = name.replace(part, new, 1)
        shards = None
        for part, (new, part_shards) in self.orig_to_new_stacked.items():
            if part in name:
                name, shards = name.replace(part, new, 1), part_shards
        return self._placed_by_ends(name, shards)

    def _placed_by_ends(self, name: str, shards: Any) -> tuple[str, Any] | None:
        for prefix, new in self.orig_to_new_prefix.items():
            if name.startswith(prefix):
                if new is None:
                    return None
                name = new + name.removeprefix(prefix)
        for suffix, new in self.orig_to_new_suffix.items():
            if name.endswith(suffix):
                if new is None:
                    return None
                name = name.removesuffix(suffix) + new
        return name, shards


class AutoWeightsLoader:
    """Loads tensors into a module by their names, strictly.

    A name is a parameter's or persistent buffer's, one that a layer declares in ``weight_sources``, or a source in the
    ``packed_modules_mapping`` of a module above it, after that module's ``rename``. A submodule with a ``load_weights``
    of its own gets its tensors, under names relative to it. A tensor without a place is an error, unless it is skipped,
    may be missing by the arguments, is ignored for every model (rotary frequencies, causal masks), or is a bias of
    zeros.

    Args:
        skip_prefixes, skip_substrs: tensors with such names are not loaded.
        ignore_unexpected_prefixes, ignore_unexpected_suffixes: tensors with such names need no place.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        skip_prefixes: Iterable[str] | None = None,
        skip_substrs: Iterable[str] | None = None,
        ignore_unexpected_prefixes: Iterable[str] | None = None,
        ignore_unexpected_suffixes: Iterable[str] | None = None,
    ) -> None:
        self.module = module
        self.skip_prefixes = tuple(skip_prefixes or ())
        self.skip_substrs = tuple(skip_substrs or ())
        self.ignore_prefixes = tuple(ignore_unexpected_prefixes or ())
        self.ignore_suffixes = tuple(ignore_unexpected_suffixes or ())

    def load_weights(self, weights: Weights, *, mapper: WeightsMapper | None = None) -> set[str]:
        """Load the tensors, with names changed by ``mapper``.

        Returns:
            The names of the parameters and buffers that were loaded, relative to the module.

        Raises:
            ValueError: tensors have no place, do not fit, or differ although the model ties them; all that have no
                place are named.
        """
        run = _Run(self, self.module)
        named = mapper.apply(weights) if mapper else weights
        kept = ((name, tensor) for name, tensor in named if not self._skips(name))
        for path, group in groupby(kept, key=lambda pair: run.delegate_of(pair[0])):
            run.take(path, group)
        run.finish()
        return run.loaded

    def _skips(self, name: str) -> bool:
        return name.startswith(self.skip_prefixes) or any(part in name for part in self.skip_substrs)

    def may_leave(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor needs no place."""
        if name.startswith(self.ignore_prefixes) or name.endswith(self.ignore_suffixes):
            return True
        return any(re.search(pattern, name) for pattern in COMMON_IGNORE) or (
            name.endswith(".bias") and not bool(tensor.any())
        )


class _Run:
    """One call of ``AutoWeightsLoader.load_weights``."""

    def __init__(self, loader: AutoWeightsLoader, module: nn.Module) -> None:
        self.loader = loader
        self.module = module
        self.targets: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
        self.sources = declared_sources(module)
        self.delegates = {
            path: submodule
            for path, submodule in module.named_modules()
            if path and callable(getattr(submodule, "load_weights", None))
        }
        self.declaring = {
            path: ModelTraits.of(submodule)
            for path, submodule in module.named_modules()
            if hasattr(submodule, "packed_modules_mapping") or hasattr(submodule, "rename")
        }
        self.first_names: dict[int, str] = {}  # of tensors with several names, all of them -> the first
        for name, target in self.targets.items():
            self.first_names.setdefault(id(target), name)
        self.several = {name for name, target in self.targets.items() if self.first_names[id(target)] != name}
        self.several |= {self.first_names[id(self.targets[name])] for name in self.several}
        self.tied: dict[str, tuple[str, torch.Tensor]] = {}  # first name -> loaded (name, tensor)
        self.loaded: set[str] = set()
        self.without_place: list[str] = []

    def delegate_of(self, name: str) -> str:
        """Return the path of the outermost submodule that loads the tensor by itself; empty: none does."""
        parts = name.split(".")
        paths = (".".join(parts[:i]) for i in range(1, len(parts)))
        return next((path for path in paths if path in self.delegates), "")

    def take(self, path: str, weights: Weights) -> None:
        """Load tensors, by the submodule at ``path`` if there is one."""
        if not path:
            self._load(weights)
            return
        submodule: Any = self.delegates[path]
        below = f"{path}."
        loaded = submodule.load_weights((name.removeprefix(below), tensor) for name, tensor in weights)
        if loaded is None:  # it does not tell
            loaded = submodule.state_dict()
        self.loaded |= {below + name for name in loaded}

    def _load(self, weights: Weights) -> None:
        for name, tensor in weights:
            shard_id: ShardId = getattr(tensor, "shard_id", None)
            if name in self.targets:
                self._fill(name, name, tensor, shard_id)
            elif place := self.sources.get(name) or self._declared_place(name):
                target_name, source_shard_id = place
                self._fill(name, target_name, tensor, shard_id if source_shard_id is None else source_shard_id)
            elif not self.loader.may_leave(name, tensor):
                self.without_place.append(f"{name} {shape_of(tensor)}")

    def _declared_place(self, name: str) -> tuple[str, ShardId] | None:
        """Return the place by what the modules above declare, the nearest first; None if they do not say."""
        parts = name.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            path = ".".join(parts[:depth])
            if path in self.declaring:
                found = self._place_below(path, ".".join(parts[depth:]))
                if found is not None:
                    return found
        return None

    def _place_below(self, path: str, name: str) -> tuple[str, ShardId] | None:
        declared = self.declaring[path]
        for pattern, replacement in declared.rename:
            name = re.sub(pattern, replacement, name)
        whole = f"{path}.{name}".removeprefix(".")
        if whole in self.targets:
            return whole, None
        if whole in self.sources:
            return self.sources[whole]
        for packed, sources in declared.packed_modules_mapping.items():
            for i, source in enumerate(sources):
                candidate = swap_part(whole, source, packed)
                if candidate in self.targets:
                    layer = self.module.get_submodule(candidate.rpartition(".")[0])
                    return candidate, packed_shard_ids(layer, packed, len(sources))[i]
        return None

    def _fill(self, name: str, target_name: str, tensor: torch.Tensor, shard_id: ShardId) -> None:
        target = self.targets[target_name]
        first_name = self.first_names[id(target)]
        if target_name in self.several and shard_id is None:
            if first_name in self.tied:
                self._compare(name, tensor, *self.tied[first_name])
                return
            self.tied[first_name] = name, tensor
        try:
            fill(target, tensor, shard_id)
        except ValueError as error:
            raise ValueError(f"{name} {shape_of(tensor)} does not fit {target_name}: {error}") from error
        self.loaded |= {target_name, first_name}

    def _compare(self, name: str, tensor: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
        if first.shape != tensor.shape or not torch.equal(first, tensor):
            raise ValueError(
                f"{name} and {first_name} differ though {type(self.module).__name__} ties them: to use both, set "
                "tie_word_embeddings to false in config.json"
            )

    def finish(self) -> None:
        if self.without_place:
            lines = "\n  ".join(sorted(self.without_place))
            raise ValueError(
                f"{len(self.without_place)} tensors have no place in {type(self.module).__name__}:\n  {lines}"
            )


def maybe_remap_kv_scale_name(name: str, params_dict: Mapping[str, Any]) -> str | None:
    """Return the name; None if it is a scale of a quantized cache, which is not needed: the cache is not scaled."""
    return None if name not in params_dict and _KV_SCALE.search(name) else name
