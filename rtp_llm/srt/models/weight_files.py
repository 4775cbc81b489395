"""Find a checkpoint's weight files, and read their tensors one at a time, as views of a memory map."""

import json
import logging
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rtp_llm.srt.models.mapped_pages import MappedFile

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

GGUF = ".gguf"
LOAD_FORMATS = ("auto", "safetensors", "pt", "gguf", "dummy")
_UNPICKLING_GARBAGE = (
    RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error
)  # fmt: skip
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state.*|sparse_linear|colbert_linear)\.(bin|pt)"
)


class WeightFileError(ValueError):
    """A weight file, or the index over several, cannot be used."""


class WeightsNotFoundError(FileNotFoundError):
    """The directory has no weights of the wanted format, or lacks some of the files its index names."""


def find_weight_files(model_path: str, load_format: str = "auto") -> list[Path]:
    """Return the weight files of a checkpoint directory, in order.

    Per format, tried in this order: the single file under its usual name, the files that an index names, all files of
    the format. ``safetensors``: ``*.safetensors``; ``pt``: ``*.bin``, else ``*.pt``; ``gguf``: ``*.gguf``; ``auto``:
    safetensors, else pt, else gguf.

    Raises:
        WeightsNotFoundError: there are none, or files that the index names are missing (the message names all).
        WeightFileError: an index that cannot be read.
    """
    directory = Path(model_path)
    looked_for: list[str] = []
    for single, pattern in _kinds(load_format):
        looked_for += [single, f"{single}.index.json", pattern]
        files = _find_kind(directory, single, pattern)
        if files:
            return files
    raise WeightsNotFoundError(
        f"no weights in {directory} for load format {load_format!r}; looked for {', '.join(looked_for)}. "
        f"There are: {', '.join(sorted(path.name for path in directory.iterdir())) or 'no files'}"
    )


def _kinds(load_format: str) -> list[tuple[str, str]]:
    safetensors = [("model.safetensors", "*.safetensors")]
    pickled = [("pytorch_model.bin", "*.bin"), ("pytorch_model.pt", "*.pt")]
    in_gguf = [("model.gguf", f"*{GGUF}")]
    kinds = {"auto": safetensors + pickled + in_gguf, "safetensors": safetensors, "pt": pickled, "gguf": in_gguf}
    if load_format not in kinds:
        raise ValueError(f"load format {load_format!r} has no weight files; have {', '.join(kinds)}")
    return kinds[load_format]


def _find_kind(directory: Path, single: str, pattern: str) -> list[Path]:
    one, index = directory / single, directory / f"{single}.index.json"
    indexed = _read_index(index) if index.exists() else []
    if one.exists() and one not in indexed:
        return [one]  # as transformers prefers it
    if indexed:
        missing = [path.name for path in indexed if not path.is_file()]
        if missing:
            raise WeightsNotFoundError(
                f"{len(missing)} of the {len(indexed)} files that {index} names are missing: {', '.join(missing)}. "
                "Download them again"
            )
        return indexed
    files = sorted(path for path in directory.glob(pattern) if not _NOT_WEIGHTS.fullmatch(path.name))
    # Mistral's repositories hold the same weights twice, "consolidated" under other names
    return [path for path in files if not path.name.startswith("consolidated")] or files


def _read_index(path: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [path.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise WeightFileError(f"{path} is not an index of weight files (a JSON object with `weight_map`)") from error
    for name, file in zip(names, files, strict=True):
        if problem := _problem_of_place(path.parent, name, file):
            raise WeightFileError(f"{path} names {name!r}, which is refused: {problem}")
    return files


def _problem_of_place(directory: Path, name: str, file: Path) -> str | None:
    """Return why an index may not name this file: it is outside of the checkpoint. None: it may.

    A snapshot in the hub's cache consists of links to ``blobs`` beside ``snapshots``: those belong to it.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "weights lie in the index's own directory"
    try:
        own, target = directory.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that no system has
        return str(error)
    blobs = own.parents[1] / "blobs" if len(own.parents) > 1 and own.parent.name == "snapshots" else None
    if target.is_relative_to(own) or (blobs is not None and target.parent == blobs):
        return None
    return f"it is a link out of the directory, to {target}"


def read_weights(files: list[Path], progress: Progress | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` of every tensor in the files, in their order on disk.

    A tensor is a view of a private memory map: copy the part you need, and drop the tensor. Data is read from disk at
    the first access, and a tensor's pages are dropped when the next tensor is requested: a tensor that is kept is read
    again, and changes to it are lost. A file is unmapped when its last view is gone.

    Raises:
        WeightFileError: a file that is truncated or corrupt, or that would need arbitrary objects unpickled.
    """
    sizes = [path.stat().st_size for path in files]
    for i, path in enumerate(files):
        done = sum(sizes[:i])
        reader = _read_safetensors if path.suffix == ".safetensors" else _read_pickled
        mapped = MappedFile(path)
        for name, tensor in reader(path):
            yield name, tensor
            mapped.drop(tensor)
            done += tensor.nbytes
            if progress:
                progress(min(done, sum(sizes)), sum(sizes))
    if progress:
        progress(sum(sizes), sum(sizes))


def _read_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise _corrupt(path, error) from error
    with file:
        for name in file.offset_keys():
            yield name, file.get_tensor(name)


def _read_pickled(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if not is_zip:
        logger.info("%s is in PyTorch's old format, which cannot be memory-mapped: reading it whole", path)
    try:
        content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if not refused:
            raise _corrupt(path, _first_line(error)) from error
        raise WeightFileError(
            f"{path} is refused: it holds more than tensors ({refused[1]}), and unpickling arbitrary objects can run "
            "any code. Convert it to safetensors in a place where that does not matter"
        ) from error
    except (*_UNPICKLING_GARBAGE, OSError) as error:
        raise _corrupt(path, _first_line(error)) from error
    if not isinstance(content, dict):
        raise WeightFileError(f"{path} must hold a dictionary of tensors, not {type(content).__name__}")
    for name in list(content):
        tensor = content.pop(name)
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise WeightFileError(
                f"{path} must hold a flat dictionary of named tensors, but {name!r} is {type(tensor)}"
            )
        yield name, tensor


def _corrupt(path: Path, reason: object) -> WeightFileError:
    return WeightFileError(f"{path} is truncated or corrupt ({reason}); download it again")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
