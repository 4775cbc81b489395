"""The GGUF that a model path names: a file, a folder's only one, or one of a repository on the hub."""

import glob
import re
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import DryRunError

from rtp_llm.srt.gguf.choice import choose, is_gguf
from rtp_llm.srt.gguf.folder import is_checkpoint_folder
from rtp_llm.srt.gguf.header import MAGIC

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<word>[\w.-]+)|/(?P<path>[^:]+\.gguf))", re.IGNORECASE)
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def find_gguf(path: Path, load_format: str) -> Path | None:
    """Return the GGUF that a file, a folder, or a folder with a quantization (``DIR:Q4_K_M``) means; None: none does.

    A folder with weights in another format is a Hugging Face checkpoint, unless ``load_format`` is ``gguf``.

    Raises:
        ChoiceError: the folder has several, and it is not clear which is meant.
    """
    if path.is_file():
        return path if is_gguf(path.name) or _begins_as_gguf(path) else None
    if path.is_dir():
        return _in_folder(path, None) if _is_gguf_folder(path, load_format) else None
    folder, _, word = str(path).rpartition(":")
    return _in_folder(Path(folder), word) if folder and word and Path(folder).is_dir() else None


def _in_folder(folder: Path, wanted: str | None) -> Path:
    names = [str(path.relative_to(folder)) for path in _files(folder)]
    return folder / choose(names, wanted, str(folder))[0]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of the folders in it: repositories keep a quantization's parts together."""
    for path in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        if is_gguf(path.name) and path.is_file():
            yield path


def _is_gguf_folder(folder: Path, load_format: str) -> bool:
    if load_format not in ("auto", "gguf", "dummy") or is_checkpoint_folder(folder):
        return False
    if next(_files(folder), None) is None:
        return False
    return load_format == "gguf" or not any(next(folder.glob(pattern), None) for pattern in _OTHER_WEIGHTS)


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def hub_gguf(model_path: str) -> tuple[str, str] | None:
    """Return (repository, what is wanted of it) of ``owner/name:Q4_K_M`` or ``owner/name/file.gguf``; else None."""
    match = _HUB.fullmatch(model_path)
    return (match["repo"], match["word"] or match["path"]) if match else None


class GGUFHub:
    """The GGUF files of a repository on the hub. Its methods raise what huggingface_hub does."""

    def __init__(self, repo_id: str, revision: str | None, download_dir: str | None) -> None:
        self._repo_id = repo_id
        self._snapshot = partial(snapshot_download, repo_id, revision=revision, cache_dir=download_dir)

    @cached_property
    def names(self) -> list[str]:
        """The files' paths; where the hub cannot be asked, those that were downloaded before."""
        try:
            files: Any = self._snapshot(allow_patterns=["*.gguf"], dry_run=True)
            return [file.filename for file in files]
        except DryRunError:
            folder = Path(self._snapshot(allow_patterns=[]))  # or raises the reason
            return [str(path.relative_to(folder)) for path in _files(folder)]

    def fetch(self, wanted: str | None) -> Path:
        """Return the file that is meant, fetched with its other parts and nothing else.

        Raises:
            ChoiceError: none is meant, or several.
        """
        names = choose(self.names, wanted, self._repo_id)
        return Path(self._snapshot(allow_patterns=[glob.escape(name) for name in names])) / names[0]
