"""Build the model of a checkpoint by transformers, in whichever way transformers can.

There are three: code beside the weights, named under ``auto_map`` in config.json, if it is trusted; a class that this
process has registered (``AutoModelForCausalLM.register(Config, Model)``); transformers' own class for the model type.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

from rtp_llm.srt.gguf.folder import is_checkpoint_folder
from rtp_llm.tools.gguf_values import gguf_values

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModel)


class CannotBuildError(ValueError):
    """Transformers cannot build the model of a checkpoint; the message says what was tried."""


@dataclass(frozen=True)
class Way:
    """An auto class of transformers that builds a checkpoint, as the class ``class_name``, from a configuration."""

    auto_class: Any
    class_name: str
    config: PreTrainedConfig


def load_by_transformers(model_path: str, own_config: Any, trust_remote_code: bool = False, **options: Any) -> Any:
    """Load the model of a checkpoint: the class that ``architectures`` names, if one of the auto classes has it, else
    the first that one has.

    Args:
        model_path: a directory.
        own_config: the checkpoint's configuration as the engine reads it. It is taken where transformers cannot make
            one, and a model class is registered for it.
        options: of ``from_pretrained``.

    Raises:
        CannotBuildError: no auto class has a class for the checkpoint.
    """
    tried: list[str] = []
    ways = list(_ways(model_path, own_config, trust_remote_code, tried))
    if not ways:
        names = ", ".join(getattr(own_config, "architectures", None) or ()) or "the model"
        raise CannotBuildError(f"transformers cannot build {names} of {model_path}. Tried: {'; '.join(tried)}")
    way = choose(ways, getattr(own_config, "architectures", None) or ())
    if is_checkpoint_folder(Path(model_path)):
        return _load_values(model_path, way, **options)
    return way.auto_class.from_pretrained(model_path, config=way.config, trust_remote_code=trust_remote_code, **options)


def _load_values(model_path: str, way: Way, dtype: torch.dtype, **options: Any) -> Any:
    """Load the model of a GGUF with computed weights: transformers' own reader knows few architectures."""
    config = copy.deepcopy(way.config)
    config.__dict__.pop("quantization_config", None)
    values = gguf_values(model_path, dtype)
    model_class = _model_class(way.auto_class, config)
    return model_class.from_pretrained(None, config=config, state_dict=values, dtype=dtype, **options)


def choose(ways: Sequence[Way], architectures: Sequence[str]) -> Way:
    """Return the way to a class that ``architectures`` names, else the first."""
    return next((way for way in ways if way.class_name in architectures), ways[0])


def _ways(model_path: str, own_config: Any, trust_remote_code: bool, tried: list[str]) -> Iterator[Way]:
    """Yield the ways to build a checkpoint, in order of AUTO_CLASSES; append to ``tried`` why others are none."""
    configs: list[PreTrainedConfig] = []
    try:
        configs.append(AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code))
    except (ValueError, KeyError, OSError, ImportError, AttributeError, TypeError) as error:
        tried.append(f"AutoConfig: {_first_sentence(error)}")
    if isinstance(own_config, PreTrainedConfig) and type(own_config) not in map(type, configs):
        configs.append(own_config)
    for config in configs:
        code = _code_beside(config)
        if code and not trust_remote_code:
            tried.append(f"auto_map of config.json has {', '.join(code)}, which needs --trust-remote-code")
        for auto_class in AUTO_CLASSES:
            name = _class_name(auto_class, config, code if trust_remote_code else {})
            if name is not None:
                yield Way(auto_class, name, config)
        names = ", ".join(auto_class.__name__ for auto_class in AUTO_CLASSES)
        tried.append(f"{names}: no class that generates text is registered for {type(config).__name__}")


def _code_beside(config: PreTrainedConfig) -> dict[str, str]:
    """Return what ``auto_map`` names for our auto classes: {auto class: ``module.Class``}."""
    auto_map = getattr(config, "auto_map", None)
    known = {auto_class.__name__ for auto_class in AUTO_CLASSES}
    return (
        {name: str(place) for name, place in auto_map.items() if name in known} if isinstance(auto_map, Mapping) else {}
    )


def _class_name(auto_class: Any, config: PreTrainedConfig, code: Mapping[str, str]) -> str | None:
    """Return the name of the class that an auto class would build; None: none, or one of transformers' own without a
    head, which is what AutoModel has."""
    place = code.get(auto_class.__name__)
    if place is not None:
        return place.rpartition(".")[2]
    if type(config) not in auto_class._model_mapping:
        return None
    model_class = _model_class(auto_class, config)
    if auto_class is AutoModel and model_class.__module__.startswith("transformers."):
        return None
    return model_class.__name__


def _model_class(auto_class: Any, config: PreTrainedConfig) -> Any:
    found = auto_class._model_mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def _first_sentence(error: Exception) -> str:
    """Return the beginning of transformers' message, without its list of classes or its advice."""
    text = str(error).strip().partition("\n")[0]
    return text.partition(" Model type should be one of")[0].partition(". ")[0].partition(" but Transformers")[0]


def takes_images(model: Any) -> bool:
    """Return whether a model of transformers takes pixels."""
    return "pixel_values" in inspect.signature(model.forward).parameters


def forget_last_prompt(model: Any) -> None:
    """Forget what a model of transformers keeps of the last prompt beside its cache: M-RoPE's offset of later tokens,
    which it would add to those of a prompt without images, and frequencies for the longest prompt so far."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
        original = getattr(module, "original_inv_freq", None)
        if original is not None and getattr(module, "rope_type", None) == "dynamic":
            module.register_buffer("inv_freq", original.clone(), persistent=False)
            module.max_seq_len_cached = module.original_max_seq_len


CACHES = ("past_key_values", "cache_params")  # what models of transformers call their cache; the second: Mamba's


def computed(model: Any, ids: Sequence[int], cache: Any = None, **extras: Any) -> tuple[torch.Tensor, Any]:
    """Compute one sequence's next tokens by a model of transformers, from its cache (None: from nothing).

    Returns:
        Logits [1, tokens, vocab_size], and the cache with these tokens.
    """
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in CACHES if name in parameters), CACHES[0])
    input_ids = torch.tensor([list(ids)], device=model.device)
    output = model(input_ids=input_ids, use_cache=True, **{name: cache}, **extras)
    return output.logits, getattr(output, name)
