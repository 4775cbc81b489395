"""``rtp-llm models``: the architectures that this installation supports, or what a running server serves."""

import argparse
import inspect
import json
from typing import Any

import rtp_llm
from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.tools.http_client import api_url, served_models


def run_models(args: argparse.Namespace) -> int:
    """Print the models, one per line or as JSON; return the exit status."""
    if args.url:
        models = served_models(api_url(args.url), args.api_key)
        rows = [(model["id"], _context(model)) for model in models]
    elif args.api_key is not None:
        raise ServerArgsError("--api-key is for a server; give its --url too")
    else:
        models = supported_models()
        rows = [(model["architecture"], _origin(model)) for model in models]
    if args.json:
        print(json.dumps(models, indent=2))
    else:
        _print_table(rows)
    return 0


def supported_models() -> list[dict[str, Any]]:
    """Return ``{"architecture", "file", "registered", "error"}`` of each. ``registered``: not the project's own.

    ``file`` is None without a source; ``error`` says why a model file cannot be imported.
    """
    registry = rtp_llm.ModelRegistry
    return [_supported(registry, arch) for arch in sorted(registry.get_supported_archs())]


def _supported(registry: Any, arch: str) -> dict[str, Any]:
    model: dict[str, Any] = {
        "architecture": arch,
        "file": None,
        "registered": registry.is_external(arch),
        "error": None,
    }
    try:
        model["file"] = _file_of(registry.resolve_model_cls(arch)[0])
    except (ImportError, ValueError) as error:
        model["error"] = str(error)
    return model


def _file_of(cls: type) -> str | None:
    try:
        return inspect.getsourcefile(cls)
    except TypeError:  # a class made by hand, in no file
        return None


def _origin(model: dict[str, Any]) -> str:
    if model["error"]:
        return f"broken: {model['error']}"
    return f"{model['file'] or '(no file)'}{' (registered)' if model['registered'] else ''}"


def _context(model: dict[str, Any]) -> str:
    return f"context {model['max_model_len']}" if model.get("max_model_len") else ""


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, note in rows:
        print(f"{name:{width}}  {note}".rstrip())
