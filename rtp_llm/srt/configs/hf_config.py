"""The configuration that transformers loads from config.json, with the user's overrides."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from rtp_llm.srt.configs.config_json import modernized
from rtp_llm.srt.configs.culprit import find_culprit, shown
from rtp_llm.srt.configs.model_path import CONFIG_FILE, ModelNotFoundError
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


def load_hf_config(directory: str, overrides: dict[str, Any], trust_remote_code: bool) -> PreTrainedConfig:
    config = _load_json(Path(directory) / CONFIG_FILE)
    wanted = modernized(apply_overrides(config, overrides), f"{directory}/{CONFIG_FILE}")
    for key in _PARTS:
        if not isinstance(wanted.get(key), Mapping | None):
            given = shown(wanted[key])
            raise ModelConfigError(f"`{key}` in {directory}/{CONFIG_FILE} must be an object, not {given}")
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
