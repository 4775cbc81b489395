"""Memory that ranks which are threads of the test's process share, as processes of one machine do."""

import mmap

from rtp_llm.srt.devices.cpu.binding import INT64, bind
from rtp_llm.srt.devices.cpu.exchange import SLOT_BYTES, SharedExchange
from rtp_llm.srt.distributed.parallel_state import DATA, World

TIMEOUT_S = 60.0


def share_memory(worlds: list[World]) -> None:
    """Let ranks with requests of their own send tokens to each other's experts through memory."""
    groups = [world.group(DATA) for world in worlds]
    memory = mmap.mmap(-1, bind("exchange", "exchange_bytes", INT64, INT64, result=INT64)(len(groups), SLOT_BYTES))
    for group in groups:
        group.shared = SharedExchange(group, memory, TIMEOUT_S)
