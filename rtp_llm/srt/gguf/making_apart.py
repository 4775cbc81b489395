"""``write_folder`` in a process of its own, which gives its memory back: a large vocabulary takes hundreds of MB."""

import logging
from multiprocessing.connection import Connection
from pathlib import Path

from rtp_llm.srt.utils.ipc import receive, send
from rtp_llm.srt.utils.logging import configure_logging
from rtp_llm.srt.utils.process import start_python
from rtp_llm.srt.utils.transformers_imports import hide_torch


def write_folder_apart(folder: Path, path: Path, with_tokenizer: bool) -> None:
    """Do what ``making.write_folder`` does, and raise what it raises; RuntimeError if the process dies."""
    started = start_python(__name__)
    try:
        level = logging.getLevelName(logging.getLogger("rtp_llm").getEffectiveLevel())
        send(started.pipe, (folder, path, with_tokenizer, level))
        error: Exception | None = receive(started.pipe)
    except (EOFError, OSError):
        raise RuntimeError(f"the process that reads {path} ended with exit code {started.process.wait()}") from None
    finally:
        started.discard()
    if error is not None:
        raise error


def main(fd: int) -> None:
    """Run the process."""
    pipe = Connection(fd)
    hide_torch()  # from transformers, of which only tables of names are used here
    from rtp_llm.srt.gguf.making import write_folder  # after that

    folder, path, with_tokenizer, level = receive(pipe)
    configure_logging(level)
    try:
        write_folder(folder, path, with_tokenizer)
    except Exception as error:  # raised again in the process that waits
        send(pipe, error)
    else:
        send(pipe, None)
