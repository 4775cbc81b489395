"""The directory of a checkpoint: given, or the snapshot of a hub id."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError

CONFIG_FILE = "config.json"
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_CODE_FILES = ["*.py"]  # used only with trust_remote_code
_WEIGHT_PATTERNS = {
    "auto": ("*.safetensors", "*.bin"),
    "safetensors": ("*.safetensors",),
    "pt": ("*.bin", "*.pt"),
    "dummy": (),
}


class ModelNotFoundError(FileNotFoundError):
    """The model path is neither a usable directory nor a hub id that can be fetched."""


def resolve_model_path(
    model_path: str,
    revision: str | None = None,
    download_dir: str | None = None,
    load_format: str = "auto",
    trust_remote_code: bool = False,
) -> str:
    """Return the local directory of a checkpoint: ``model_path`` itself, or the snapshot of a hub id.

    A hub id is fetched by huggingface_hub (its progress bars, its cache or ``download_dir``, its ``HF_HUB_OFFLINE``):
    small files, Python code among them only with ``trust_remote_code``, then weights of one format, safetensors if
    there are any. ``load_format="dummy"`` fetches no weights.

    Raises:
        ModelNotFoundError: no such directory, and no such hub id or no way to reach it.
    """
    path = Path(model_path).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ModelNotFoundError(f"model path {model_path!r} is a file; give the directory that holds {CONFIG_FILE}")
    if model_path.startswith((".", "/", "~")) or model_path.count("/") > 1 or not model_path.strip():
        raise ModelNotFoundError(f"model path {model_path!r} does not exist (and cannot be a hub id like 'owner/name')")
    try:
        return _download(model_path, revision, download_dir, load_format, trust_remote_code)
    except (OSError, ValueError, EntryNotFoundError, RevisionResolutionError) as error:
        wanted = model_path if revision is None else f"{model_path} at revision {revision!r}"
        raise ModelNotFoundError(
            f"there is no directory {model_path!r}, and the hub gave no model {wanted}: {first_line(error)}. Check "
            "the spelling; if this machine is offline, give a local directory or download the model beforehand"
        ) from error


def _download(
    repo_id: str, revision: str | None, download_dir: str | None, load_format: str, trust_remote_code: bool
) -> str:
    def fetch(patterns: list[str], **kwargs: Any) -> str:
        return snapshot_download(repo_id, revision=revision, cache_dir=download_dir, allow_patterns=patterns, **kwargs)

    directory = fetch(_SMALL_FILES + (_CODE_FILES if trust_remote_code else []))
    for pattern in _WEIGHT_PATTERNS[load_format]:
        # weights in subdirectories are copies for other programs
        directory = fetch([pattern], ignore_patterns=["*/*", "consolidated*"])
        if any(Path(directory).glob(pattern)):
            break
    return directory


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
