"""How long named parts of a program take, each without the parts within it."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Name = tuple[str, ...]


@dataclass(slots=True)
class Part:
    seconds: float = 0.0  # without the parts within it
    calls: int = 0
    bytes: float = 0.0  # and operations: as far as whoever times it tells
    operations: float = 0.0

    def add(self, other: "Part") -> None:
        self.seconds += other.seconds
        self.calls += other.calls
        self.bytes += other.bytes
        self.operations += other.operations


class Stopwatch:
    """Functions are timed by being wrapped; what is not wrapped costs nothing. For one thread.

    The seconds of all parts add up to those of the outermost ones.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.parts: dict[Name, Part] = {}
        self.name: Name = ()  # of the part that is running
        self._clock = clock
        self._within_s = 0.0  # of the running part, spent in parts within it

    def timed(self, name: Name, function: Callable[..., Any], nested: bool = False) -> Callable[..., Any]:
        """``function``, timed. ``nested``: its name is appended to that of the part that calls it."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.part((*self.name, *name) if nested else name):
                return function(*args, **kwargs)

        return wrapper

    def within_part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed as what is called within the part that is running now, whenever it is called."""
        return self.timed((*self.name, name), function)

    def take(self) -> dict[Name, Part]:
        """What was timed since the last call; the watch begins anew. No part is running."""
        parts, self.parts = self.parts, {}
        return parts

    def wrap(self, owner: Any, attribute: str, name: Name) -> None:
        """Time an object's method, or a class's or a module's function, from now on."""
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))

    @contextmanager
    def part(self, name: Name) -> Iterator[Part]:
        part = self.parts.get(name)
        if part is None:
            part = self.parts[name] = Part()
        outer, outer_within_s = self.name, self._within_s
        self.name, self._within_s = name, 0.0
        start_s = self._clock()
        try:
            yield part
        finally:
            elapsed_s = self._clock() - start_s
            part.seconds += elapsed_s - self._within_s
            part.calls += 1
            self.name, self._within_s = outer, outer_within_s + elapsed_s
