"""Traces of what a worker's process computes, for chrome://tracing or Perfetto."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_ACTIVITIES = {"CPU": ProfilerActivity.CPU, "GPU": ProfilerActivity.CUDA}


class Profiler:
    """At most one trace at a time."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._profile: profile | None = None

    def start(self, activities: Sequence[str], record_shapes: bool) -> None:
        """``activities``: of ``CPU`` and ``GPU``; the latter counts where there is one.

        Raises:
            ValueError: nothing of what is asked for can be recorded here.
            RuntimeError: a trace is being recorded.
        """
        if self._profile is not None:
            raise RuntimeError("a profile is being recorded already")
        names = [name for name in activities if name != "GPU" or torch.cuda.is_available()]
        if not names:
            raise ValueError(f"there is no GPU to profile; activities {list(activities)} must include CPU")
        self._profile = profile(activities=[_ACTIVITIES[name] for name in names], record_shapes=record_shapes)
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
