"""Whether a model takes text only, told before anything large is imported: a server's process then needs no torch."""

import json
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.gguf.choice import is_gguf
from rtp_llm.srt.models.model_source import ENTRY_POINT_GROUP, PACKAGE_VARIABLE

_ENDINGS = ("ForCausalLM", "LMHeadModel", "Model")  # of architectures that are language models alone
_NO_PARTS = ("quantization_config", "generation_config")


def takes_text_only(args: ServerArgs) -> bool:
    """Return whether a model takes text only, by its path and config.json. False where that is not certain: with code
    of the checkpoint or models from elsewhere, and before the model is downloaded."""
    if args.trust_remote_code or os.environ.get(PACKAGE_VARIABLE) or entry_points(group=ENTRY_POINT_GROUP):
        return False
    if "_config" in str(args.json_model_override_args):
        return False
    path = Path(args.model_path).expanduser()
    if is_gguf(path.name) or (":" in path.name and not path.exists()):  # a file, or owner/name:Q4_K_M
        return True
    if path.is_dir() and not (path / "config.json").exists():
        return next(path.rglob("*.gguf"), None) is not None
    found = path / "config.json" if path.is_dir() else _cached(args)
    return found is not None and _is_text_model(found)


def _cached(args: ServerArgs) -> Path | None:
    """Return the config.json of a hub id that was downloaded before."""
    try:
        found = try_to_load_from_cache(args.model_path, "config.json", args.download_dir, args.revision)
    except ValueError:  # no hub id
        return None
    return Path(found) if isinstance(found, str) else None


def _is_text_model(path: Path) -> bool:
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        names = [str(name) for name in config["architectures"]]
        parts = [key for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False  # what is wrong is told when the configuration is read
    return bool(names) and not set(parts) - set(_NO_PARTS) and all(name.endswith(_ENDINGS) for name in names)
