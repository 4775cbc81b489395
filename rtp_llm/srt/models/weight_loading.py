"""Load the tensors of a checkpoint into a model: every tensor must have a place, and every place must be filled."""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rtp_llm.srt.layers.quantization.base import QuantizationConfig, process_weights
from rtp_llm.srt.layers.weights import ShardId, Weights, fill, is_optional, shape_of
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.srt.models.registry import reason
from rtp_llm.srt.models.weight_files import WeightFileError
from rtp_llm.srt.models.weight_names import BASE_MODEL_PREFIX, Place, WeightNames
from rtp_llm.srt.models.written_bytes import WrittenBytes

logger = logging.getLogger(__name__)

HEADS = ("lm_head.weight ", "embed_out.weight ")  # how lines about a missing head begin


class WeightLoadError(ValueError):
    """Checkpoint and model do not fit together; the message names every tensor and parameter concerned."""


def load_weights(
    model: nn.Module,
    weights: Weights,
    num_layers: int | None = None,
    quant_config: QuantizationConfig | None = None,
    absent: Sequence[str] = (),
) -> None:
    """Load by the model's own ``load_weights(weights)`` if it has one, else declaratively.

    A parameter that this method did not set, or set in part only, is an error, unless it is optional; and if it returns
    the set of the parameter names that it loaded, so is a parameter that is not in the set.
    """
    own_method = ModelTraits.of(model).load_weights
    if own_method is None:
        load_weights_declaratively(model, weights, num_layers, quant_config, absent)
        return
    written = WrittenBytes(model.parameters())
    try:
        with written:
            loaded = own_method(weights)
    except (WeightFileError, WeightLoadError):  # of the files, or of a helper: their messages are complete
        raise
    except Exception as error:  # whatever a model's method may raise; the cause is chained
        raise WeightLoadError(f"{type(model).__name__}.load_weights failed: {reason(error)}") from error
    _check_own_loading(model, loaded, written)


