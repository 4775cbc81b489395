"""From a checkpoint directory to a model ready to run."""

import inspect
import logging
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from rtp_llm.srt.configs.model_config import CONFIG_FILE, ModelConfig
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.quantization import mxfp4
from rtp_llm.srt.layers.quantization.base import (
    ExpertsMethodBase,
    QuantizationConfig,
    QuantizationError,
    QuantizedModel,
)
from rtp_llm.srt.layers.quantization.packed import PackedLinearMethod
from rtp_llm.srt.layers.quantization.registry import quantization_config, scheme_name
from rtp_llm.srt.layers.quantization.unquantized import UnquantizedLinearMethod
from rtp_llm.srt.layers.rotary import share_ropes
from rtp_llm.srt.models.quantization_settings import quantization_settings
from rtp_llm.srt.models.registry import ModelRegistry, UnknownArchitectureError, reason
from rtp_llm.srt.models.weight_files import Progress, WeightFileError, find_weight_files, read_weights

logger = logging.getLogger(__name__)

Weights = Iterable[tuple[str, torch.Tensor]]
ShardId = str | int | tuple[int, str] | None  # which source of a packed parameter; None: all of it

FALLBACK = "TransformersForCausalLM"  # runs models of transformers that have no file here
BASE_MODEL_PREFIX = "model."  # what names lack in a checkpoint saved from the base model's class
HEADS = ("lm_head.weight ", "embed_out.weight ")  # how lines about a missing head begin
COMMON_IGNORE = (
    r"(^|\.)rotary_emb\.(original_)?inv_freq$",
    r"(^|\.)rotary_emb\.(cos_cached|sin_cached|cos_sin_cache)$",
    r"(^|\.)(self_)?(attn|attention)\.(bias|masked_bias)$",  # causal masks kept as buffers
    r"(^|\.)embeddings\.position_ids$",  # 0, 1, 2, ... kept as a buffer
    r"^(model\.)?mtp(_layers|_block)?\.",  # multi-token prediction
)
_LAYER_NUMBER = re.compile(r"^(?:model\.)?layers\.(\d+)\.")


class ModelBuildError(ValueError):
    """The model class cannot be constructed from the checkpoint's configuration; the cause is chained."""


class WeightLoadError(ValueError):
    """Checkpoint and model do not fit; the message names every tensor and parameter concerned."""


def load_model(
    model_config: ModelConfig,
    model_path: str,
    load_format: str = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
    model_impl: str = "auto",
    quantization: str | None = None,
) -> nn.Module:
    """Builds the model of ``model_config`` on ``device``, in its dtype, and loads its weights from a local directory.

    ``load_format="dummy"`` needs no weight file: parameters get small random values, the same at every call.
    ``model_impl``: ``rtp_llm`` takes registered classes, ``transformers`` that library's own, ``auto`` the latter where
    there is no other. ``quantization``: a scheme of ``layers.quantization.registry``; None: the checkpoint's own.

    Raises:
        UnknownArchitectureError, ModelImportError: no model class (see registry.py), nor one of transformers that can
            be served.
        ModelBuildError: the model class does not get on with the configuration.
        WeightsNotFoundError, WeightFileError: no usable weight files (see weight_files.py).
        WeightLoadError: they do not fit the model.
        QuantizationError: an unknown scheme, or one that does not go with the checkpoint.
    """
    settings = quantization_settings(model_config)
    source = model_path, load_format, device, progress, scheme_name(quantization, settings), settings
    if model_impl == "transformers":
        return _load(ModelRegistry.models[FALLBACK], model_config, *source)
    try:
        model_class, _ = ModelRegistry.resolve_model_cls(model_config.architectures)
    except UnknownArchitectureError as unknown:
        if model_impl == "rtp_llm":
            raise
        return _load_fallback(unknown, model_config, *source)
    return _load(model_class, model_config, *source)


def _load_fallback(unknown: UnknownArchitectureError, model_config: ModelConfig, *where: Any) -> nn.Module:
    """Raises ``unknown``, extended, if transformers cannot step in either."""
    logger.info("no model file for %s: it runs through transformers", ", ".join(model_config.architectures))
    try:
        return _load(ModelRegistry.models[FALLBACK], model_config, *where)
    except ModelBuildError as error:
        raise UnknownArchitectureError(f"{unknown}\nNor can it run through transformers: {error}") from error


