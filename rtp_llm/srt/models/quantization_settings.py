"""Find a checkpoint's quantization settings: in config.json, or in files of older programs."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.layers.quantization.base import QuantizationError
from rtp_llm.srt.layers.quantization.spellings import canonical

logger = logging.getLogger(__name__)

KEYS = ("quantization_config", "compression_config")  # in config.json; the second is the older one
FILES = {  # of AutoGPTQ, AutoAWQ and ModelOpt, and the key that each must have: other programs use these names, too
    "quantize_config.json": ("gptq", "bits"),
    "quant_config.json": ("awq", "bits"),
    "hf_quant_config.json": ("modelopt", "quant_algo"),
}


def quantization_settings(model_config: ModelConfig) -> dict[str, Any]:
    """Return the settings in one spelling (see ``layers.quantization.spellings``); empty if there are none.

    Settings in config.json, also in its language model's part, take precedence over separate files.

    Raises:
        QuantizationError: they are not an object, or contradict each other.
    """
    for key in KEYS:
        for config in (model_config.hf_config, model_config.hf_text_config):
            settings = getattr(config, key, None)
            if settings:
                return canonical(settings.to_dict() if hasattr(settings, "to_dict") else settings)
    for name, (method, key) in FILES.items():
        settings = canonical(_read(Path(model_config.model_path) / name), default_method=method)
        if settings.get(key):
            logger.info("the checkpoint is quantized as %s says", name)
            return settings
    return {}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise QuantizationError(f"{path} cannot be read: {error}") from error
    return value if isinstance(value, Mapping) else {}
