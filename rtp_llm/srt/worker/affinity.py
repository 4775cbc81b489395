"""Where a rank's threads compute: on processors of its own, or wherever the system puts them."""

import logging
import os

from rtp_llm.srt.configs.cpu_affinity import parse_cpu_affinity
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.platform import numa_nodes, share_of_nodes, usable_cpus

logger = logging.getLogger(__name__)


def use_processors(provider: DeviceProvider, args: ServerArgs, place: int, num_places: int) -> None:
    """Set how many of the host's threads compute for a rank, and on which processors. Call it from the thread that will
    execute steps: others that it starts inherit its processors, and memory that they touch first is near them.

    Args:
        place: the rank's, among all ranks of all cores on this machine.

    Raises:
        ValueError: this process may not use the processors that ``cpu_affinity`` names.
    """
    own = own_processors(args.cpu_affinity, place, num_places)
    if own is None:
        provider.use_threads(args.cpu_threads, args.pin_cpu_threads, place, num_places)
        return
    missing = sorted(set(own) - set(usable_cpus()))
    if missing:
        raise ValueError(f"cpu_affinity: this process may not use the processors {missing}; it has {usable_cpus()}")
    os.sched_setaffinity(0, own)
    logger.info("rank %d of %d computes on processors %s", place, num_places, own)
    threads = None if args.cpu_threads is None else max(1, args.cpu_threads // num_places)
    provider.use_threads(threads, args.pin_cpu_threads, 0, 1)


def own_processors(affinity: str | None, place: int, num_places: int) -> list[int] | None:
    """Return the processors of one of several ranks; None: all are everybody's."""
    if affinity is None:
        return None
    lists = parse_cpu_affinity(affinity, num_places)
    return lists[place] if lists is not None else share_of_nodes(numa_nodes(), place, num_places)