def _load(
    model_class: type[nn.Module],
    model_config: ModelConfig,
    model_path: str,
    load_format: str,
    device: str,
    progress: Progress | None,
    scheme: str | None,
    settings: Mapping[str, Any],
) -> nn.Module:
    quant_config = _quant_config(scheme, settings, model_class, model_config)
    files = [] if load_format == "dummy" else find_weight_files(model_path, load_format)
    with _built_as(model_config.dtype, device), share_ropes(), torch.no_grad():
        model = _build(model_class, model_config, quant_config)
        if load_format == "dummy":
            fill_with_dummy_weights(model)
        else:
            weights = read_weights(files, progress)
            if scheme == mxfp4.QUANT_METHOD:
                weights = mxfp4.dequantize_experts(weights, torch.get_default_dtype(), device)
            load_weights(model, weights, model_config.num_layers, quant_config)
        _finish(model, model_config)
    if quant_config:
        _tell_of_quantization(model, quant_config)
    return model.eval().requires_grad_(False)


def _tell_of_quantization(model: nn.Module, quant_config: QuantizationConfig) -> None:
    """Raises QuantizationError if no layer is quantized: what was asked for must have an effect."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    plain = sum(isinstance(method, UnquantizedLinearMethod) for method in methods)
    quantized = sum(isinstance(method, (PackedLinearMethod, ExpertsMethodBase)) for method in methods)
    if not quantized:
        raise QuantizationError(f"{quant_config.get_name()} quantizes no layer of {type(model).__name__}")
    logger.info("quantized by %s: %d linear layers; %d are as they were", quant_config.get_name(), quantized, plain)


def _build(
    model_class: type[nn.Module], model_config: ModelConfig, quant_config: QuantizationConfig | None
) -> nn.Module:
    _check_model_class(model_class)
    try:
        model = model_class(config=model_config.hf_config, quant_config=quant_config)
    except Exception as error:  # whatever a model's constructor may raise; the cause is chained
        raise ModelBuildError(
            f"{model_class.__name__} cannot be built from {model_config.model_path}/{CONFIG_FILE}: {reason(error)}"
        ) from error
    _mark_heads(model)
    return model


def _mark_heads(model: nn.Module) -> None:
    """An embedding that has two places in the model is its head as well."""
    names: Counter[nn.Module] = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for module, count in names.items():
        if isinstance(module, VocabParallelEmbedding) and count > 1:
            module.is_head = True


def _check_model_class(model_class: type[nn.Module]) -> None:
    if not issubclass(model_class, nn.Module):
        raise ModelBuildError(f"{model_class.__name__} is not a torch.nn.Module, which a model class must be")
    signature = inspect.signature(model_class)
    try:
        signature.bind(config=None, quant_config=None)
    except TypeError as error:
        raise ModelBuildError(
            f"{model_class.__name__} is built with the keyword arguments config and quant_config, but its constructor "
            f"takes {signature}: {error}. Write it as __init__(self, config, quant_config=None, prefix='')"
        ) from error


def _quant_config(
    scheme: str | None, settings: Mapping[str, Any], model_class: type[nn.Module], model_config: ModelConfig
) -> QuantizationConfig | None:
    if scheme is None or scheme == mxfp4.QUANT_METHOD:
        return None
    return quantization_config(
        scheme,
        QuantizedModel(
            settings=settings,
            packed_modules_mapping=getattr(model_class, "packed_modules_mapping", {}),
            rename=getattr(model_class, "rename", ()),
            has_encoders=model_config.hf_config is not model_config.hf_text_config,
        ),
    )


@contextmanager
def _built_as(dtype: str, device: str) -> Iterator[None]:
    """New tensors are of this dtype and on this device; the default dtype of before comes back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _finish(model: nn.Module, model_config: ModelConfig) -> None:
    for name, module in model.named_modules():
        try:
            process_weights(module)
        except ValueError as error:
            raise WeightLoadError(f"{name} of {model_config.model_path} cannot be used: {error}") from error
    for module in model.modules():
        finish_load: Any = getattr(module, "finish_load", None)
        if finish_load:
            try:
                finish_load()
            except Exception as error:  # whatever a model's method may raise; the cause is chained
                raise ModelBuildError(
                    f"{type(module).__name__} of {model_config.model_path} cannot be used: {reason(error)}"
                ) from error


def process_weights(module: nn.Module) -> None:
    """Has a layer's quantization method, if it has one, process what was loaded; once."""
    method: Any = getattr(module, "quant_method", None)
    process = getattr(method, "process_weights_after_loading", None)
    if process and not getattr(module, "weights_are_processed", False):
        process(module)
        module.weights_are_processed = True  # type: ignore[assignment]


