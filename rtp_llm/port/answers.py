"""What an expression of a model file can be known to be, without running it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Const:
    """A value. ``of_engine``: it follows from how this engine works, not from a literal of the file."""

    value: Any
    of_engine: bool = True


@dataclass(frozen=True)
class Engine:
    """An object of the other engine, by the path that leads to it; ``owner`` is "self." if a module keeps it."""

    path: str
    owner: str = ""


@dataclass(frozen=True)
class Expression:
    """An expression of ours with the same value."""

    text: str


@dataclass(frozen=True)
class ClassName:
    """A class, by the name that it has in the file."""

    name: str


Value = Const | Engine | Expression | ClassName

EMPTY = ()  # stands for an empty list, tuple or dictionary
