"""Traces of what a worker's process computes, for chrome://tracing or Perfetto."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


class Profiler:
    """At most one trace at a time."""

    def __init__(self, rank: int, activities: Mapping[str, ProfilerActivity]) -> None:
        """``activities``: what can be recorded here."""
        self._rank, self._activities = rank, activities
        self._profile: profile | None = None

    def start(self, activities: Sequence[str], record_shapes: bool) -> None:
        """``activities``: of ``CPU`` and ``GPU``; what cannot be recorded here does not count.

        Raises:
            ValueError: nothing of what is asked for can be recorded here.
            RuntimeError: a trace is being recorded.
        """
        if self._profile is not None:
            raise RuntimeError("a profile is being recorded already")
        wanted = [self._activities[name] for name in activities if name in self._activities]
        if not wanted:
            raise ValueError(f"nothing of {list(activities)} can be profiled here; have {list(self._activities)}")
        self._profile = profile(activities=wanted, record_shapes=record_shapes)
        self._profile.start()

    def stop(self, path_prefix: str) -> str:
        """Writes the trace, and returns the path: ``path_prefix``, the rank, and ``.trace.json.gz``.

        Raises:
            RuntimeError: nothing is being recorded.
            OSError: the file cannot be written.
        """
        if self._profile is None:
            raise RuntimeError("no profile is being recorded")
        recorded, self._profile = self._profile, None
        recorded.stop()
        path = Path(f"{path_prefix}-rank{self._rank}.trace.json.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(path))
        return str(path)