def fill_with_dummy_weights(model: nn.Module) -> None:
    """Uniform values in [-0.05, 0.05) for every parameter and persistent buffer, integer ones zero.

    What a checkpoint need not have stays as it was made.

    The values depend on the name only, so that replicas on other ranks are equal.
    """
    for name, target in model.state_dict(keep_vars=True).items():
        if _is_optional(target):
            continue
        if not target.is_floating_point():
            target.zero_()
            continue
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
        values = torch.rand(target.shape, generator=generator, dtype=torch.float32, device="cpu")
        target.copy_(values.mul_(0.1).sub_(0.05))


def load_weights(
    model: nn.Module,
    weights: Weights,
    num_layers: int | None = None,
    quant_config: QuantizationConfig | None = None,
) -> None:
    """Loads by the model's own ``load_weights(weights)`` if it has one, else declaratively.

    Where such a method returns the set of the parameter names it loaded, a parameter that is not in it is an error.
    """
    own_method: Any = getattr(model, "load_weights", None)
    if own_method is None:
        load_weights_declaratively(model, weights, num_layers, quant_config)
        return
    try:
        loaded = own_method(weights)
    except (WeightFileError, WeightLoadError):  # of the files, or of a helper that it calls: they speak for themselves
        raise
    except Exception as error:  # whatever a model's method may raise; the cause is chained
        raise WeightLoadError(f"{type(model).__name__}.load_weights failed: {reason(error)}") from error
    if isinstance(loaded, set):
        unset = {name: parameter for name, parameter in model.named_parameters() if name not in loaded}
        if unset:
            lines = [f"{name} {_shape(parameter)}" for name, parameter in unset.items()]
            raise _error(model, {"parameters were not set by its load_weights": lines})


def load_weights_declaratively(
    model: nn.Module,
    weights: Weights,
    num_layers: int | None = None,
    quant_config: QuantizationConfig | None = None,
) -> None:
    """Puts every tensor of a checkpoint where the model's names and class attributes say it belongs, strictly.

    A tensor's name is first rewritten by ``rename``, ``[(regex, replacement), ...]``, each applied in turn. It then is
    a parameter's or persistent buffer's own name, or becomes one through a module's ``weight_sources``, ``{checkpoint
    name: (parameter, shard id)}`` relative to the module, or through ``packed_modules_mapping``, ``{packed module:
    [its sources]}``; if all names of the checkpoint lack the prefix ``model.``, it is supplied. What has no place may
    match ``ignore`` (a list of regular expressions), COMMON_IGNORE, or belong to a layer from ``num_layers`` on, or
    ``quant_config`` may leave it.

    A parameter is filled by its ``weight_loader(parameter, tensor[, shard_id])``, or copied to where it has none.

    A parameter of which a checkpoint has nothing takes the values of another where ``weight_defaults`` says so,
    ``{parameter: other parameter}``.

    A head tied to the embedding may be stored beside it, alone, or not at all; stored with other values it is an error.

    A module's weights are processed (see ``layers.quantization.base``) as soon as it has all its parameters, so that
    never more than one module is in memory twice.

    Raises:
        WeightLoadError: tensors without a place, parameters not (wholly) set, shapes that do not fit: all of them.
    """
    load = _DeclarativeLoad(model, num_layers, quant_config)
    for name, tensor in weights:
        load.add(name, tensor)
    load.finish()


class _Place(NamedTuple):
    name: str  # of the parameter or buffer
    shard_id: ShardId


