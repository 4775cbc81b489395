"""The port for devices that record their work once and repeat it without the host: CUDA graphs."""

from abc import ABC, abstractmethod
from collections.abc import Callable

Work = Callable[[], None]


class GraphCapture(ABC):
    """Records work that a function launches. A recording repeats the same work on the same memory.

    All recordings of one object share the memory of their intermediate results: only one runs at a time, and what one
    computes is lost when another runs, unless it is written to a tensor that was made before.
    """

    @abstractmethod
    def warm_up(self, work: Work) -> None:
        """Run the work where it will be recorded, so that what happens only once (compiling, workspaces) is done."""

    @abstractmethod
    def record(self, work: Work) -> Work:
        """Record the work and return the function that repeats it. Recording itself computes nothing.

        Raises:
            RuntimeError: the work waits for the device, or does something else that cannot be recorded.
        """
