"""Packed weights kept in files, so that a later start of the same checkpoint neither quantizes nor packs.

A file has one rank's state of one model (``loaded_state.py``). Its name has a hash of everything that the state depends
on: the weight files, the configuration, the quantization, the rank, the program and its kernels. A weight file counts
by its path, size, and times of last change, and by samples of its content: the time of its last change of status
(``ctime``) is the system's own, which no program can set back, as ``rsync -t`` does with the other one.

Weights decide what a model says, so files are read and written only in a folder of this user alone
(``utils/private_files.py``). A file that is damaged or another's is told in the log, not used, and written anew.
"""

import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.device.packed_files import PackedFiles
from rtp_llm.srt.distributed.parallel_state import get_world
from rtp_llm.srt.kernels.packed_image import NoImageError
from rtp_llm.srt.models.loaded_state import BuiltModel
from rtp_llm.srt.models.weight_files import GGUF, Progress
from rtp_llm.srt.platform import num_cpus
from rtp_llm.srt.utils.checked_file import CheckedFile, DamagedFileError, write_checked
from rtp_llm.srt.utils.private_files import prepared_folder, problem_of_file
from rtp_llm.version import __version__

logger = logging.getLogger(__name__)

SUFFIX, UNFINISHED = ".packed", ".new"
KEPT_DAYS = 30  # without use
LEFT_FREE_BYTES = 1 << 30  # on the disk
SAMPLES = 16  # of a weight file
SAMPLE_BYTES = 64 << 10
CODE = ("devices/cpu", "gguf", "kernels", "layers", "models")  # rooms that make packed weights of files, below srt
_SRT = Path(__file__).resolve().parents[1]
_GARBAGE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)  # what a wrong description leads to


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of one model's packed weights in the cache, whether there is a file or not."""

    path: Path
    family: str  # what entries of the same checkpoint, quantization and rank have in common in their names
    key: str
    files: PackedFiles

    def is_there(self) -> bool:
        """Whether there is a file that only this user can have written; if there is another, log it."""
        try:
            problem = problem_of_file(self.path)
        except FileNotFoundError:
            return False
        except OSError as error:
            problem = str(error)
        if problem is not None:
            logger.warning("packed weights are not used, but made and kept anew: %s", problem)
        return problem is None

    def restore(self, model: nn.Module, progress: Progress | None) -> bool:
        """Give a model that was just built its packed weights; if False, log why, and the model is of no use."""
        started = time.monotonic()
        try:
            file = CheckedFile.open(self.path)
            try:
                if file.description["key"] != self.key:
                    raise DamagedFileError("it is another model's")
                size = sum(file.lengths)
                if progress:
                    progress(0, size)
                state, num_threads = file.description["state"], num_cpus()
                BuiltModel(model).restore(state, self.files.empty, lambda into: file.read_into(into, num_threads))
            finally:
                file.close()
        except (OSError, *_GARBAGE) as error:
            logger.warning("packed weights are not used, but made and kept anew: %s: %s", self.path, error)
            with suppress(OSError):
                self.path.unlink()
            return False
        if progress:
            progress(size, size)
        with suppress(OSError):
            os.utime(self.path)  # it was used
        logger.info("read packed weights of %.2f GB in %.1f s: %s", size / 1e9, time.monotonic() - started, self.path)
        return True

    def keep(self, built: BuiltModel) -> None:
        """Write the file, after the model was loaded; log it, or why not."""
        if self.is_there():
            return  # another process was faster
        started = time.monotonic()
        try:
            state, sections = built.collected()
        except NoImageError as error:
            logger.warning("packed_cache: this model's packed weights are not kept: %s", error)
            return
        try:
            self._check_room(state)
            with _written_alone(self.path) as fd:
                if fd is None:
                    logger.info("another process keeps these packed weights: %s", self.path)
                    return
                size = write_checked(fd, {"key": self.key, "state": state}, sections)
            seconds = time.monotonic() - started
            logger.info("kept packed weights of %.2f GB in %.1f s: %s", size / 1e9, seconds, self.path)
            _sweep(self.path, self.family)
        except OSError as error:
            logger.warning("packed_cache: packed weights are not kept: %s", error)

    def _check_room(self, state: Mapping[str, Any]) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < state["image_bytes"] + LEFT_FREE_BYTES:
            raise OSError(
                f"{state['image_bytes'] / 1e9:.2f} GB and {LEFT_FREE_BYTES / 1e9:.2f} more must be free in "
                f"{self.path.parent}, but {free / 1e9:.2f} GB are"
            )