class _DeclarativeLoad:
    """One run of ``load_weights_declaratively``: where each tensor goes, and what went wrong so far."""

    def __init__(self, model: nn.Module, num_layers: int | None, quant_config: QuantizationConfig | None) -> None:
        self.model = model
        self.num_layers = num_layers
        self.quant_config = quant_config
        self.targets: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self.names_of = _names_by_tensor(self.targets)
        self.sources = _declared_sources(model)
        self.sources_of = _by_target(self.sources)
        self.packed: dict[str, list[str]] = dict(getattr(model, "packed_modules_mapping", {}))
        self.rename: list[tuple[str, str]] = list(getattr(model, "rename", []))
        self.ignore = [*getattr(model, "ignore", []), *COMMON_IGNORE]
        self.loaded: dict[str, set[ShardId]] = {name: set() for name in self.targets}
        self.wanted: dict[str, frozenset[ShardId]] = {}  # by parameter, once it was asked for
        self.tied: dict[str, tuple[str, torch.Tensor]] = {}  # what a parameter of several names was given, and as what
        self.num_direct = 0
        self.prefixed: list[str] = []  # tensors that have a place only with the prefix
        self.ignored: Counter[str] = Counter()  # by reason
        self.problems: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        for pattern, replacement in self.rename:
            name = re.sub(pattern, replacement, name)
        place = self._find(name)
        if place:
            self.num_direct += 1
        else:
            place = self._find(BASE_MODEL_PREFIX + name)
            if place:
                self.prefixed.append(f"{name} {_shape(tensor)}")
        if place:
            self._load(name, place, tensor)
        else:
            self._leave(name, tensor)

    def _find(self, name: str) -> _Place | None:
        if name in self.targets:
            return _Place(name, None)
        if name in self.sources:
            return self.sources[name]
        for packed, sources in self.packed.items():
            for i, source in enumerate(sources):
                candidate = _swap(name, source, packed)
                if candidate and candidate in self.targets:
                    return _Place(candidate, self._shard_ids(candidate, packed)[i])
        return None

    def _shard_ids(self, name: str, packed: str) -> tuple[ShardId, ...]:
        """The ids that the layer's weight_loader knows the sources by, in the order of ``packed_modules_mapping``."""
        layer = self.model.get_submodule(name.rpartition(".")[0])
        sources = self.packed[packed]
        default = ("q", "k", "v") if packed.endswith("qkv_proj") and len(sources) == 3 else tuple(range(len(sources)))
        return tuple(getattr(layer, "shard_ids", default))

    def _load(self, name: str, place: _Place, tensor: torch.Tensor) -> None:
        shards = self.loaded[place.name]
        if place.name in self.tied:
            self._compare_tied(name, place.name, tensor)
        elif place.shard_id in shards or None in shards or (place.shard_id is None and shards):
            self.problems["tensors came twice"].append(f"{name} {_shape(tensor)}")
        else:
            self._fill(name, place, tensor)
            self._mark(name, place, tensor)
            self._process(place.name.rpartition(".")[0])

    def _fill(self, name: str, place: _Place, tensor: torch.Tensor) -> None:
        target = self.targets[place.name]
        try:
            _fill(target, tensor, place.shard_id)
        except ValueError as error:
            self.problems["tensors do not fit"].append(f"{name} {_shape(tensor)} into {place.name}: {error}")
        except Exception as error:
            error.add_note(f"while loading {name} {_shape(tensor)} into {place.name} {_shape(target)}")
            raise

    def _mark(self, name: str, place: _Place, tensor: torch.Tensor) -> None:
        names = self.names_of[id(self.targets[place.name])]
        for alias in names:
            self.loaded[alias].add(place.shard_id)
            if len(names) > 1:
                self.tied[alias] = (name, tensor)

    def _process(self, path: str) -> None:
        """Processes the weights of the module at ``path`` if it has all of them, those that it may lack included."""
        module = self.model.get_submodule(path)
        names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        if not all(self._is_complete(name) for name in names):
            return
        try:
            process_weights(module)
        except ValueError as error:
            self.problems["layers cannot be used"].append(f"{path}: {error}")

    def _is_complete(self, name: str) -> bool:
        shards = self.loaded[name]
        return None in shards or (bool(shards) and shards >= self._wanted(name))

    def _wanted(self, name: str) -> frozenset[ShardId]:
        """The ids of all that a parameter is made of; None alone if it is one tensor's."""
        if name not in self.wanted:
            self.wanted[name] = frozenset(self._find_wanted(name))
        return self.wanted[name]

    def _find_wanted(self, name: str) -> Iterable[ShardId]:
        if name in self.sources_of:
            return [shard_id for _, shard_id in self.sources_of[name]]
        for packed, sources in self.packed.items():
            if all(_swap(name, packed, source) for source in sources):
                return self._shard_ids(name, packed)
        return [None]

    def _compare_tied(self, name: str, target_name: str, tensor: torch.Tensor) -> None:
        first_name, first = self.tied[target_name]
        if first.shape == tensor.shape and torch.equal(first, tensor):
            self.ignored["tied to another tensor, and equal"] += 1
            return
        self.problems["tensors differ though the model ties them"].append(
            f"{name} {_shape(tensor)} and {first_name} {_shape(first)}: to use both, set tie_word_embeddings to false "
            "in config.json"
        )

    def _leave(self, name: str, tensor: torch.Tensor) -> None:
        layer = _LAYER_NUMBER.match(name)
        pattern = next((pattern for pattern in self.ignore if re.search(pattern, name)), None)
        if pattern:
            self.ignored[pattern] += 1
        elif layer and self.num_layers is not None and int(layer[1]) >= self.num_layers:
            self.ignored[f"layers from number {self.num_layers} on"] += 1
        elif self.quant_config and self.quant_config.may_leave(name, tensor):
            self.ignored[f"{self.quant_config.get_name()}, which does not need them"] += 1
        else:
            self.problems["tensors have no place in the model"].append(f"{name} {_shape(tensor)}")

    def finish(self) -> None:
        """Raises WeightLoadError if anything was wrong; else logs what was ignored."""
        if self.prefixed and self.num_direct:  # a mixture is not a checkpoint of the base model
            self.problems["tensors have no place in the model"] += self.prefixed
        self._take_defaults()
        unset = [line for names in self.names_of.values() for line in self._missing(names[0])]
        self.problems["parameters were not set"] += unset
        if any(self.problems.values()):
            raise _error(self.model, self.problems)
        if self.prefixed:
            logger.info("the checkpoint was saved from the base model: its names were read as %s*", BASE_MODEL_PREFIX)
        if self.ignored:
            reasons = "; ".join(f"{count} by {reason}" for reason, count in self.ignored.items())
            logger.info("ignored %d tensors of the checkpoint: %s", self.ignored.total(), reasons)

    def _take_defaults(self) -> None:
        for name, other in getattr(self.model, "weight_defaults", {}).items():
            if not self.loaded[name] and self.loaded[other]:
                self.targets[name].data.copy_(self.targets[other])
                self.loaded[name] = self.loaded[other]

    def _missing(self, name: str) -> list[str]:
        """Lines about what the parameter still lacks."""
        shards, shape = self.loaded[name], _shape(self.targets[name])
        if None in shards or (not shards and _is_optional(self.targets[name])):
            return []
        if name in self.sources_of:
            missing = [source for source, shard_id in self.sources_of[name] if shard_id not in shards]
            return [f"{name} {shape}, made of {', '.join(missing)}"] if missing else []
        for packed, sources in self.packed.items():
            names = [_swap(name, packed, source) for source in sources]
            if all(names):
                ids = self._shard_ids(name, packed)
                missing = [str(source) for source, shard_id in zip(names, ids, strict=True) if shard_id not in shards]
                return [f"{name} {shape}, made of {', '.join(missing)}"] if missing else []
        return [] if shards else [f"{name} {shape}"]


