"""Traces of a worker's process, for chrome://tracing or Perfetto."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


class Profiler:
    """Records traces, at most one at a time."""

    def __init__(self, rank: int, activities: Mapping[str, ProfilerActivity]) -> None:
        """``activities``: those that this device can record, by name."""
        self._rank, self._activities = rank, activities
        self._profile: profile | None = None

    def start(self, activities: Sequence[str], record_shapes: bool) -> None:
        """Start a trace.

        Args:
            activities: of ``CPU`` and ``GPU``; those that cannot be recorded here are ignored.

        Raises:
            ValueError: none of the activities can be recorded here.
            RuntimeError: a trace is being recorded already.
        """
        if self._profile is not None:
            raise RuntimeError("a profile is being recorded already")
        wanted = [self._activities[name] for name in activities if name in self._activities]
        if not wanted:
            raise ValueError(f"nothing of {list(activities)} can be profiled here; have {list(self._activities)}")
        self._profile = profile(activities=wanted, record_shapes=record_shapes)
        self._profile.start()

    def stop(self, path_prefix: str) -> str:
        """Write the trace, and return the path: ``path_prefix``, the rank, and ``.trace.json.gz``.

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
