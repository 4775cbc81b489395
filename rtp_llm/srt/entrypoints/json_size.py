"""Counts the values of a JSON text without parsing it: parsing makes an object of each, and cannot be stopped.

32 MiB of ``[],[],[],...`` take seconds and a gigabyte to parse; counting takes a few hundredths of a second.
"""

import numpy as np

from rtp_llm.srt.entrypoints.edge import MAX_CONTAINERS
from rtp_llm.srt.sampling_params import InvalidRequest

MAX_VALUES = 2**21  # token ids of a large batch are many
MAX_MEMBERS = 2**18  # of all objects together
BLOCK = 2**20  # bytes counted at once


def check_json_size(body: bytes) -> None:
    """Raise InvalidRequest if a body holds too many lists and objects, members or values.

    Exact for valid JSON; other texts fail when they are parsed.
    """
    # Without escaped backslashes and escaped quotation marks, every quotation mark left begins or ends a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    containers = members = values = 0
    is_inside = np.uint8(0)  # whether the block before ended inside a string
    for start in range(0, len(plain), BLOCK):
        block = np.frombuffer(plain, np.uint8, min(BLOCK, len(plain) - start), start)
        inside = np.bitwise_xor.accumulate((block == ord('"')).view(np.uint8)) ^ is_inside
        is_inside = inside[-1]
        outside = block[inside == 0]
        containers += int(np.count_nonzero((outside == ord("[")) | (outside == ord("{"))))
        members += int(np.count_nonzero(outside == ord(":")))
        values += int(np.count_nonzero(outside == ord(",")))
        _check("lists and objects", containers, MAX_CONTAINERS)
        _check("members of objects", members, MAX_MEMBERS)
        _check("values", values, MAX_VALUES)


def _check(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(f"the body holds more than {limit} {what}")
