"""The registry of multimodal processors, by model."""

import copy
import inspect
import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor
from rtp_llm.srt.multimodal.hf_processor import HfProcessor
from rtp_llm.srt.multimodal.media import MediaLoader

logger = logging.getLogger(__name__)

Processor = type[BaseMultimodalProcessor]

PROCESSOR_MAPPING: dict[type | str, Processor] = {}  # by model class, or by the name of an architecture


def register_processor(processor_cls: Processor, overwrite: bool = True) -> Processor:
    """Register a processor for each of its ``models``. May be used as a decorator.

    Raises:
        TypeError: it is not a BaseMultimodalProcessor, or names no models.
        ValueError: one of the models has another already, and ``overwrite`` is false.
    """
    if not (isinstance(processor_cls, type) and issubclass(processor_cls, BaseMultimodalProcessor)):
        raise TypeError(f"a processor must be a subclass of BaseMultimodalProcessor, not {processor_cls!r}")
    if not processor_cls.models:
        raise TypeError(f"{processor_cls.__name__}.models names no model that it works for")
    for model in processor_cls.models:
        before = PROCESSOR_MAPPING.get(model)
        if before not in (None, processor_cls) and not overwrite:
            raise ValueError(f"{_name(model)} already has the processor {before}; set overwrite=True to replace it")
    PROCESSOR_MAPPING.update(dict.fromkeys(processor_cls.models, processor_cls))
    return processor_cls


def import_processors(package_name: str, overwrite: bool = False) -> None:
    """Register the processors that a module, or the modules of a package, define. Modules that cannot be imported
    are logged and left out.

    Raises:
        ImportError: there is no such package, or it cannot be imported.
        ValueError: a model has another processor already, and ``overwrite`` is false.
    """
    package = import_module(package_name)
    modules = [package]
    for found in iter_modules(getattr(package, "__path__", ()), f"{package_name}."):
        if found.name.rpartition(".")[2] == "__main__" or found.ispkg:
            continue
        try:
            modules.append(import_module(found.name))
        except Exception as error:  # of any kind: only this module's models are affected
            logger.warning("%s cannot be imported, and its processors are left out: %s", found.name, error)
    for module in modules:
        for processor_cls in processors_in(module):
            register_processor(processor_cls, overwrite)


def processors_in(module: ModuleType) -> list[Processor]:
    """Return the processors that a module defines (imported ones not included) and that name their models."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, BaseMultimodalProcessor)
        and value.__module__ == module.__name__
        and value.models
        and not inspect.isabstract(value)
    ]


def find_processor(architectures: list[str], model_cls: type | None = None) -> Processor:
    """Return a model's processor: a registered one, else one in the file of the model's class, or of a base class.

    Raises:
        ValueError: there is none.
    """
    names = [*([model_cls.__name__] if model_cls else []), *architectures]
    if model_cls in PROCESSOR_MAPPING:
        return PROCESSOR_MAPPING[model_cls]
    for model, processor_cls in PROCESSOR_MAPPING.items():
        if _name(model) in names:
            return processor_cls
    for base in model_cls.__mro__ if model_cls else ():
        module = sys.modules.get(base.__module__)
        for processor_cls in processors_in(module) if module else ():
            if any(model is base or _name(model) in (base.__name__, *architectures) for model in processor_cls.models):
                return processor_cls
    raise ValueError(
        f"No processor registered for architecture: {', '.join(architectures)}. Put a BaseMultimodalProcessor whose "
        "`models` name the class into the model's file, or serve it as a language model: --no-enable-multimodal"
    )


def get_mm_processor(
    hf_config: Any,
    server_args: ServerArgs | None,
    hf_processor: Any,
    *args: Any,
    model_cls: type | None = None,
    **kwargs: Any,
) -> BaseMultimodalProcessor:
    """Return an instance of a model's processor.

    Args:
        hf_config: the model's configuration, which names its architectures.
        hf_processor: an ``HfProcessor``, or a processor of transformers.
        model_cls: the class that the architectures resolve to, whose file may hold the processor.
        args, kwargs: for the processor.

    Raises:
        ValueError: there is none.
    """
    processor_cls = find_processor(list(hf_config.architectures or ()), model_cls)
    return processor_cls(hf_config, server_args, hf_processor, *args, **kwargs)


def make_processor(
    server_args: ServerArgs, config: ModelConfig, model_cls: type, tokenizer: Any, trusted: bool = False
) -> BaseMultimodalProcessor | None:
    """Return the processor of the served model; None if it takes no media (its class has no ``pad_input_ids``), or
    there is no tokenizer to find placeholders with.

    Args:
        trusted: callers are this process's own code, which may name any file.

    Raises:
        ValueError: the model takes media, but has no processor.
    """
    if tokenizer is None or ModelTraits.of(model_cls).pad_input_ids is None:
        return None
    own_tokenizer = copy.deepcopy(tokenizer)  # used on other threads; a tokenizer is not thread-safe
    hf_processor = HfProcessor(config.model_path, own_tokenizer, server_args.trust_remote_code)
    _check_settings(config.model_path, hf_processor)
    loader = MediaLoader.from_server_args(server_args, trusted)
    return get_mm_processor(config.hf_config, server_args, hf_processor, model_cls=model_cls, loader=loader)


def _check_settings(model_path: str, hf_processor: HfProcessor) -> None:
    """Raise at start what would otherwise fail with the first image: unreadable settings, or a processor with code of
    its own, which is not trusted.

    Raises:
        ValueError: names the checkpoint, and what to do.
    """
    way_out = "Serve it as a language model: --no-enable-multimodal"
    try:
        settings = (hf_processor.image_settings, hf_processor.video_settings, hf_processor.settings)
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise ValueError(
            f"the processor settings in {model_path} (preprocessor_config.json, processor_config.json) cannot be read: "
            f"{error}. {way_out}"
        ) from error
    for part in settings:
        if not isinstance(part, Mapping):
            raise ValueError(f"the processor settings in {model_path} must be objects, not {part!r:.60}. {way_out}")
    if not any("auto_map" in part for part in settings):
        return
    try:
        hf_processor.image_processor  # noqa: B018 - loads it
    except Exception as error:  # of any kind; the cause is chained
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{model_path} brings code of its own for images (`auto_map` in its processor's settings), which runs only "
            f"with --trust-remote-code: {first_line}. {way_out}"
        ) from error


def _name(model: type | str) -> str:
    return model if isinstance(model, str) else model.__name__
