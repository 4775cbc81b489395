"""Times of a program's named parts, each without the parts nested in it."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Name = tuple[str, ...]


@dataclass(slots=True)
class Part:
    seconds: float = 0.0  # without nested parts
    calls: int = 0
    bytes: float = 0.0  # of memory, and operations, if the caller records them
    operations: float = 0.0

    def add(self, other: "Part") -> None:
        self.seconds += other.seconds
        self.calls += other.calls
        self.bytes += other.bytes
        self.operations += other.operations


class Stopwatch:
    """Times functions by wrapping them; others cost nothing. For one thread.

    The seconds of all parts add up to the outermost ones' total.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.parts: dict[Name, Part] = {}
        self.name: Name = ()  # of the running part
        self._clock = clock
        self._within_s = 0.0  # of the running part, spent in nested parts

    def timed(self, name: Name, function: Callable[..., Any], nested: bool = False) -> Callable[..., Any]:
        """Return ``function``, timed. ``nested``: its name is appended to that of the calling part."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.part((*self.name, *name) if nested else name):
                return function(*args, **kwargs)

        return wrapper

    def within_part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, timed whenever it is called as nested in the part that is running now."""
        return self.timed((*self.name, name), function)

    def take(self) -> dict[Name, Part]:
        """Return the times since the last call, and reset them. No part may be running."""
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
