"""A GGUF as a checkpoint folder in the user's cache: what reads checkpoints reads it like any other.

The folder has config.json, generation_config.json, the tokenizer's files with the chat template, and links to the GGUF
and its parts, from which the weights are read. It is made once for a file as it is (path, size, time of change) and the
code that makes it (this room, model files, what models from elsewhere declare), after which the file's vocabulary is
not read again; it may be removed whenever no engine runs on it.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path

from rtp_llm.srt.gguf.file import GGUFFile, parts_of
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.utils.private_files import OTHERS_WRITE
from rtp_llm.srt.utils.scratch import ScratchFolder

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
_temporary: dict[str, ScratchFolder] = {}  # by key; kept until the process ends, where there is no cache
_MODELS = Path(__file__).parents[2] / "models_py"


def cache_root() -> Path:
    """Return the folder of all checkpoint folders, ``~/.cache/rtp-llm/gguf`` (or below ``XDG_CACHE_HOME``)."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path("~/.cache").expanduser()) / "rtp-llm" / "gguf"


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a folder is one of those made here, or like them: its config.json says that its weights are in a GGUF."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == "gguf")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def checkpoint_folder(path: str | Path, with_tokenizer: bool = True) -> Path:
    """Return the checkpoint folder of a GGUF, or of a split one of which any part is given; make it if there is none.

    Args:
        with_tokenizer: whether the file's own tokenizer is written, which must then be one that is supported.

    Raises:
        GGUFError: the file is damaged, or of a kind that is not supported.
        OSError: it cannot be read.
    """
    paths = parts_of(Path(path))
    key = _key(paths, with_tokenizer)
    name = f"{paths[0].stem[:50]}-{key}"
    try:
        return _in_cache(cache_root() / name, paths, with_tokenizer)
    except OSError as error:
        for part in paths:
            part.open("rb").close()  # the error, if it is the file's
        logger.warning("%s cannot be used (%s): the GGUF's config and tokenizer go to a temporary folder", name, error)
    if key not in _temporary:
        scratch = ScratchFolder()
        _write(scratch.path, paths[0], with_tokenizer)
        _temporary[key] = scratch
    return _temporary[key].path


def _in_cache(folder: Path, paths: tuple[Path, ...], with_tokenizer: bool) -> Path:
    """Return ``folder``, written first if it is not there: whole or not at all, also where several processes do so.

    Raises:
        OSError: it cannot be written, or others could have written it.
    """
    if not os.path.lexists(folder):
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))  # for this user alone
        logger.info("writing configuration and tokenizer of %s to %s", paths[0], folder)
        try:
            _write(new, paths[0], with_tokenizer)
            new.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # those: another process was faster
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & OTHERS_WRITE:
        raise PermissionError(f"{folder} is no folder that only this user can write to")
    return folder


def _write(folder: Path, path: Path, with_tokenizer: bool) -> None:
    """Write the folder's files, in a process of its own where this one has not imported torch, nor models from
    elsewhere, which only it may know: a model file needs torch, and a large vocabulary hundreds of MB."""
    if "torch" in sys.modules or ModelRegistry.has_external:
        from rtp_llm.srt.gguf.making import write_folder as write  # tokenizers, only needed here
    else:
        from rtp_llm.srt.gguf.making_apart import write_folder_apart as write
    write(folder, path, with_tokenizer)


def _key(paths: tuple[Path, ...], with_tokenizer: bool) -> str:
    parts = []
    for path in paths:
        info = path.stat()
        parts.append((str(path.resolve()), path.name, info.st_size, info.st_mtime_ns))
    said = json.dumps([parts, _of_elsewhere(paths[0]), with_tokenizer, _code()])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _of_elsewhere(path: Path) -> object:
    """Return what depends on models that are not the project's own, if there are any."""
    if not ModelRegistry.has_external:
        return None
    from rtp_llm.srt.gguf.config import config_json  # models, only needed here

    return config_json(GGUFFile.open(path))


@cache
def _code() -> str:
    """Return a digest of the source that makes a folder: what another version of it wrote is not used."""
    digest = hashlib.sha256()
    for path in sorted((*Path(__file__).parent.glob("*.py"), *_MODELS.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()
