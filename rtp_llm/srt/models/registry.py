"""Map architecture names to model classes. Model files are found by reading them, and imported only when needed."""

import logging
import os
import traceback
from collections import ChainMap
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

from rtp_llm.srt.configs.architectures import with_other_names
from rtp_llm.srt.gguf.form import declared_forms
from rtp_llm.srt.models.model_source import (
    CONFIG_CLASS,
    ENTRY_POINT_GROUP,
    PACKAGE_VARIABLE,
    ModelSource,
    entry_class_names,
    generates,
    is_model_file,
)

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

ADDING_A_MODEL = "docs/supported_models/support_new_models.md"


class UnknownArchitectureError(ValueError):
    """No model class for any of the requested architectures."""


class ModelImportError(ImportError):
    """A model file was found for the architecture, but importing it failed; the cause is chained."""


class DuplicateModelError(AssertionError, ValueError):
    """Two classes claim one architecture. (An AssertionError as well, which is what SGLang's registry raises.)"""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A class that is not imported yet.

    ``places``: the classes, as ``module:Class``, that claim the architecture. ``source``: what the text of its file
    says; None: it was not read.
    """

    arch: str
    places: tuple[str, ...]
    source: ModelSource | None = None

    def load(self) -> "type[nn.Module]":
        """Import the class.

        Raises:
            ModelImportError: its file cannot be imported.
            DuplicateModelError: several classes claim the architecture.
        """
        if len(self.places) > 1:
            raise DuplicateModelError(
                f"architecture {self.arch} is claimed by several files: {', '.join(self.places)}; keep one"
            )
        module, _, name = self.places[0].partition(":")
        try:
            model_class = attrgetter(name)(import_module(module))
            _check_is_class(f"{module}:{name}", model_class)
        except Exception as error:  # whatever a model file may raise; the cause is chained
            raise ModelImportError(
                f"the file of architecture {self.arch}, {module}, cannot be imported: {reason(error)}"
            ) from error
        return model_class


Entry: TypeAlias = "type[nn.Module] | ModelFile"


@dataclass
class _Found:
    """The architectures of a package or of a group of entry points."""

    entries: dict[str, Entry] = field(default_factory=dict)  # by architecture
    unreadable: dict[str, Exception] = field(default_factory=dict)  # file -> why its architectures are not known

    def claim(self, arch: str, place: str, source: ModelSource | None = None) -> None:
        before = self.entries.get(arch)
        places = before.places if isinstance(before, ModelFile) else ()
        self.entries[arch] = ModelFile(arch, tuple(dict.fromkeys((*places, place))), source)


class ModelMap(MutableMapping[str, "type[nn.Module]"]):
    """All supported architectures, and their classes.

    Names come from four places, in order of precedence: ``overrides``, the entries set here; the packages that the
    environment variable RTP_LLM_EXTERNAL_MODEL_PACKAGE names; the entry points of the group ``rtp_llm.models``; the
    files of ``package``. Reading names imports no file of the last two; reading a class imports its file. Only set
    entries can be deleted, which makes the entry that they hid visible again.
    """

    def __init__(self, package: str) -> None:
        self.overrides: dict[str, Entry] = {}
        self.unreadable: dict[str, Exception] = {}
        self._package = package

    @cached_property
    def _entries(self) -> ChainMap[str, Entry]:
        named = _import_named_packages()
        installed, built_in = _read_entry_points(), _read_package(self._package)
        self.unreadable |= installed.unreadable | built_in.unreadable
        return ChainMap(self.overrides, named, installed.entries, built_in.entries)

    @property
    def layers(self) -> list[MutableMapping[str, Entry]]:
        """The four places, in order of precedence."""
        return self._entries.maps

    def entry(self, arch: str) -> Entry:
        """Return the class, or the file that has it, without importing it."""
        return self._entries[arch]

    def __getitem__(self, arch: str) -> "type[nn.Module]":
        entry = self.entry(arch)
        return entry.load() if isinstance(entry, ModelFile) else entry

    def __setitem__(self, arch: str, model_class: "type[nn.Module]") -> None:
        _check_is_class(f"ModelRegistry.models[{arch!r}]", model_class)
        self.overrides[arch] = model_class

    def __delitem__(self, arch: str) -> None:
        del self.overrides[arch]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, arch: object) -> bool:
        return arch in self._entries

    def __repr__(self) -> str:
        return f"<models: {', '.join(sorted(self))}>"

    def clear(self) -> None:
        """Delete all entries that were set."""
        self.overrides.clear()


class _ModelRegistry:
    """Model classes by architecture name, in ``models``.

    A model file exports classes by its module-level ``EntryClass``: a class, or a list or tuple of classes, known by
    their names. A file that cannot be imported causes an error only when one of its classes is requested.

    Example:
        >>> ModelRegistry.models["MyForCausalLM"] = MyForCausalLM
    """

    def __init__(self, package: str) -> None:
        self.models = ModelMap(package)

    def register(self, package_name: str, overwrite: bool = False, strict: bool = False) -> None:
        """Import the modules of a package and add the classes that they name in ``EntryClass``.

        A module that cannot be imported is logged, and its error is raised when its architecture is requested; with
        ``strict``, at once. Nothing is added if an error is raised.

        Raises:
            ValueError: an architecture is known already, and ``overwrite`` is False.
            DuplicateModelError: two modules name different classes of one name.
            ImportError: there is no such package, or it cannot be imported.
        """
        found = _import_package(package_name, strict)
        taken = sorted(arch for arch in found.entries if arch in self.models)
        if taken and not overwrite:
            raise ValueError(
                f"{package_name}: model architecture {', '.join(taken)} already registered; "
                "set overwrite=True to replace it"
            )
        self.models.overrides.update(found.entries)
        self.models.unreadable |= found.unreadable

    def get_supported_archs(self) -> set[str]:
        """Return all supported architecture names."""
        return set(self.models)

    def get_generating_archs(self) -> set[str]:
        """Return the names of those that make tokens, as far as is known without importing a file."""
        return {arch for arch in self.models if generates(self.models.entry(arch))}

    def is_arch_supported(self, arch: str) -> bool:
        return arch in self.models

    @property
    def has_external(self) -> bool:
        """Whether any class is not the project's own."""
        return any(self.models.layers[:-1])

    def is_external(self, arch: str) -> bool:
        """Whether its class is not the project's own, but was set here or comes from an installed package."""
        return any(arch in layer for layer in self.models.layers[:-1])

    def resolve_model_cls(self, architectures: str | Iterable[str]) -> "tuple[type[nn.Module], str]":
        """Return the class for the first supported name, and that name. External classes are tried first.

        A name may be an alias of another one, as ``LLaMAForCausalLM`` is (see ``configs.architectures``).

        Raises:
            UnknownArchitectureError: none is supported.
            ModelImportError: its file cannot be imported.
            DuplicateModelError: two files claim it.
        """
        names = [architectures] if isinstance(architectures, str) else list(architectures)
        found = self._find(names)
        if found is None:
            raise self._unknown(names)
        return self.models[found], found

    def has_class(self, architectures: Iterable[str]) -> bool:
        """Return whether there is a class for one of these names; imports no file of ``models_py``."""
        return self._find(list(architectures)) is not None

    def config_class(self, architectures: Iterable[str], is_known: bool) -> type | None:
        """Return the ``config_class`` of the class for these names; None: it has none, or there is no such class.

        A file of ``models_py`` for a known model type is imported only if it says ``config_class`` itself.

        Args:
            is_known: transformers has a class for the configuration.

        Raises:
            ModelImportError, DuplicateModelError: as ``resolve_model_cls``.
        """
        found = self._find(list(architectures))
        if found is None:
            return None
        entry = self.models.entry(found)
        if isinstance(entry, ModelFile) and is_known and entry.source and not entry.source.config_is_own:
            return None
        return getattr(self.models[found], CONFIG_CLASS, None)

    def gguf_classes(self, gguf_architecture: str) -> "list[dict[str, type[nn.Module]]]":
        """Return the classes that declare a GGUF form of this architecture themselves, by name.

        There is a dict for each of the four places of ``ModelMap``, in order of precedence. A file of ``models_py`` is
        imported only if it has such a form. An installed file that cannot be imported is logged and left out.

        Raises:
            ModelImportError, DuplicateModelError: as ``resolve_model_cls``, for a file that has such a form.
        """

        def reads(entry: type) -> bool:
            return any(form.architecture == gguf_architecture for form in declared_forms(entry))

        found = []
        for layer in self.models.layers:
            entries = {arch: _load_if_gguf(entry, gguf_architecture) for arch, entry in layer.items()}
            found.append({arch: entry for arch, entry in entries.items() if entry and reads(entry)})
        return found

    def gguf_architectures(self) -> set[str]:
        """Return the GGUF architectures that classes declare, as far as is known without importing a file."""
        found: set[str] = set()
        for entry in map(self.models.entry, self.models):
            if isinstance(entry, ModelFile):
                found |= entry.source.gguf_architectures if entry.source else set()
            else:
                found |= {form.architecture for form in declared_forms(entry)}
        return found

    def _find(self, names: list[str]) -> str | None:
        for layer in self.models.layers:
            for name in with_other_names(names):
                if name in layer:
                    return name
        return None

    def _unknown(self, names: list[str]) -> UnknownArchitectureError:
        supported = "".join(f"\n  {name}" for name in sorted(self.models))
        unreadable = self.models.unreadable
        notes = "".join(f"\nThe EntryClass of {path} cannot be read: {error}" for path, error in unreadable.items())
        error = UnknownArchitectureError(
            f"no model for the architecture {', '.join(names) or '(none named)'}. Supported are:{supported or ' none'}"
            f"{notes}\nTo add a model, see {ADDING_A_MODEL}"
        )
        error.__cause__ = next(iter(unreadable.values()), None)
        return error


