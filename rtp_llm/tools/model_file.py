"""A model file that lies anywhere, made the one of given architectures for a while, on all ranks."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, invalidate_caches
from itertools import count
from pathlib import Path

from torch import nn

from rtp_llm.srt.models.model_source import entry_class_names
from rtp_llm.srt.models.registry import ModelImportError, ModelRegistry, reason

_numbers = count()


@contextmanager
def served_by_file(
    path: str | Path, architectures: Sequence[str], class_name: str | None = None
) -> Iterator[type[nn.Module]]:
    """Register a file's class for these architectures within the context, and yield the class.

    The file is imported as a module of its own, by a name that other processes of the engine find on this process's
    ``sys.path``; so it works on several ranks, too. Files beside it are not importable from it.

    Args:
        class_name: of the class; None: the first architecture's, or the only one that ``EntryClass`` names.

    Raises:
        ModelImportError: the file cannot be imported, or has no such class; the cause is chained.
    """
    source = Path(path).read_text(encoding="utf-8")
    module_name = f"rtp_llm_served_file_{next(_numbers)}"
    before = dict(ModelRegistry.models.overrides)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{module_name}.py").write_text(source, encoding="utf-8")
        sys.path.append(folder)
        invalidate_caches()
        try:
            model_class = _import_class(module_name, path, class_name or _only_class(source, path, architectures))
            for architecture in architectures:
                ModelRegistry.models[architecture] = model_class
            yield model_class
        finally:
            ModelRegistry.models.overrides.clear()
            ModelRegistry.models.overrides.update(before)
            sys.path.remove(folder)
            sys.modules.pop(module_name, None)


def _only_class(source: str, path: str | Path, architectures: Sequence[str]) -> str:
    try:
        names = entry_class_names(source, str(path))
    except (SyntaxError, ValueError) as error:
        raise ModelImportError(f"{path} cannot be read: {error}") from error
    for name in architectures:
        if name in names:
            return name
    if len(names) != 1:
        raise ModelImportError(
            f"{path} has EntryClass = [{', '.join(names)}], none of which is {', '.join(architectures)}; name one class"
        )
    return names[0]


def _import_class(module_name: str, path: str | Path, class_name: str) -> type[nn.Module]:
    try:
        model_class = getattr(import_module(module_name), class_name)
    except Exception as error:  # whatever a model file may raise; the cause is chained
        raise ModelImportError(f"{path} cannot be imported: {reason(error)}") from error
    return model_class
