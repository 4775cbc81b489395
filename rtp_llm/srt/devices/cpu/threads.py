"""Where the threads of kernels run: OpenMP's pool of the calling thread, which is one of them."""

import ctypes
import itertools
import logging
from collections.abc import Sequence

import torch

from rtp_llm.srt.devices.cpu.binding import INT, POINTER, bind
from rtp_llm.srt.platform import compute_cores, fast_cpus, usable_cpus

logger = logging.getLogger(__name__)


def use_threads(num_threads: int) -> None:
    """Set how many threads of this thread's pool compute."""
    bind("probe", "use_threads", INT)(num_threads)


def bind_threads(pinned: bool, rank: int) -> None:
    """Bind each thread to a core of its own if ``pinned``; else, on a hybrid processor, all to its fast cores."""
    num_threads, usable, cores = torch.get_num_threads(), usable_cpus(), compute_cores()
    fast = fast_cpus(usable)
    if pinned:
        places = cores_of(num_threads, rank, cores)
    elif len(fast) < len(usable) and num_threads <= len(cores):
        places = [fast] * num_threads
    else:
        places = []  # wherever the system puts them
    if not places:
        return
    starts = [0, *itertools.accumulate(map(len, places))]
    cpus = list(itertools.chain(*places))
    failed = bind("probe", "bind_threads", POINTER, POINTER, INT, result=INT)(
        (ctypes.c_int * len(cpus))(*cpus), (ctypes.c_int * len(starts))(*starts), len(places)
    )
    if failed:
        logger.warning("%d of %d threads could not be bound to %s", failed, len(places), places)
    else:
        logger.info("%d threads on processors %s", len(places), places if pinned else places[0])


def cores_of(num_threads: int, rank: int, cores: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the logical processors of the core for each thread of a rank.

    Raises:
        ValueError: there are fewer cores than threads.
    """
    own = cores[rank * num_threads : (rank + 1) * num_threads]
    if len(own) < num_threads:
        raise ValueError(
            f"--pin-cpu-threads needs a core for each thread, but of {len(cores)} cores {len(own)} are left for the "
            f"{num_threads} threads of rank {rank}; lower --cpu-threads"
        )
    return [list(core) for core in own]
