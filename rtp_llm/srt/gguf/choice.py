"""Which GGUF of a folder or a repository is meant: by its name, or by its quantization."""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)
_OTHER_THINGS = re.compile(r"(^|[-_./])(mmproj|imatrix)", re.IGNORECASE)  # vision parts, importance matrices
_MOST_SHOWN = 40


class ChoiceError(ValueError):
    """No file is meant, or it is not clear which; the message says what there is."""


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def choose(names: Iterable[str], wanted: str | None, where: str) -> list[str]:
    """Return the file that is meant, or all parts of a split one, in order.

    Args:
        names: paths in a folder or repository; others than GGUF files do not count.
        wanted: a path, or a part of it that stands alone, such as ``Q4_K_M``, whatever its case; None: the only file.
        where: the folder or repository, for messages.

    Raises:
        ChoiceError: no file is meant, or several.
    """
    every = _by_model(name for name in names if is_gguf(name))
    models = {model: files for model, files in every.items() if not _OTHER_THINGS.search(model)}
    if wanted is None:
        found = list(models)
    elif is_gguf(wanted):
        found = [model for model in every if _is_model(wanted, model)]
        models = every
    else:
        found = [model for model in models if _has_word(model, wanted)]
    if len(found) == 1:
        return models[found[0]]
    if not models:
        raise ChoiceError(f"{where} has no GGUF file of a language model")
    problem = f"{len(found)} of its GGUF files match" if found else "no GGUF file of it matches"
    what = f"{problem} {wanted!r}" if wanted is not None else f"it has {len(found)} GGUF files"
    raise ChoiceError(
        f"{where}: {what}. Name one by its quantization ({where}:{_example(found or list(models))}), or by its path; "
        f"there are: {_listed(models)}"
    )


def _by_model(names: Iterable[str]) -> dict[str, list[str]]:
    """Return path without the number of the part -> the parts, in order."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        models.setdefault(_PART.sub("", name), []).append(name)
    return models


def _is_model(wanted: str, model: str) -> bool:
    """Whether a path names a model: whole, or the file's name alone, with or without the number of a part."""
    path = _PART.sub("", wanted).lower()
    return path in (model.lower(), PurePosixPath(model).name.lower())


def _has_word(model: str, wanted: str) -> bool:
    """Whether a path has a word: ``Q4_K`` is no word of ``Q4_K_M``, nor ``F16`` of ``BF16``."""
    return bool(re.search(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9_])", model, re.IGNORECASE))


def _example(models: Sequence[str]) -> str:
    stem = PurePosixPath(models[0]).stem
    return re.split(r"[-.]", stem)[-1] or stem


def _listed(models: Iterable[str]) -> str:
    names = list(models)
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