def _load_if_gguf(entry: Entry, gguf_architecture: str) -> "type[nn.Module] | None":
    """Return the class if it may have a form of this architecture, as far as its source says."""
    if not isinstance(entry, ModelFile):
        return entry
    if entry.source:
        return entry.load() if gguf_architecture in entry.source.gguf_architectures else None
    try:
        return entry.load()
    except (ModelImportError, DuplicateModelError) as error:
        logger.warning("%s is left out in the search for a reader of GGUF files: %s", entry.arch, error)
        return None


def import_model_classes(package_name: str, strict: bool = False) -> "dict[str, type[nn.Module]]":
    """Return, by name, the ``EntryClass`` classes of a module, or of a package and its modules (not subpackages).

    A module that cannot be imported is logged and left out; with ``strict``, it raises a ModelImportError.

    Raises:
        DuplicateModelError: two modules name different classes of one name.
        ImportError: there is no such package, or it cannot be imported.
    """
    entries = _import_package(package_name, strict).entries
    return {arch: entry for arch, entry in entries.items() if not isinstance(entry, ModelFile)}


def _import_package(package: str, strict: bool) -> _Found:
    """Return classes of the modules that can be imported; of the others, the names that their sources claim."""
    import_module(package)
    found = _Found()
    for module, path in _files_of(package):
        try:
            classes = _entry_classes(import_module(module))
        except Exception as error:  # whatever a model file may raise; it is chained, or raised when asked for
            if strict:
                raise ModelImportError(f"{module} cannot be imported: {reason(error)}") from error
            logger.warning("%s cannot be imported, and its models are left out: %s", module, reason(error))
            _claim_by_source(found, module, path)
            continue
        for model_class in classes:
            before = found.entries.setdefault(model_class.__name__, model_class)
            if before is not model_class:
                raise DuplicateModelError(
                    f"{package}: duplicated model implementation for {model_class.__name__}; one is in {module}"
                )
    return found


