"""From a checkpoint directory to a model ready to run."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.distributed.parallel_state import SplitError, World, WorldShape, seen_as
from rtp_llm.srt.layers.quantization.base import (
    ExpertsLayer,
    QuantizationConfig,
    QuantizationError,
    QuantizedModel,
    hides_parameters,
    process_weights,
)
from rtp_llm.srt.layers.quantization.methods import PackedExpertsMethod, PackedLinearMethod
from rtp_llm.srt.layers.quantization.registry import quantization_config, scheme_name
from rtp_llm.srt.layers.quantization.unquantized import UnquantizedLinearMethod
from rtp_llm.srt.layers.rotary import share_ropes
from rtp_llm.srt.layers.weights import Weights
from rtp_llm.srt.model_traits import FinishesLoad, ModelTraits
from rtp_llm.srt.models.building import ModelBuildError, build_model, built_as
from rtp_llm.srt.models.dummy_weights import fill_with_dummy_weights
from rtp_llm.srt.models.gguf_weights import gguf_weights
from rtp_llm.srt.models.loaded_state import BuiltModel
from rtp_llm.srt.models.packed_cache import Entry, entry_of
from rtp_llm.srt.models.pooled import pooled_class, set_pooling
from rtp_llm.srt.models.quantization_settings import quantization_settings
from rtp_llm.srt.models.registry import ModelRegistry, UnknownArchitectureError, reason
from rtp_llm.srt.models.stages import BY_LAYERS, plan_stages
from rtp_llm.srt.models.weight_files import GGUF, Progress, find_weight_files, read_weights
from rtp_llm.srt.models.weight_loading import WeightLoadError, load_weights
from rtp_llm.srt.models.weightless import build_without_weights

logger = logging.getLogger(__name__)

Cut = Callable[[nn.Module], Sequence[str]]
NOT_SHARED = "models that run through transformers cannot be shared by ranks: use --tp-size 1 and --pp-size 1"
FALLBACK = "TransformersForCausalLM"  # runs models of transformers that have no model file here
ENCODER_FALLBACK = "TransformersEncoder"  # and this those without text as their output


def load_model(
    model_config: ModelConfig,
    model_path: str,
    load_format: str = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
    model_impl: str = "auto",
    quantization: str | None = None,
    cut: Cut | None = None,
    packed_cache: bool = False,
) -> nn.Module:
    """Build the model of ``model_config`` on ``device``, in its dtype, and load its weights from a local directory.

    ``load_format="dummy"`` needs no weight file: parameters get small random values, the same at every call.
    ``model_impl``: ``rtp_llm`` takes registered classes, ``transformers`` that library's own, ``auto`` the latter if
    no class is registered. ``quantization``: a scheme of ``layers.quantization.registry``; None: the checkpoint's own.
    ``cut`` is called with the built model, may take modules out, and returns their names: what a checkpoint has of them
    is not needed. ``packed_cache``: read packed weights that an earlier call has kept, or keep them (packed_cache.py).

    Raises:
        UnknownArchitectureError, ModelImportError: no model class (see registry.py), nor one of transformers that can
            be served.
        ModelBuildError: the model class cannot be built from the configuration.
        WeightsNotFoundError, WeightFileError, GGUFError: no usable weight files (see weight_files.py, gguf_weights.py).
        WeightLoadError: the weights do not fit the model.
        QuantizationError: an unknown scheme, or one that does not fit the checkpoint.
    """
    settings = quantization_settings(model_config)
    scheme = scheme_name(quantization, settings)
    source = _Source(model_config, model_path, load_format, device, progress, scheme, settings, cut, packed_cache)
    if model_impl == "transformers":
        return _load(_fallback(model_config), source)
    try:
        model_class = pooled_class(model_config)
    except UnknownArchitectureError as unknown:
        if model_impl == "rtp_llm":
            raise
        return _load_fallback(unknown, source)
    return _load(model_class, source)


def check_split(
    model_config: ModelConfig,
    shape: WorldShape,
    load_format: str = "auto",
    model_impl: str = "auto",
    quantization: str | None = None,
    split_by: str = BY_LAYERS,
) -> None:
    """Refuse numbers of ranks over which the model's heads, sizes, experts or groups of weights cannot be divided.

    It builds the first rank's part without memory for weights. Other errors are left to those who load the model.

    Raises:
        SplitError: names what cannot be divided.
    """
    settings = quantization_settings(model_config)
    scheme = scheme_name(quantization, settings)
    source = _Source(model_config, model_config.model_path, load_format, "reference", None, scheme, settings)
    try:
        if model_impl == "transformers":
            raise SplitError(NOT_SHARED)
        model_class = pooled_class(model_config)
        quant_config = _quant_config(model_class, source)
        with seen_as(World.seen_by(0, shape)), built_as(model_config.dtype, "reference"):
            model = build_without_weights(model_class, model_config, _of_layers(quant_config, source))
        if shape.pipeline > 1:
            plan_stages(model, shape.pipeline, split_by)
        if shape.expert > 1 and not any(isinstance(module, ExpertsLayer) for module in model.modules()):
            option = "use --ep-size 1" if shape.data == 1 else "leave --enable-dp-attention out"
            raise SplitError(f"it has no experts that could be divided; {option}")
    except UnknownArchitectureError as error:
        if model_impl != "rtp_llm":
            raise SplitError(NOT_SHARED) from error
    except SplitError as error:
        raise SplitError(f"{model_config.architectures[0]} cannot run on {shape.size} ranks: {error}") from error
    except (ModelBuildError, QuantizationError) as error:
        logger.debug("whether the model can be divided was not found out: %s", error)


@dataclass(frozen=True, slots=True)
class _Source:
    """The arguments of ``load_model``, and the quantization scheme, stored or requested, with its settings."""

    model_config: ModelConfig
    model_path: str
    load_format: str
    device: str
    progress: Progress | None
    scheme: str | None
    settings: Mapping[str, Any]
    cut: Cut | None = None
    packed_cache: bool = False


def _fallback(model_config: ModelConfig) -> type[nn.Module]:
    """Return the class that runs a model by transformers' code.

    Raises:
        ModelBuildError: it shall be converted, or score by tokens, which only models of this engine do.
    """
    if model_config.convert not in ("auto", "none"):
        raise ModelBuildError(
            f"--convert {model_config.convert} is for models with a file here: by transformers' code a model gives "
            "what its class does"
        )
    if model_config.score_tokens is not None:
        raise ModelBuildError(
            "classifier_from_token is for models with a file here: by transformers' code no tokens are scored"
        )
    # Imports all of transformers' modelling, and with it the compiler of torch, which models with a file do without.
    from rtp_llm.srt.layers.fallback.encoders import encoder_kind

    is_encoder = encoder_kind(model_config.architectures) is not None
    return ModelRegistry.models[ENCODER_FALLBACK if is_encoder else FALLBACK]


def _load_fallback(unknown: UnknownArchitectureError, source: _Source) -> nn.Module:
    """Load through transformers; if that cannot build the model either, raise ``unknown``, extended."""
    logger.info("no model file for %s: it runs through transformers", ", ".join(source.model_config.architectures))
    try:
        return _load(_fallback(source.model_config), source)
    except ModelBuildError as error:
        raise UnknownArchitectureError(f"{unknown}\nNor can it run through transformers: {error}") from error


def _load(model_class: type[nn.Module], source: _Source) -> nn.Module:
    model_config = source.model_config
    quant_config = _quant_config(model_class, source)
    is_dummy = source.load_format == "dummy"
    quant_config = _of_files(quant_config, source)
    if quant_config and quant_config.needs_files and model_class.__name__ in (FALLBACK, ENCODER_FALLBACK):
        raise QuantizationError(
            "weights of a GGUF file are read into models of this engine only: leave out --model-impl transformers"
        )
    of_layers = _of_layers(quant_config, source)
    with built_as(model_config.dtype, source.device), share_ropes(), torch.no_grad():
        built_for().expect_weights(source.scheme)
        if is_dummy:
            if source.packed_cache:
                logger.warning("packed_cache: dummy weights are not kept")
            model, _ = _built(model_class, of_layers, source)
            fill_with_dummy_weights(model)
            _process(model, model_config)
        else:
            model = _with_weights(model_class, quant_config, of_layers, source)
        _finish(model, model_config)
        set_pooling(model, model_config, is_dummy)
    if of_layers is not None:
        _log_quantization(model, of_layers)
    return model.eval().requires_grad_(False)


def _built(
    model_class: type[nn.Module], of_layers: QuantizationConfig | None, source: _Source
) -> tuple[nn.Module, Sequence[str]]:
    """Return the model without weights, and the names of modules that are not in it."""
    model = build_model(model_class, source.model_config, of_layers)
    return model, [] if source.cut is None else source.cut(model)


def _with_weights(
    model_class: type[nn.Module],
    quant_config: QuantizationConfig | None,
    of_layers: QuantizationConfig | None,
    source: _Source,
) -> nn.Module:
    """Return the model with packed weights, of the cache or of the checkpoint's files."""
    config = source.model_config
    files = find_weight_files(source.model_path, source.load_format)
    model, absent = _built(model_class, of_layers, source)
    entry = _entry(model, files, source)
    if entry is not None and entry.is_there():
        if entry.restore(model, source.progress):
            return model
        model, absent = _built(model_class, of_layers, source)
    before = None if entry is None else BuiltModel(model)
    weights = _read(files, model, source)
    if quant_config:
        weights = quant_config.translate(weights, torch.get_default_dtype(), torch.get_default_device())
    load_weights(model, weights, config.num_layers, quant_config, absent)
    _process(model, config)
    if entry is not None and before is not None:
        entry.keep(before)
    return model