def _fill(target: torch.Tensor, tensor: torch.Tensor, shard_id: ShardId) -> None:
    """Raises ValueError if the tensor does not fit."""
    if target.is_floating_point() != tensor.is_floating_point():
        raise ValueError(f"expected dtype {target.dtype}, got {tensor.dtype}")
    weight_loader = getattr(target, "weight_loader", None)
    if weight_loader:
        weight_loader(target, tensor) if shard_id is None else weight_loader(target, tensor, shard_id)
    elif shard_id is not None:
        raise TypeError("a packed parameter needs a weight_loader that takes a shard id")
    elif target.shape != tensor.shape:
        raise ValueError(f"expected shape {_shape(target)}, got {_shape(tensor)}")
    else:
        target.data.copy_(tensor)


def _is_optional(target: torch.Tensor) -> bool:
    """Whether a checkpoint may lack it: it has a value from the start."""
    return getattr(target, "is_optional", False)


def _declared_sources(model: nn.Module) -> dict[str, _Place]:
    """Full checkpoint names -> places, as modules declare them in ``weight_sources``."""
    return {
        f"{path}.{source}": _Place(f"{path}.{parameter}", shard_id)
        for path, module in model.named_modules()
        for source, (parameter, shard_id) in getattr(module, "weight_sources", {}).items()
    }


def _by_target(sources: Mapping[str, _Place]) -> dict[str, list[tuple[str, ShardId]]]:
    """Parameters -> the sources that fill them together, with their shard ids; not those that fill them alone."""
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


def _swap(name: str, part: str, other: str) -> str | None:
    """``name`` with the dotted part replaced, or None if it has no such part."""
    dotted = f".{name}."
    if f".{part}." not in dotted:
        return None
    return dotted.replace(f".{part}.", f".{other}.", 1)[1:-1]


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


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