def _entry_classes(module: ModuleType) -> "list[type[nn.Module]]":
    value = getattr(module, "EntryClass", [])
    classes = list(value) if isinstance(value, (list, tuple)) else [value]
    for model_class in classes:
        _check_is_class(f"{module.__name__}.EntryClass", model_class)
    return classes


def _check_is_class(what: str, value: object) -> None:
    if not isinstance(value, type):
        raise TypeError(f"{what} must be a model class, not {value!r}")


def _import_named_packages() -> dict[str, Entry]:
    """Return the classes of the packages that the environment names, separated by commas.

    Raises:
        ModelImportError: one of them cannot be imported, or has no classes.
        DuplicateModelError: two have a class of the same name.
    """
    entries: dict[str, Entry] = {}
    for package in filter(None, (name.strip() for name in os.environ.get(PACKAGE_VARIABLE, "").split(","))):
        try:
            found = _import_package(package, strict=True).entries
        except Exception as error:  # whatever a package may raise; the cause is chained
            raise ModelImportError(f"{PACKAGE_VARIABLE} names {package}: {reason(error)}") from error
        if not found:
            raise ModelImportError(f"{PACKAGE_VARIABLE} names {package}, but no module of it defines EntryClass")
        if twice := sorted(found.keys() & entries.keys()):
            raise DuplicateModelError(f"{PACKAGE_VARIABLE} names several packages with {', '.join(twice)}; keep one")
        entries |= found
    return entries