def _entry(model: nn.Module, files: list[Path], source: _Source) -> Entry | None:
    """Return the model's place in the cache; None: it has none, as the log says."""
    if not source.packed_cache:
        return None
    packed_files = built_for().packed_files()
    why = None
    if packed_files is None:
        why = "there are no CPU kernels"
    elif ModelTraits.of(model).load_weights is not None:
        why = f"{type(model).__name__} has its own load_weights"
    elif hides_parameters():
        why = "its parameters are hidden"
    if packed_files is None or why is not None:
        logger.warning("packed_cache: this model's packed weights are not kept: %s", why)
        return None
    return entry_of(model, source.model_config, files, (source.scheme, source.settings), packed_files)


def _read(files: list[Path], model: nn.Module, source: _Source) -> Weights:
    if files[0].suffix == GGUF:
        return gguf_weights(files, model, source.model_config, source.progress)
    return read_weights(files, source.progress)


def _log_quantization(model: nn.Module, quant_config: QuantizationConfig) -> None:
    """Log which layers are quantized and which not; raise QuantizationError if weights would be missing: if none is."""
    methods = {name: getattr(module, "quant_method", None) for name, module in model.named_modules()}
    plain = [name for name, method in methods.items() if isinstance(method, UnquantizedLinearMethod)]
    quantized = sum(isinstance(method, (PackedLinearMethod, PackedExpertsMethod)) for method in methods.values())
    if not quantized and not quant_config.dequantizes_rest:
        raise QuantizationError(f"{quant_config.get_name()} quantizes no layer of {type(model).__name__}")
    rest = f"; {len(plain)} linear ones are not: {', '.join(_of_all_layers(plain))}" if plain else ""
    logger.info("quantized by %s: %d layers%s", quant_config.get_name(), quantized, rest)