def entry_of(
    model: nn.Module, model_config: ModelConfig, weight_files: Sequence[Path], how: object, files: PackedFiles
) -> Entry | None:
    """Return where the packed weights of a model that was just built are kept; None, as the log says: nowhere.

    Args:
        how: what else decides how they are loaded, with a representation in full: the scheme and its settings.
    """
    folder, problem = prepared_folder(files.folder)
    if problem is not None:
        logger.warning(
            "packed_cache: packed weights are neither read nor kept: %s. Make it a folder that is yours alone (chmod "
            "700), or name one in RTP_LLM_PACKED_CACHE",
            problem,
        )
        return None
    world, paths = get_world(), [path.resolve() for path in weight_files]
    which = (type(model).__qualname__, how, model_config.dtype, files.layout, world.shape, world.rank)
    family = _digest(str(paths), str(which))[:12]
    key = _digest(
        family,
        __version__,
        torch.__version__,
        _code_digest(_SRT),
        _source_digest(model),
        *files.made_by,
        *(_file_digest(path) for path in paths),
        json.dumps(model_config.hf_config.to_dict() | {"_name_or_path": ""}, sort_keys=True, default=str),
        json.dumps(BuiltModel(model).forms()),
    )
    return Entry(folder / f"{_label(paths[0])}-{family}-{key[:16]}{SUFFIX}", family, key, files)


def _label(path: Path) -> str:
    """Return what tells people of which checkpoint a weight file is."""
    folder = path.parents[1] if path.parent.name == "blobs" else path.parent  # in the hub's cache
    return re.sub(r"[^\w.-]", "_", path.stem if path.suffix == GGUF else folder.name)[:60]


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    info = path.stat()
    step = max(1, info.st_size - SAMPLE_BYTES) / (SAMPLES - 1)
    with path.open("rb") as file:
        samples = [os.pread(file.fileno(), SAMPLE_BYTES, int(number * step)) for number in range(SAMPLES)]
    return _digest(str((info.st_size, info.st_mtime_ns, info.st_ctime_ns)), *samples)


@functools.cache
def _code_digest(srt: Path) -> str:
    """Return a hash of the program that makes packed weights of weight files, but of what it is compiled to."""
    files = sorted(path for room in CODE for path in (srt / room).rglob("*.py"))
    return _digest(*(path.read_bytes() for path in files))


def _source_digest(model: nn.Module) -> str:
    """Return a hash of the files that the model's and its modules' classes are written in."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    modules = {sys.modules.get(cls.__module__) for cls in classes if not cls.__module__.startswith("torch.")}
    files = sorted({str(file) for module in modules if (file := getattr(module, "__file__", None))})
    return _digest(*(Path(file).read_bytes() for file in files))


# Files


@contextmanager
def _written_alone(path: Path) -> Iterator[int | None]:
    """Yield a new file that becomes ``path`` if nothing is raised; None: another process is at it."""
    made = path.with_suffix(UNFINISHED)
    fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if not _is_locked_by_us(fd, made):
            yield None
            return
        try:
            os.ftruncate(fd, 0)
            yield fd
            made.replace(path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise
    finally:
        os.close(fd)  # and unlocks it


def _is_locked_by_us(fd: int, path: Path) -> bool:
    """Lock a file, which must still have its name then; the system unlocks it when its holder dies."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _sweep(written: Path, family: str) -> None:
    """Remove what ``written`` replaces, what was not used for long, and what interrupted writers have left."""
    now = time.time()
    for path in _listed(written.parent, SUFFIX):
        with suppress(FileNotFoundError):
            is_old = now - path.stat().st_mtime > KEPT_DAYS * 86400
            is_replaced = path != written and f"-{family}-" in path.name
            if is_old or is_replaced:
                path.unlink()
                why = "replaced" if is_replaced else f"not used for {KEPT_DAYS} days"
                logger.info("removed packed weights, %s: %s", why, path)
    for path in _listed(written.parent, UNFINISHED):
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if _is_locked_by_us(fd, path):
                    path.unlink()
            finally:
                os.close(fd)


def _listed(folder: Path, suffix: str) -> Iterable[Path]:
    return [path for path in folder.iterdir() if path.suffix == suffix]
