"""The directory of a checkpoint: given, or the snapshot of a hub id."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError

from rtp_llm.srt.configs.gguf_path import GGUFHub, find_gguf, hub_gguf
from rtp_llm.srt.configs.sentence_transformers import (
    HEAD_FILES,
    MODULES_FILE,
    SentenceTransformerError,
    folders_of_layers,
    transformer_folder,
)
from rtp_llm.srt.gguf.choice import ChoiceError, is_gguf
from rtp_llm.srt.gguf.folder import checkpoint_folder

CONFIG_FILE = "config.json"
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_CODE_FILES = ["*.py"]  # used only with trust_remote_code
_WEIGHT_PATTERNS = {
    "auto": ("*.safetensors", "*.bin"),
    "safetensors": ("*.safetensors",),
    "pt": ("*.bin", "*.pt"),
    "gguf": (),
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
    with_tokenizer: bool = True,
) -> str:
    """Return the local directory of a checkpoint: ``model_path`` itself, the snapshot of a hub id, or the folder that
    is made of a GGUF; of an old one of sentence-transformers, the folder in it that has the model's files.

    A hub id is fetched by huggingface_hub (its progress bars, its cache or ``download_dir``, its ``HF_HUB_OFFLINE``):
    small files, Python code among them only with ``trust_remote_code``, then weights of one format, safetensors if
    there are any, and those of sentence-transformers' layers. ``load_format="dummy"`` fetches no weights.

    A GGUF is a file, the only one in a directory without other weights, ``DIR:Q4_K_M``, ``owner/name:Q4_K_M``,
    ``owner/name/file.gguf``, or the only one of a hub id without other weights; of a split one, all parts.

    Args:
        with_tokenizer: whether a GGUF's own tokenizer is needed, and must be one that is supported.

    Raises:
        ModelNotFoundError: no such directory, file or hub id, no way to reach it, several GGUF files in it, or none of
            sentence-transformers' models that are served.
        GGUFError: the GGUF is damaged, or not supported.
    """
    path = Path(model_path).expanduser()
    try:
        gguf = find_gguf(path, load_format)
        if gguf is None and path.is_dir():
            return transformer_folder(str(path))
        if gguf is None:
            _check_may_be_on_the_hub(model_path, path)
            found = _fetch(model_path, revision, download_dir, load_format, trust_remote_code)
            if isinstance(found, str):
                return transformer_folder(found)
            gguf = found
    except (ChoiceError, SentenceTransformerError) as error:
        raise ModelNotFoundError(str(error)) from None
    return str(checkpoint_folder(gguf, with_tokenizer))


def _check_may_be_on_the_hub(model_path: str, path: Path) -> None:
    if path.exists():
        raise ModelNotFoundError(
            f"model path {model_path!r} is a file, but no GGUF; give the directory that holds {CONFIG_FILE}"
        )
    if is_gguf(path.name) and path.parent.is_dir() and (len(path.parts) > 1 or hub_gguf(model_path) is None):
        there = ", ".join(sorted(file.name for file in path.parent.iterdir() if is_gguf(file.name))) or "none"
        raise ModelNotFoundError(f"there is no file {model_path!r}; GGUF files in its directory: {there}")
    if model_path.startswith((".", "/", "~")) or not model_path.strip():
        raise ModelNotFoundError(f"model path {model_path!r} does not exist (and cannot be a hub id like 'owner/name')")
    if model_path.count("/") > 1 and hub_gguf(model_path) is None:
        raise ModelNotFoundError(
            f"model path {model_path!r} does not exist (and cannot be a hub id like 'owner/name', nor "
            "'owner/name/file.gguf')"
        )


def _fetch(
    model_path: str, revision: str | None, download_dir: str | None, load_format: str, trust_remote_code: bool
) -> str | Path:
    """Return the snapshot of a hub id, or the path of a GGUF that was fetched from the hub."""
    repo_id, wanted = hub_gguf(model_path) or (model_path, None)
    hub = GGUFHub(repo_id, revision, download_dir)
    try:
        if wanted is None and load_format != "gguf":
            directory, has_weights = _download(repo_id, revision, download_dir, load_format, trust_remote_code)
            if has_weights or not hub.names:
                return directory
        return hub.fetch(wanted)
    except (ChoiceError, SentenceTransformerError):
        raise
    except (OSError, ValueError, EntryNotFoundError, RevisionResolutionError) as error:
        place = repo_id if revision is None else f"{repo_id} at revision {revision!r}"
        raise ModelNotFoundError(
            f"there is no directory {model_path!r}, and the hub gave no model {place}: {first_line(error)}. Check "
            "the spelling; if this machine is offline, give a local directory or download the model beforehand"
        ) from error


def _download(
    repo_id: str, revision: str | None, download_dir: str | None, load_format: str, trust_remote_code: bool
) -> tuple[str, bool]:
    """Return the snapshot of a hub id, and whether it has the weights that the format asks for."""

    def fetch(patterns: list[str], **kwargs: Any) -> str:
        return snapshot_download(repo_id, revision=revision, cache_dir=download_dir, allow_patterns=patterns, **kwargs)

    def fetch_weights(folder: str, ignored: list[str]) -> str | None:
        """Return the directory, once it has weights in the folder; None if there are none."""
        for pattern in _WEIGHT_PATTERNS[load_format]:
            directory = fetch([f"{folder}{pattern}"], ignore_patterns=ignored)
            if any(Path(directory).glob(f"{folder}{pattern}")):
                return directory
        return None

    directory = fetch(_SMALL_FILES + (_CODE_FILES if trust_remote_code else []))
    layers = folders_of_layers(directory)
    for layer in layers:  # the model's own folder among them, in old checkpoints
        fetch_weights(f"{layer}/", [])
    if (Path(directory) / MODULES_FILE).is_file() and _WEIGHT_PATTERNS[load_format]:
        fetch(list(HEAD_FILES))
    # weights in other subdirectories are copies for other programs
    found = fetch_weights("", ["*/*", "consolidated*"])
    has_weights = found is not None or _has_weights(transformer_folder(directory), directory, load_format)
    return found or directory, has_weights or load_format != "auto"


def _has_weights(folder: str, directory: str, load_format: str) -> bool:
    """Return whether an old checkpoint of sentence-transformers has weights in its model's folder."""
    patterns = _WEIGHT_PATTERNS[load_format]
    return folder != directory and any(any(Path(folder).glob(pattern)) for pattern in patterns)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
