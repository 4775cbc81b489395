"""The served model as Ollama's clients see it: its names, and what it can do."""

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from rtp_llm.srt.entrypoints.chat_request import EFFORT, THINKING_SWITCHES
from rtp_llm.srt.entrypoints.errors import ApiError
from rtp_llm.srt.entrypoints.llama_cpp.infill import find_fill_tokens
from rtp_llm.srt.entrypoints.ollama.options import NAMES, context_length
from rtp_llm.srt.entrypoints.ollama.protocol import Details
from rtp_llm.srt.entrypoints.serving import Serving
from rtp_llm.srt.parser.response_template import CALLS, THINKING

TAG = ":latest"  # what names without a tag mean
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# As the names of GGUF files say it.
GGUF_TYPE = re.compile(r"(?<![A-Za-z0-9])(?:I?Q\d_[A-Z0-9_]+|MXFP4\w*|BF16|F16|F32)(?![A-Za-z0-9])", re.IGNORECASE)
PARAMETER_WIDTH = 30  # columns of a parameter's name


def tagged(name: str) -> str:
    """Return a name with a tag: its own, or ``latest``."""
    return name if ":" in name.rpartition("/")[2] else name + TAG


def check_name(serving: Serving, name: str | None) -> None:
    """Raise a 404 for the name of another model."""
    args = serving.args
    if not name or args.accept_any_model_name:
        return
    if tagged(name) not in map(tagged, args.model_names):
        known = " and ".join(map(repr, args.model_names))
        raise ApiError(404, f"model {name!a} not found: this server has {known}", "model", "model_not_found")


def can_think(serving: Serving) -> bool:
    """Return whether the model's thinking is told from its answers, or its chat template can turn it on and off."""
    variables = frozenset() if serving.template is None else serving.template.variables
    form = serving.answer_format
    if serving.response_template is not None:
        told = not THINKING.isdisjoint(serving.response_template.fields)
    else:
        told = form.thinking is not None or form.channels is not None
    return told or not variables.isdisjoint((*THINKING_SWITCHES, EFFORT))


def capabilities(serving: Serving) -> list[str]:
    """Return what the model can do, by Ollama's names."""
    calls = serving.answer_format.has_calls
    if serving.response_template is not None:
        calls = CALLS in serving.response_template.fields
    found = {
        "completion": serving.manager.tokenizer is not None and serving.manager.outputs.generates,
        "embedding": serving.manager.outputs.find("embed") is not None,
        "vision": serving.model_config.is_multimodal,
        "insert": serving.manager.tokenizer is not None and find_fill_tokens(serving.manager.tokenizer) is not None,
        "tools": calls and serving.template is not None and serving.template.uses("tools"),
        "thinking": can_think(serving),
    }
    return [name for name, is_there in found.items() if is_there]


def details(serving: Serving) -> Details:
    """Return the model's family and form. The number of its parameters is not known here."""
    family = serving.model_config.hf_config.model_type
    return {
        "parent_model": "",
        "format": "gguf" if _quantization(serving) == "gguf" else "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": _level(serving),
    }


def _quantization(serving: Serving) -> str | None:
    """Return the form of the checkpoint's weights, as its configuration names it."""
    settings = getattr(serving.model_config.hf_config, "quantization_config", None)
    found = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return None if found is None else str(found)


def _level(serving: Serving) -> str:
    args, method = serving.args, _quantization(serving)
    if method == "gguf":
        names = GGUF_TYPE.findall(args.model_path)
        return names[-1].upper() if names else method.upper()
    asked = args.quantization or method
    return asked.upper() if asked else DTYPES[serving.model_config.dtype]


def digest(serving: Serving) -> str:
    """Return a hash that tells models from each other: by name, revision and form, not by their weights."""
    return sha256(serving.fingerprint.encode()).hexdigest()


def modified_s(serving: Serving) -> float:
    """Return when the checkpoint was changed, in seconds since 1970."""
    return Path(serving.model_config.model_path).stat().st_mtime


def model_info(serving: Serving) -> dict[str, Any]:
    """Return the model's sizes, by the names that GGUF files have for them."""
    config = serving.model_config
    family = config.hf_config.model_type
    sizes = {
        "context_length": context_length(serving),
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads or None,
        "attention.head_count_kv": getattr(config.hf_text_config, "num_key_value_heads", None),
        "vocab_size": config.vocab_size,
    }
    named = {f"{family}.{name}": value for name, value in sizes.items() if isinstance(value, int)}
    return {"general.architecture": family, "general.basename": serving.model_name, **named}


def parameters(serving: Serving) -> str:
    """Return what requests get that do not say it themselves, a line for each, as a Modelfile has them."""
    given: list[tuple[str, Any]] = [(NAMES.get(name, name), value) for name, value in serving.sampling_defaults.items()]
    given += [("stop", token.text) for token in serving.manager.end_tokens if token.text is not None]
    return "\n".join(f"{name:<{PARAMETER_WIDTH}} {json.dumps(value, ensure_ascii=False)}" for name, value in given)


def modelfile(serving: Serving) -> str:
    lines = [f"FROM {serving.args.model_path}", *(f"PARAMETER {line}" for line in parameters(serving).splitlines())]
    return "\n".join(lines) + "\n"
