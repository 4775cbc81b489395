"""Architecture names to model classes. Model files are found by reading them, and imported only when asked for."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from torch import nn

ADDING_A_MODEL = "docs/supported_models/support_new_models.md"


class UnknownArchitectureError(ValueError):
    """No model class for any of the architectures asked for."""


class ModelImportError(ImportError):
    """A model file was found for the architecture, but importing it failed; the cause is chained."""


@dataclass
class _Discovery:
    """What reading the files of a package gave."""

    modules: dict[str, list[str]] = field(default_factory=dict)  # architecture -> modules whose EntryClass names it
    unreadable: dict[str, Exception] = field(default_factory=dict)  # path -> why its EntryClass could not be read


class _ModelRegistry:
    """Model classes by architecture name.

    ``models`` holds what was set by hand: ``ModelRegistry.models["MyForCausalLM"] = MyForCausalLM``; such an entry wins
    over a file. Every other architecture comes from the module-level ``EntryClass`` of a file of ``package``: a class,
    or a list or tuple of classes, known by their names. A file that cannot be imported harms nobody who does not ask
    for it.
    """

    def __init__(self, package: str) -> None:
        self.models: dict[str, type[nn.Module]] = {}
        self._package = package
        self._discovered: _Discovery | None = None

    def get_supported_archs(self) -> set[str]:
        """Every architecture name that can be asked for."""
        return self.models.keys() | self._discover().modules.keys()

    def is_arch_supported(self, arch: str) -> bool:
        return arch in self.get_supported_archs()

    def resolve_model_cls(self, architectures: str | Iterable[str]) -> tuple[type[nn.Module], str]:
        """The class for the first supported name, and that name. Names set in ``models`` are looked for first.

        Raises:
            UnknownArchitectureError: none is supported.
            ModelImportError: its file cannot be imported.
            ValueError: two files claim it.
        """
        names = [architectures] if isinstance(architectures, str) else list(architectures)
        for name in names:
            if name in self.models:
                return self.models[name], name
        modules = self._discover().modules
        for name in names:
            if name in modules:
                return self._import(name, modules[name]), name
        raise self._unknown(names)

    def _discover(self) -> _Discovery:
        if self._discovered is None:
            self._discovered = _read_package(self._package)
        return self._discovered

    def _import(self, arch: str, modules: list[str]) -> type[nn.Module]:
        if len(modules) > 1:
            raise ValueError(f"architecture {arch} is the EntryClass of several files: {', '.join(modules)}; keep one")
        try:
            return getattr(import_module(modules[0]), arch)
        except Exception as error:  # whatever a model file may raise; the cause is chained
            raise ModelImportError(
                f"the file of architecture {arch}, {modules[0]}, cannot be imported: {type(error).__name__}: {error}"
            ) from error

    def _unknown(self, names: list[str]) -> UnknownArchitectureError:
        supported = "".join(f"\n  {name}" for name in sorted(self.get_supported_archs()))
        unreadable = self._discover().unreadable
        notes = "".join(f"\nThe EntryClass of {path} cannot be read: {error}" for path, error in unreadable.items())
        error = UnknownArchitectureError(
            f"no model for the architecture {', '.join(names) or '(none named)'}. Supported are:{supported or ' none'}"
            f"{notes}\nTo add a model, see {ADDING_A_MODEL}"
        )
        error.__cause__ = next(iter(unreadable.values()), None)
        return error


def _read_package(package: str) -> _Discovery:
    """Reads the ``EntryClass`` of every module of ``package`` (not of its subpackages) without importing them."""
    found = _Discovery()
    for directory in import_module(package).__path__:
        for path in sorted(Path(directory).glob("*.py")):
            try:
                names = entry_class_names(path.read_text(encoding="utf-8"), str(path))
            except (SyntaxError, ValueError) as error:
                found.unreadable[str(path)] = error
                continue
            for name in names:
                found.modules.setdefault(name, []).append(f"{package}.{path.stem}")
    return found


def entry_class_names(source: str, filename: str) -> list[str]:
    """The class names that a module's source assigns to ``EntryClass``; none if it does not assign it.

    Raises:
        SyntaxError: the source is not Python.
        ValueError: ``EntryClass`` is not written as a name or a list or tuple of names.
    """
    names: list[str] = []
    for statement in ast.parse(source, filename).body:
        value = _entry_class_value(statement)
        if value is None:
            continue
        items = value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]
        names = [item.id for item in items if isinstance(item, ast.Name)]
        if len(names) < len(items):
            raise ValueError(
                f"line {statement.lineno}: EntryClass must be a class name or a list or tuple of class names"
            )
    return names


def _entry_class_value(statement: ast.stmt) -> ast.expr | None:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    if any(isinstance(target, ast.Name) and target.id == "EntryClass" for target in targets):
        return statement.value  # type: ignore[attr-defined]
    return None


ModelRegistry = _ModelRegistry("rtp_llm.models_py")