def _read_entry_points() -> _Found:
    """Read entry points of installed packages: ``Architecture = module:Class``, or ``any name = package``."""
    found = _Found()
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        if ":" in entry_point.value:
            found.claim(entry_point.name, entry_point.value)
            continue
        try:
            package = _read_package(entry_point.value)
        except Exception as error:  # finding a package imports its parents; reported when no model is found
            found.unreadable[f"entry point {entry_point.name} = {entry_point.value}"] = error
            continue
        found.unreadable |= package.unreadable
        for arch, entry in package.entries.items():
            for place in entry.places if isinstance(entry, ModelFile) else ():
                found.claim(
                    arch, place
                )  # without its source: its file is imported before a configuration is read: it may register one
    return found


def _read_package(package: str) -> _Found:
    """Read the ``EntryClass`` of a module, or of a package and its modules, without importing them."""
    found = _Found()
    for module, path in _files_of(package):
        _claim_by_source(found, module, path)
    return found


def _files_of(package: str) -> list[tuple[str, Path]]:
    """Return (module name, file) of a module, or of a package and its modules, without its subpackages."""
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    if spec.submodule_search_locations is None:
        return [(package, Path(str(spec.origin)))]
    files = [path for directory in spec.submodule_search_locations for path in sorted(Path(directory).glob("*.py"))]
    return [
        (package if path.stem == "__init__" else f"{package}.{path.stem}", path)
        for path in files
        if path.stem != "__main__"
    ]


def _claim_by_source(found: _Found, module: str, path: Path) -> None:
    try:
        source = path.read_text(encoding="utf-8")
        names = entry_class_names(source, str(path))
    except (SyntaxError, ValueError, OSError) as error:
        found.unreadable[str(path)] = error
        return
    said = ModelSource.of(source)
    for name in names:
        found.claim(name, f"{module}:{name}", said)


def reason(error: BaseException) -> str:
    """Describe an error: type, message, and the model file's line that caused it; a ModelImportError has all that."""
    if isinstance(error, ModelImportError):
        return str(error)
    lines = [
        f" ({frame.f_code.co_filename}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if is_model_file(str(frame.f_globals.get("__name__")))
    ]
    return f"{type(error).__name__}: {error}{lines[-1] if lines else ''}"


ModelRegistry = _ModelRegistry("rtp_llm.models_py")
