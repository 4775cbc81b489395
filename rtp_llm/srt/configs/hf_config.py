"""The configuration of a checkpoint: config.json, with the user's overrides, as an object."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from rtp_llm.srt.configs.architectures import with_other_names
from rtp_llm.srt.configs.config_json import modernized
from rtp_llm.srt.configs.culprit import find_culprit, shown
from rtp_llm.srt.configs.model_path import CONFIG_FILE, ModelNotFoundError
from rtp_llm.srt.configs.older_encoders import OlderConfigError
from rtp_llm.srt.configs.own_config import is_known, make_config
from rtp_llm.srt.models.registry import ADDING_A_MODEL, ModelRegistry
from rtp_llm.srt.utils.scratch import ScratchFolder

_PARTS = ("text_config", "vision_config", "audio_config", "quantization_config")  # objects, if they are given
# raised for an unusable config.json
CONFIG_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, OSError, RecursionError,
    StrictDataclassError,
)  # fmt: skip


class ModelConfigError(ValueError):
    """A checkpoint's configuration, or an option that depends on it, is invalid."""


def _load_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"{path.parent} has no {path.name}: it is not a Hugging Face checkpoint directory"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise ModelConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise ModelConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def parse_overrides(overrides: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(overrides, str):
        try:
            overrides = json.loads(overrides)
        except ValueError as error:
            raise ModelConfigError(f"json_model_override_args is not JSON: {error}; got {overrides!r}") from error
    if not isinstance(overrides, Mapping):
        raise ModelConfigError(f"json_model_override_args must be a JSON object, not {overrides!r}")
    return dict(overrides)


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's content with ``overrides``. An object under a key ``*_config`` merges; others replace.

    ``rope_scaling`` is the older spelling, so the file's base and partial factor in ``rope_parameters`` move to the
    older keys; otherwise an override of the scaling would lose the base.
    """
    merged = dict(config)
    for key, value in overrides.items():
        old = merged.get(key)
        if key.endswith("_config") and isinstance(value, Mapping) and isinstance(old, Mapping):
            value = apply_overrides(old, value)
        merged[key] = value
    if "rope_scaling" in overrides and "rope_parameters" not in overrides:
        parameters = merged.pop("rope_parameters", None) or {}
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in parameters:
                merged.setdefault(key, parameters[key])
    return merged


def read_config_json(directory: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json with overrides, in today's spelling.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelConfigError: it is no JSON object, a part of it that must be an object is none, or it is an encoder's and
            asks for what is not computed.
    """
    config = _load_json(Path(directory) / CONFIG_FILE)
    try:
        wanted = modernized(apply_overrides(config, overrides), f"{directory}/{CONFIG_FILE}")
    except OlderConfigError as error:
        raise ModelConfigError(f"{directory}/{CONFIG_FILE}: {error}") from error
    for key in _PARTS:
        if not isinstance(wanted.get(key), Mapping | None):
            given = shown(wanted[key])
            raise ModelConfigError(f"`{key}` in {directory}/{CONFIG_FILE} must be an object, not {given}")
    return wanted


def load_hf_config(
    directory: str, overrides: dict[str, Any], trust_remote_code: bool, by_transformers: bool = False
) -> Any:
    """Return the configuration of a checkpoint: an object of the class that its model class names as ``config_class``,
    else of transformers' class for the model type, else the fields of config.json.

    Args:
        by_transformers: only transformers' classes count, as the model runs by transformers' code.

    Raises:
        ModelNotFoundError, ModelConfigError: config.json is missing, or cannot be used.
        ModelImportError: the file of the model class cannot be imported.
    """
    wanted = read_config_json(directory, overrides)
    if by_transformers:
        return _by_transformers(directory, wanted, trust_remote_code)
    names, model_type = architecture_names(wanted), wanted.get("model_type")
    config_class = ModelRegistry.config_class(names, is_known(model_type))
    if config_class is None and not _is_unknown(wanted, trust_remote_code):  # its file may have registered the type
        return _by_transformers(directory, wanted, trust_remote_code)
    if not ModelRegistry.has_class(names):
        raise ModelConfigError(_nobody(directory, wanted, names))
    try:
        config = make_config(config_class, wanted | {"architectures": with_other_names(names)})
    except CONFIG_ERRORS as error:
        what = f"{config_class.__name__} of the model file" if config_class else "the model file"
        raise ModelConfigError(f"{what} cannot use {directory}/{CONFIG_FILE}: {error}") from error
    if isinstance(config, PreTrainedConfig):
        config._name_or_path = directory
    return config


def architecture_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names under ``architectures`` of a config.json; those of another form are refused later."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _is_unknown(config: Mapping[str, Any], trust_remote_code: bool) -> bool:
    """Return whether transformers cannot make the configuration, neither by its classes nor by trusted code."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or is_known(model_type):
        return False  # without a type transformers says what is wrong
    auto_map = config.get("auto_map")
    has_code = isinstance(auto_map, Mapping) and "AutoConfig" in auto_map
    return not (has_code and trust_remote_code)


def _nobody(directory: str, config: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the message about a model type that neither transformers nor a model file knows."""
    model = f"architecture {', '.join(names)}" if names else "its architecture (`architectures` is missing)"
    text = (
        f"{directory}/{CONFIG_FILE}: transformers {transformers.__version__} does not know the model type "
        f"{config['model_type']!r}, and there is no model file for {model}"
    )
    if "auto_map" in config:
        text += ". It brings its own code, which runs only with --trust-remote-code"
    return (
        f"{text}. A newer transformers may know it (pip install --upgrade transformers); for a model of your own, see "
        f"{ADDING_A_MODEL}"
    )


def _by_transformers(directory: str, wanted: dict[str, Any], trust_remote_code: bool) -> PreTrainedConfig:
    config = _load_json(Path(directory) / CONFIG_FILE)
    try:
        if json.dumps(wanted) == json.dumps(config):  # distinguishes 2.0 from 2
            return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        return _load_overridden(directory, wanted, trust_remote_code)
    except CONFIG_ERRORS as error:
        raise ModelConfigError(_complaint(directory, wanted, error, trust_remote_code)) from error


def _complaint(directory: str, config: dict[str, Any], error: Exception, trust_remote_code: bool) -> str:
    """Return transformers' error about a config.json, with the entry that causes it, if that is found."""
    text = f"transformers cannot use {directory}/{CONFIG_FILE}: {error}"
    if "auto_map" in config and not trust_remote_code:
        text += ". It brings its own code, which runs only with --trust-remote-code"
    if trust_remote_code:
        return text  # remote code runs no more often than necessary
    key = find_culprit(config, lambda without: _load_overridden(directory, without, trust_remote_code=False), error)
    return text if key is None else f"{text} (it is about `{key}`: {shown(config[key])})"


def _load_overridden(directory: str, config: dict[str, Any], trust_remote_code: bool) -> PreTrainedConfig:
    """Load a changed config.json. AutoConfig reads directories only: this one links all other files."""
    with ScratchFolder() as scratch:
        twin = scratch / Path(directory).resolve().name
        twin.mkdir()
        for entry in Path(directory).iterdir():
            if entry.name != CONFIG_FILE:
                (twin / entry.name).symlink_to(entry.resolve())
        (twin / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        hf_config = AutoConfig.from_pretrained(twin, trust_remote_code=trust_remote_code)
    hf_config._name_or_path = directory
    return hf_config
