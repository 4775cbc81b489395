"""Edits of the reference's own code, tried when nothing else reproduces ours.

A model's methods, and functions of its file that they call, are compiled anew with one small edit each, for one module
at a time; see ``source_edits``. If the reference then gives ours, ours is what that edit makes of it.
"""

import ast
import inspect
import re
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.locate import layer_of
from rtp_llm.tools.verify.rounding_causes import ROUNDED
from rtp_llm.tools.verify.source_edits import Edit, edits, edits_text, name_edits, rarer_edits, rounding_of
from rtp_llm.tools.verify.trace import Place

MAX_SECONDS = 120.0  # each edit computes a layer or all anew
MAX_NAME_SECONDS = 20.0  # for one variable in the place of another, of which there are many
MAX_SHOWN = 3  # edits with the same result
_LIBRARIES = ("torch.", "transformers.masking_utils", "transformers.modeling_utils", "transformers.cache_utils")
_FACTORY = "made"


class SourceEdit(NamedTuple):
    """``module``: the name of the module whose code is edited; ``cause``: how."""

    module: str
    cause: str


@dataclass(frozen=True)
class _Function:
    """A function of the reference's code.

    Args:
        module: the name of the module whose method it is, or that calls it; of several alike, the first.
        owners: where it is set: the modules themselves, or the globals of the model's file.
    """

    module: str
    name: str
    function: FunctionType
    owners: Sequence[nn.Module] | dict[str, Any]

    @property
    def title(self) -> str:
        return self.function.__qualname__

    def parsed(self) -> ast.FunctionDef | None:
        """Return its syntax tree; None: there is no source, or it is no plain function."""
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(self.function))).body[0]
        except (OSError, TypeError, SyntaxError):
            return None
        return tree if isinstance(tree, ast.FunctionDef) else None

    def compiled(self, tree: ast.FunctionDef) -> Any:
        """Return the function of a changed tree, in the globals of the old one. ``super()`` needs its class."""
        factory = ast.FunctionDef(
            name=_FACTORY,
            args=ast.arguments(posonlyargs=[], args=[ast.arg("__class__")], kwonlyargs=[], kw_defaults=[], defaults=[]),
            body=[tree, ast.Return(ast.Name(tree.name, ast.Load()))],
            decorator_list=[],
        )
        whole = ast.fix_missing_locations(ast.Module([factory], []))
        space: dict[str, Any] = {}
        # The code is the reference's, which runs anyway, with one edit
        exec(compile(whole, inspect.getfile(self.function), "exec"), self.function.__globals__, space)
        kind = self.function.__qualname__.rpartition(".")[0]
        return space[_FACTORY](self.function.__globals__.get(kind))

    @contextmanager
    def replaced(self, other: Any) -> Iterator[None]:
        if isinstance(self.owners, dict):
            self.owners[self.name] = other
            try:
                yield
            finally:
                self.owners[self.name] = self.function
            return
        before = [vars(owner).get(self.name) for owner in self.owners]
        for owner in self.owners:
            setattr(owner, self.name, MethodType(other, owner))
        try:
            yield
        finally:
            for owner, own in zip(self.owners, before, strict=True):
                delattr(owner, self.name)
                if own is not None:
                    setattr(owner, self.name, own)


def find_source_edit(evidence: Evidence, place: Place) -> SourceEdit | None:
    """Return the edit of the reference's code that gives ours at a place; None: none of those does that are tried
    within MAX_SECONDS."""
    ours, theirs = evidence.pair(place)
    begin = time.monotonic()
    deadline = begin + MAX_SECONDS
    with evidence.replay.recording():
        for edited, function in product((edits, rarer_edits, name_edits), list(_functions(evidence, place))):
            if edited is name_edits and deadline == begin + MAX_SECONDS:
                deadline = min(deadline, time.monotonic() + MAX_NAME_SECONDS)
            tree = function.parsed()
            if tree is None or not _gives(evidence, place, function, tree, theirs):
                continue
            found: list[Edit] = []
            for edit in edited(tree):
                if time.monotonic() > deadline or len(found) == MAX_SHOWN:
                    break
                if _gives(evidence, place, function, edit.tree, ours):
                    found.append(edit)
            if found:
                rounded = rounding_of(found)
                text = f"{ROUNDED.format(dtype=rounded)}, " if rounded else ""
                return SourceEdit(
                    function.module, f"{text}as if in the reference's {function.title} {edits_text(found)}"
                )
            if time.monotonic() > deadline:
                break
    return None


def _gives(
    evidence: Evidence, place: Place, function: _Function, tree: ast.FunctionDef, expected: torch.Tensor
) -> bool:
    """Return whether the reference has a tensor at a place, with a function as ``tree`` says."""
    try:
        with warnings.catch_warnings(action="ignore"), function.replaced(function.compiled(tree)):
            changed = evidence.replay.tensor(place)
    except Exception:  # of any kind: the edit does not fit
        return False
    return changed is not None and evidence.same(changed, expected)


def _functions(evidence: Evidence, place: Place) -> Iterator[_Function]:
    """Yield the functions that may have made a place's tensor: of modules around it, the nearest first."""
    around = evidence.replay.modules_around(place)
    names = sorted((name for name in around if name), key=lambda name: -_shared(name, place.module))
    seen: set[int] = set()
    for name, alike in alike_modules({name: around[name] for name in names}, layer_of(place.module)):
        for function in _methods(name, alike):
            yield function
            for called in _called(function):
                if id(called.function) not in seen:
                    seen.add(id(called.function))
                    yield called


def alike_modules(modules: Mapping[str, nn.Module], layer: str) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield a layer's modules by their names, those of one class in a list together, such as experts: a model file has
    one class for all. Where there are two, each follows alone, as one of two norms may be wrong."""
    groups: dict[tuple[Any, str], list[str]] = {}
    for name, module in modules.items():
        place = re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix(layer)) if layer else name
        groups.setdefault((type(module), place), []).append(name)
    for names in groups.values():
        yield names[0], [modules[name] for name in names]
        if len(names) == 2:
            yield from ((name, [modules[name]]) for name in names)


def _shared(name: str, other: str) -> int:
    """Return how many parts of two names are equal from their beginning."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(name.count("."), other.count(".")) + 1)


def _methods(name: str, modules: Sequence[nn.Module]) -> Iterator[_Function]:
    module = modules[0]
    for kind in type(module).__mro__:
        if f"{kind.__module__}.".startswith(_LIBRARIES):
            break
        for key, value in vars(kind).items():
            if key == "forward" or (inspect.isfunction(value) and not key.startswith("__")):
                function = inspect.unwrap(value) if callable(value) else None
                if isinstance(function, FunctionType) and getattr(type(module), key, None) is value:
                    yield _Function(name, key, function, modules)


def _called(function: _Function) -> Iterator[_Function]:
    """Yield the functions of the same file that a function names."""
    space = function.function.__globals__
    for key in function.function.__code__.co_names:
        value = space.get(key)
        plain = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else None
        if isinstance(plain, FunctionType) and plain.__module__ == function.function.__module__:
            yield _Function(function.module, key, plain, space)