def _of_all_layers(names: list[str]) -> list[str]:
    """Return names with ``*`` in place of numbers, each once: ``model.layers.*.mlp.gate``."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))


def _of_files(quant_config: QuantizationConfig | None, source: _Source) -> QuantizationConfig | None:
    """Leave out a scheme that needs weight files where there are none."""
    return None if quant_config and quant_config.needs_files and source.load_format == "dummy" else quant_config


def _of_layers(quant_config: QuantizationConfig | None, source: _Source) -> QuantizationConfig | None:
    """Return the scheme that layers are built with; None if it does not concern them."""
    quant_config = _of_files(quant_config, source)
    return quant_config if quant_config is not None and quant_config.quantizes_layers else None


def _quant_config(model_class: type[nn.Module], source: _Source) -> QuantizationConfig | None:
    if source.scheme is None:
        return None
    traits, config = ModelTraits.of(model_class), source.model_config
    model = QuantizedModel(
        settings=source.settings,
        packed_modules_mapping=traits.packed_modules_mapping,
        rename=traits.rename,
        has_encoders=config.hf_config is not config.hf_text_config,
        dtype=config.dtype,
    )
    return quantization_config(source.scheme, model)


def _process(model: nn.Module, model_config: ModelConfig) -> None:
    for name, module in model.named_modules():
        try:
            process_weights(module)
        except ValueError as error:
            raise WeightLoadError(f"{name} of {model_config.model_path} cannot be used: {error}") from error


def _finish(model: nn.Module, model_config: ModelConfig) -> None:
    for module in model.modules():
        if isinstance(module, FinishesLoad):
            try:
                module.finish_load()
            except Exception as error:  # whatever a model's method may raise; the cause is chained
                raise ModelBuildError(
                    f"{type(module).__name__} of {model_config.model_path} cannot be used: {reason(error)}"
                ) from error
