"""On which processors each rank computes: the option ``cpu_affinity``."""

import re
import sys

from rtp_llm.srt.configs.options import ServerArgsError

BY_NODE = "numa"
_LIST = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def parse_cpu_affinity(text: str | None, num_ranks: int) -> list[list[int]] | None:
    """Parse ``cpu_affinity``: the processors of each of the ranks; None where the machine's nodes decide, or nothing.

    Raises:
        ServerArgsError: it is no list for each rank, or the system cannot bind processes.
    """
    if text is None:
        return None
    if not sys.platform.startswith("linux"):
        raise ServerArgsError(f"cpu_affinity works on Linux only, not on {sys.platform}")
    if text == BY_NODE:
        return None
    lists = text.split(";")
    if not all(_LIST.fullmatch(each) for each in lists):
        raise ServerArgsError(f"cpu_affinity must be {BY_NODE}, or lists of processors such as 0-3;4-7, not {text!r}")
    if len(lists) != num_ranks:
        raise ServerArgsError(f"cpu_affinity has {len(lists)} lists of processors, but there are {num_ranks} ranks")
    return [_processors(each) for each in lists]


def _processors(text: str) -> list[int]:
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise ServerArgsError(f"cpu_affinity: {part!r} ends before it begins")
        cpus.update(range(int(first), int(last or first) + 1))
    return sorted(cpus)
