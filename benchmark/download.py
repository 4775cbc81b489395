"""Data sets of evaluations, downloaded once into a cache folder."""

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.request import urlopen

from rich.console import Console
from rich.progress import wrap_file

from benchmark.evaluation import EvaluationError

TIMEOUT_S = 60  # of silence


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rtp_llm" / "eval"


def downloaded_file(url: str, name: str, advice: str) -> Path:
    """The file of a URL, in the cache as ``name``.

    Raises:
        EvaluationError: it cannot be had; the message ends in ``advice``.
    """
    target = cache_folder() / name
    if not target.exists():
        with _fresh(target) as temporary, _download(url, advice) as content, temporary.open("wb") as file:
            shutil.copyfileobj(content, file)
    return target


def downloaded_folder(url: str, name: str, wanted: tuple[str, ...], advice: str) -> Path:
    """The folders ``wanted`` of a tar archive's one top folder, in the cache as ``name``; else as downloaded_file."""
    target = cache_folder() / name
    if not target.exists():
        with _fresh(target) as temporary, _download(url, advice) as content:
            with tarfile.open(fileobj=content, mode="r|") as archive:
                for member in archive:
                    parts = Path(member.name).parts
                    content_of_member = archive.extractfile(member) if member.isfile() else None
                    if content_of_member and len(parts) == 3 and parts[1] in wanted and parts[2] != "..":
                        folder = temporary / parts[1]
                        folder.mkdir(parents=True, exist_ok=True)
                        with (folder / parts[2]).open("wb") as file:
                            shutil.copyfileobj(content_of_member, file)
            if not all((temporary / folder).is_dir() for folder in wanted):
                raise EvaluationError(f"{url} has not the folders {' and '.join(wanted)}. {advice}")
    return target


@contextmanager
def _fresh(target: Path) -> Iterator[Path]:
    """A path that becomes ``target`` when all is well: a broken download leaves nothing behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        yield temporary
        temporary.rename(target)


@contextmanager
def _download(url: str, advice: str) -> Iterator[IO[bytes]]:
    console = Console(stderr=True)
    try:
        with (
            urlopen(url, timeout=TIMEOUT_S) as response,
            wrap_file(
                response,
                total=int(response.headers.get("Content-Length") or 0),
                description=url.rpartition("/")[2],
                console=console,
                disable=not console.is_terminal,
            ) as content,
        ):
            yield content
    except (OSError, EOFError, tarfile.TarError) as error:  # an URLError is an OSError
        raise EvaluationError(f"cannot download {url}: {error}. {advice}") from error
