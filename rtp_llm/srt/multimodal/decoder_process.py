"""Decode images in a process of their own, which can be killed and has a limit of memory."""

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from rtp_llm.srt.multimodal.images import STRIPE_PIXELS, ImageHeader, decode_image
from rtp_llm.srt.multimodal.work import check_stopped
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils.process import StartedPython, start_python

MEMORY_MARGIN = 1 << 27  # bytes of address space that the decoder takes for any image
POLL_S = 0.05  # between checks whether the caller still waits


class Task(NamedTuple):
    max_pixels: int
    keep_alpha: bool
    is_low: bool
    memory: int  # bytes that decoding the image may take


def decode_apart(data: bytes, header: ImageHeader, max_pixels: int, keep_alpha: bool, is_low: bool) -> Image.Image:
    """Do the same as ``images.decode_image``."""
    memory = 2 * len(data) + header.need.alone + header.num_file_pixels + MEMORY_MARGIN
    child = start_python(__name__)
    try:
        child.pipe.send(Task(max_pixels, keep_alpha, is_low, memory))
        child.pipe.send_bytes(data)
        _wait(child)
        answer = child.pipe.recv()
        if isinstance(answer, str):
            raise InvalidRequest(answer)
        return _received(child, *answer)
    finally:
        child.discard()


def _wait(child: StartedPython) -> None:
    while not child.pipe.poll(POLL_S):
        check_stopped()


def _received(child: StartedPython, mode: str, size: tuple[int, int]) -> Image.Image:
    image = Image.new(mode, size)
    for top, bottom in _stripes(size):
        _wait(child)
        image.paste(Image.frombytes(mode, (size[0], bottom - top), child.pipe.recv_bytes()), (0, top))
    return image


def _stripes(size: tuple[int, int]) -> list[tuple[int, int]]:
    num_rows = max(STRIPE_PIXELS // size[0], 1)
    return [(top, min(top + num_rows, size[1])) for top in range(0, size[1], num_rows)]


def main(fd: int) -> None:
    """Decode one image: the process's main function."""
    with Connection(fd) as pipe:
        max_pixels, keep_alpha, is_low, memory = pipe.recv()
        data = pipe.recv_bytes()
        Image.init()
        _limit_memory(memory)
        try:
            image = decode_image(data, max_pixels, keep_alpha, is_low)
        except InvalidRequest as error:
            pipe.send(str(error))
            return
        except Exception:  # decoders raise exceptions of any kind
            os._exit(1)  # the other side sees the closed pipe
        pipe.send((image.mode, image.size))
        for top, bottom in _stripes(image.size):
            pipe.send_bytes(image.crop((0, top, image.width, bottom)).tobytes())


def _limit_memory(num_bytes: int) -> None:
    """Limit the address space, on systems that report how much is in use."""
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