def _check_own_loading(model: nn.Module, loaded: object, written: WrittenBytes) -> None:
    problems: defaultdict[str, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if is_optional(parameter):
            continue
        line = f"{name} {shape_of(parameter)}"
        missing = written.described(parameter)
        if isinstance(loaded, set) and name not in loaded:
            problems["parameters were not set by its load_weights"].append(line)
        elif missing:
            problems["parameters were not wholly set by its load_weights"].append(f"{line}: {missing}")
    if problems:
        raise _error(model, problems)


def load_weights_declaratively(
    model: nn.Module,
    weights: Weights,
    num_layers: int | None = None,
    quant_config: QuantizationConfig | None = None,
    absent: Sequence[str] = (),
) -> None:
    """Load every tensor of a checkpoint to the place that the model's names and class attributes give, strictly.

    A tensor's name is first rewritten by ``rename``, ``[(regex, replacement), ...]``, each applied in turn. It then is
    a parameter's or persistent buffer's own name, or becomes one through a module's ``weight_sources``, ``{checkpoint
    name: (parameter, shard id)}`` relative to the module, or through ``packed_modules_mapping``, ``{packed module:
    [its sources]}``; if all names of the checkpoint lack the prefix ``model.``, it is added. A tensor without a place
    is an error, unless it matches ``ignore`` (a list of regular expressions) or COMMON_IGNORE, belongs to a layer from
    ``num_layers`` on or to a module that is ``absent`` here, or ``quant_config.may_leave`` it.

    A parameter is filled by its ``weight_loader(parameter, tensor[, shard_id])``; without one, it is copied to.

    A parameter that is not in the checkpoint takes the values of another if ``weight_defaults``,
    ``{parameter: other parameter}``, names one.

    A head tied to the embedding may be stored beside it, alone, or not at all; stored with other values it is an error.

    A module's weights are processed (see ``layers.quantization.base``) as soon as it has all its parameters, so that at
    most one module is in memory twice.

    Raises:
        WeightLoadError: names all tensors without a place, parameters not (wholly) set, with what is missing of them,
            and shapes that do not fit.
    """
    load = _DeclarativeLoad(model, num_layers, quant_config, absent)
    for name, tensor in weights:
        load.add(name, tensor)
    load.finish()


class _DeclarativeLoad:
    """One run of ``load_weights_declaratively``: places of tensors, what is loaded, and the problems so far."""

    def __init__(
        self,
        model: nn.Module,
        num_layers: int | None,
        quant_config: QuantizationConfig | None,
        absent: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.num_layers = num_layers
        self.absent = tuple(f"{name}." for name in absent)
        self.quant_config = quant_config
        self.names = WeightNames(model)
        self.targets = self.names.targets
        self.loaded: dict[str, set[ShardId]] = {name: set() for name in self.targets}
        self.written = WrittenBytes(self.targets.values())
        self.misfits: set[str] = set()  # parameters that a tensor did not fit
        self.tied: dict[str, tuple[str, torch.Tensor]] = {}  # parameter of several names -> loaded (name, tensor)
        self.num_direct = 0
        self.prefixed: list[str] = []  # tensors that have a place only with the prefix
        self.ignored: Counter[str] = Counter()  # by reason
        self.problems: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        name = self.names.renamed(name)
        place = self.names.find(name)
        if place:
            self.num_direct += 1
        else:
            place = self.names.find(BASE_MODEL_PREFIX + name)
            if place:
                self.prefixed.append(f"{name} {shape_of(tensor)}")
        if place:
            self._load(name, place, tensor)
        else:
            self._leave(name, tensor)

    def _load(self, name: str, place: Place, tensor: torch.Tensor) -> None:
        shards = self.loaded[place.name]
        if place.name in self.tied:
            self._compare_tied(name, place.name, tensor)
        elif place.shard_id in shards or None in shards or (place.shard_id is None and shards):
            self.problems["tensors came twice"].append(f"{name} {shape_of(tensor)}")
        else:
            self._fill(name, place, tensor)
            self._mark(name, place, tensor)
            for alias in self.names.aliases(place.name):
                self._process(alias.rpartition(".")[0])

    def _fill(self, name: str, place: Place, tensor: torch.Tensor) -> None:
        target = self.targets[place.name]
        try:
            with self.written:
                fill(target, tensor, place.shard_id)
        except ValueError as error:
            self.misfits.update(self.names.aliases(place.name))
            self.problems["tensors do not fit"].append(f"{name} {shape_of(tensor)} into {place.name}: {error}")
        except Exception as error:
            error.add_note(f"while loading {name} {shape_of(tensor)} into {place.name} {shape_of(target)}")
            raise

    def _mark(self, name: str, place: Place, tensor: torch.Tensor) -> None:
        names = self.names.aliases(place.name)
        for alias in names:
            self.loaded[alias].add(place.shard_id)
            if len(names) > 1:
                self.tied[alias] = (name, tensor)

    def _process(self, path: str) -> None:
        """Process the weights of the module at ``path`` if it has all of them, optional ones included."""
        module = self.model.get_submodule(path)
        names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        if not all(self._is_complete(name) for name in names) or any(map(self._missing_values, names)):
            return
        try:
            process_weights(module)
        except ValueError as error:
            self.problems["layers cannot be used"].append(f"{path}: {error}")

    def _is_complete(self, name: str) -> bool:
        shards = self.loaded[name]
        return None in shards or (bool(shards) and shards >= self.names.wanted(name))

    def _compare_tied(self, name: str, target_name: str, tensor: torch.Tensor) -> None:
        first_name, first = self.tied[target_name]
        if first.shape == tensor.shape and torch.equal(first, tensor):
            self.ignored["tied to another tensor, and equal"] += 1
            return
        self.problems["tensors differ though the model ties them"].append(
            f"{name} {shape_of(tensor)} and {first_name} {shape_of(first)}: to use both, set tie_word_embeddings to "
            "false in config.json"
        )

    def _leave(self, name: str, tensor: torch.Tensor) -> None:
        why = self.names.why_ignored(name, self.num_layers)
        if name.startswith(self.absent) or f"{BASE_MODEL_PREFIX}{name}".startswith(self.absent):
            self.ignored["of other stages"] += 1
        elif why:
            self.ignored[why] += 1
        elif tensor.numel() == 0:
            self.ignored["as they are empty"] += 1
        elif self.quant_config and self.quant_config.may_leave(name, tensor):
            self.ignored[f"{self.quant_config.get_name()}, which does not need them"] += 1
        else:
            self.problems["tensors have no place in the model"].append(f"{name} {shape_of(tensor)}")

    def finish(self) -> None:
        """Raise WeightLoadError if anything was wrong; else log what was ignored."""
        if self.prefixed and self.num_direct:  # a mixture is not a checkpoint of the base model
            self.problems["tensors have no place in the model"] += self.prefixed
        self._take_defaults()
        unset = [line for name in self.names.distinct() for line in self._missing(name)]
        self.problems["parameters were not set"] += unset
        self.problems["parameters were set in part only"] += self._partly_set()
        if any(self.problems.values()):
            raise _error(self.model, self.problems)
        if self.prefixed:
            logger.info("the checkpoint was saved from the base model: its names were read as %s*", BASE_MODEL_PREFIX)
        if self.ignored:
            reasons = "; ".join(f"{count} by {reason}" for reason, count in self.ignored.items())
            logger.info("ignored %d tensors of the checkpoint: %s", self.ignored.total(), reasons)

    def _take_defaults(self) -> None:
        for name, other in self.names.declared.weight_defaults.items():
            if not self.loaded[name] and self.loaded[other]:
                with self.written:
                    self.targets[name].data.copy_(self.targets[other])
                self.loaded[name] = self.loaded[other]

    def _partly_set(self) -> list[str]:
        """Lines about parameters whose tensors all came, and yet did not fill them."""
        names = [name for name in self.names.distinct() if self.loaded[name] and not self._missing(name)]
        missing = {name: self._missing_values(name) for name in names if name not in self.misfits}
        return [f"{name} {shape_of(self.targets[name])}: {what}" for name, what in missing.items() if what]

    def _missing_values(self, name: str) -> str | None:
        target = self.targets[name]
        return None if is_optional(target) else self.written.described(target)

    def _missing(self, name: str) -> list[str]:
        """Lines for the error message about what the parameter still lacks."""
        shards, shape = self.loaded[name], shape_of(self.targets[name])
        if None in shards or (not shards and is_optional(self.targets[name])):
            return []
        parts = self.names.parts(name)
        if not parts:
            return [] if shards else [f"{name} {shape}"]
        missing = [source for source, shard_id in parts if shard_id not in shards]
        return [f"{name} {shape}, made of {', '.join(missing)}"] if missing else []


def _error(model: nn.Module, problems: Mapping[str, list[str]]) -> WeightLoadError:
    parts = [f"the checkpoint does not fit {type(model).__name__}:"]
    for problem, lines in problems.items():
        if lines:
            parts.append(f"{len(lines)} {problem}:\n  " + "\n  ".join(sorted(lines)))
    if any(line.startswith(HEADS) for line in problems.get("parameters were not set", [])):
        parts.append(
            "If the head is meant to share the embedding's weights, set tie_word_embeddings: "
            "--json-model-override-args '{\"tie_word_embeddings\": true}'"
        )
        if sum(map(len, problems.values())) == 1:
            parts.append(
                "Otherwise the checkpoint is of the bare model without a head, which gives hidden states (embeddings) "
                "and no tokens: take the whole model's"
            )
    return WeightLoadError("\n".join(parts))
