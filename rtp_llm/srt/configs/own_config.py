"""Configurations without transformers: the class that a model file names, or the fields of config.json as they are."""

import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rtp_llm.srt.utils.transformers_imports import leave_out_activations

leave_out_activations()

_PART, _PARTS = "_config", "_configs"  # how keys of objects, and of lists of objects, that are configurations end
_NO_PARTS = ("quantization_config", "generation_config")  # objects that stay dicts
_BASE_FIELDS = frozenset(item.name for item in dataclasses.fields(PreTrainedConfig)) | {"torch_dtype"}
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers")  # of a language model, by the engine itself
# What configurations of older checkpoints call them.
_OLDER_NAMES = {
    "vocab_size": ("padded_vocab_size",),
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("num_layers", "n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
}
_DEFAULT_ROPE_THETA = 10000.0
_SCALARS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class OwnConfigError(ValueError):
    """config.json does not fit the configuration class of a model file."""


class GeneralConfig(PreTrainedConfig):
    """Every field of config.json as an attribute, under its own name.

    An object under a key ``*_config`` is a configuration too: transformers' class for its ``model_type``, else a
    GeneralConfig. So are the objects of a list under a key ``*_configs``, and the objects in them. Fields that are not
    there have these values: ``tie_word_embeddings`` is False; with ``num_attention_heads``, ``num_key_value_heads`` is
    equal to it, and ``head_dim`` is ``hidden_size`` divided by it; ``rope_parameters`` holds ``rope_theta`` and
    ``rope_scaling``, as in transformers 5. The sizes that the engine needs may have the names of _OLDER_NAMES.
    """

    rope_scaling = None  # a plain field: transformers' property warns when it is read

    def __init__(self, **values: Any) -> None:
        super().__init__(**{name: value for name, value in values.items() if name in _BASE_FIELDS})
        for name, value in (values | _derived(values)).items():
            if name not in _BASE_FIELDS:
                setattr(self, name, _of_parts(name, value))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, in the form of config.json."""
        return {name: _plain(value) for name, value in super().to_dict().items()}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_missing(name))


class _Served:
    """What the engine reads of every configuration, and a dataclass of a model file may leave out."""

    architectures: list[str] | None = None
    model_type = ""
    dtype: str | None = None
    tie_word_embeddings = False

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the language model's part, ``text_config`` if there is one."""
        text_config = getattr(self, "text_config", None)
        return self if text_config is None else text_config

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, those that only config.json has among them."""
        return {name: _plain(value) for name, value in _state(self).items()}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_missing(name))


def is_known(model_type: Any) -> bool:
    """Return whether transformers has a configuration class for a model type, its own or one that was registered."""
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def config_of_unknown_type(directory: str, trust_remote_code: bool) -> PreTrainedConfig | None:
    """Return the content of a directory's config.json if transformers has no class for its model type, beside the
    weights neither: what it would make itself, with a warning that the model is another one. None: it has one."""
    path = Path(directory) / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    has_code = trust_remote_code and "AutoConfig" in values.get("auto_map", {})
    if "model_type" not in values or is_known(values["model_type"]) or has_code:
        return None
    return PreTrainedConfig.from_dict(values)


def check_config_class(config_class: object) -> None:
    """Raise OwnConfigError if a model class's ``config_class`` is none that ``make_config`` can build."""
    is_ours = isinstance(config_class, type) and (
        issubclass(config_class, PreTrainedConfig) or dataclasses.is_dataclass(config_class)
    )
    if not is_ours:
        raise OwnConfigError(
            f"`config_class` of a model class must be a dataclass or a transformers configuration, not {config_class!r}"
        )


def make_config(config_class: Any, values: Mapping[str, Any]) -> Any:
    """Make a configuration of the content of config.json.

    Args:
        config_class: a transformers configuration, or a dataclass; None: a GeneralConfig. A dataclass keeps, as
            attributes, what config.json has beyond its fields.

    Raises:
        OwnConfigError: a field that the dataclass needs is missing, or a value is not of the field's type.
    """
    if config_class is None:
        return _general(values)
    check_config_class(config_class)
    if issubclass(config_class, PreTrainedConfig):
        return config_class.from_dict(dict(values))
    return _fill(config_class, values)


def _general(values: Mapping[str, Any]) -> GeneralConfig:
    config = GeneralConfig(**values)
    text_config = config.get_text_config()
    missing = [name for name in _NEEDED if getattr(text_config, name, None) is None]
    if missing:
        place = "" if text_config is config else " under `text_config`"
        raise OwnConfigError(
            f"it has no {', '.join(f'`{name}`' for name in missing)}{place}. Where the model class names no "
            f"`config_class`, config.json itself must have {', '.join(f'`{name}`' for name in _NEEDED)}, and what the "
            "model file reads"
        )
    return config


def _derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that follow from others, if they are missing."""
    found: dict[str, Any] = {"tie_word_embeddings": False}
    for name, others in _OLDER_NAMES.items():
        found |= dict.fromkeys([name], next((values[other] for other in others if other in values), None))
    known = found | {name: value for name, value in values.items() if value is not None}
    heads, size = known.get("num_attention_heads"), known.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        found["num_key_value_heads"] = heads
        if isinstance(size, int):
            found["head_dim"] = size // heads
    rope_parameters = _rope_parameters(values)
    if rope_parameters:
        found["rope_parameters"] = rope_parameters
    return {name: value for name, value in found.items() if values.get(name) is None}


def _rope_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands about rotary positions in the fields of older configurations; {} if they say nothing, or say
    it layer by layer."""
    theta, scaling = values.get("rope_theta"), values.get("rope_scaling") or {}
    is_of_all_layers = isinstance(theta, (int, float, type(None))) and isinstance(scaling, Mapping)
    if not is_of_all_layers or any(isinstance(value, Mapping) for value in scaling.values()):
        return {}
    if theta is None and not scaling:
        return {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    parameters = {"rope_theta": _DEFAULT_ROPE_THETA if theta is None else theta, **scaling, "rope_type": kind}
    partial = values.get("partial_rotary_factor")
    return parameters if partial is None else {"partial_rotary_factor": partial, **parameters}


def _is_part(name: str, value: Any) -> bool:
    return name.endswith(_PART) and name not in _NO_PARTS and isinstance(value, Mapping)


def _of_parts(name: str, value: Any) -> Any:
    """Return a field's value with configurations in place of the objects that are some."""
    if name.endswith(_PARTS) and isinstance(value, list):
        return [_with_all_parts(item) if isinstance(item, Mapping) else item for item in value]
    return _part(value) if _is_part(name, value) else value


def _with_all_parts(values: Mapping[str, Any]) -> GeneralConfig:
    return GeneralConfig(
        **{name: _with_all_parts(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    )


def _part(values: Mapping[str, Any]) -> Any:
    if is_known(values.get("model_type")):
        return AutoConfig.for_model(**values)
    return GeneralConfig(**values)


def _missing(name: str) -> str:
    return (
        f"config.json has no `{name}`. Add it there, or name a class under `config_class` of the model class that has "
        "a value for it"
    )


# Dataclasses


def _fill(dataclass: type, values: Mapping[str, Any]) -> Any:
    """Build a dataclass, with what the engine reads of a configuration mixed in."""
    name, hints = dataclass.__name__, _hints(dataclass)
    body = {"__module__": dataclass.__module__, "__getstate__": _state, "__setstate__": _set_state}
    cls: Any = type(name, (dataclass, _Served), body)
    items = [item for item in dataclasses.fields(cls) if item.init]
    missing = [
        item.name
        for item in items
        if item.name not in values and item.default is item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OwnConfigError(f"config.json has no {', '.join(f'`{field}`' for field in missing)}, which {name} needs")
    own = {item.name for item in items}
    given = {field: _typed(values[field], hints[field], f"{name}.{field}") for field in values.keys() & own}
    config = cls(**given)
    for field, value in values.items():
        if field not in own and not isinstance(getattr(cls, field, None), property):
            object.__setattr__(config, field, _part(value) if _is_part(field, value) else value)
    return config


def _state(config: Any) -> dict[str, Any]:
    """Return all fields: copies of a dataclass with slots would lose those that only config.json has."""
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(config)} | vars(config)


def _set_state(config: Any, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        object.__setattr__(config, name, value)  # the dataclass may be frozen


def _hints(dataclass: type) -> dict[str, Any]:
    try:
        return get_type_hints(dataclass)
    except NameError as error:
        raise OwnConfigError(f"the annotations of {dataclass.__name__} cannot be read: {error}") from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Return a value of JSON as a field's type has it: objects as dataclasses, integers as floats.

    Types other than numbers, texts, truth values, lists, dicts, dataclasses and unions of these are not checked.
    """
    if get_origin(hint) in (Union, types.UnionType):
        return _one_of(value, get_args(hint), where)
    is_config = isinstance(hint, type) and (issubclass(hint, PreTrainedConfig) or dataclasses.is_dataclass(hint))
    if is_config and isinstance(value, Mapping):
        return make_config(hint, value)
    if hint is float and type(value) is int:
        return float(value)
    container = get_origin(hint) or hint
    if container in (list, tuple) and isinstance(value, list):
        return container(_typed(item, (*get_args(hint), Any)[0], f"{where}[]") for item in value)
    if container in (*_SCALARS, list, tuple, dict, type(None)) and type(value) is not container:
        raise OwnConfigError(f"{where} must be {_SCALARS.get(container, container.__name__)}, not {value!r}")
    return value


def _one_of(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    """Return the value as the first type of a union that takes it."""
    errors = []
    for hint in sorted(hints, key=lambda hint: hint is not type(value)):  # its own type before one that converts
        try:
            return _typed(value, hint, where)
        except OwnConfigError as error:
            errors.append(error)
    raise errors[0]


def _plain(value: Any) -> Any:
    if isinstance(value, (_Served, PreTrainedConfig)):
        return value.to_dict()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
