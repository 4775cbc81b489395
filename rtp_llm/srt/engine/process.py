"""The core in a process of its own: ``start_core_process`` runs ``main`` in it.

``fd`` is one end of a socket pair. The process receives its orders there, once, and sends events: progress of loading,
that the core is ready, which requests it is about to compute, and the error that ends it. The process ends when the
other end closes; when the parent dies, it is killed.
"""

import gc
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import get_args

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.engine.core import EngineCore
from rtp_llm.srt.engine.orders import Orders
from rtp_llm.srt.kernels.block_tensor import leave_out_distributed_tensors
from rtp_llm.srt.messages import FromCore, ToCore
from rtp_llm.srt.models.registrations import unpack_registrations
from rtp_llm.srt.models.registry import reason
from rtp_llm.srt.utils.freed_memory import drop_library_pages, give_back_once
from rtp_llm.srt.utils.ipc import receive, send
from rtp_llm.srt.utils.logging import configure_logging
from rtp_llm.srt.utils.zmq_link import ZmqCoreEnd


def main(fd: int) -> None:
    # The parent handles Ctrl-C, and a SIGTERM to the whole process group: it lets running requests end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = Connection(fd)
    try:
        orders: Orders = receive(pipe)
    except EOFError:
        return  # the parent is gone already
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        _run(orders, pipe)
    except BrokenPipeError:
        os._exit(1)  # the parent is gone
    except BaseException as error:
        send(pipe, ("error", (reason(error), traceback.format_exc())))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # without the interpreter's finalization, in which libraries print what they leave


def _run(orders: Orders, pipe: Connection) -> None:
    args = orders.server_args
    configure_logging(args.log_level)
    leave_out_distributed_tensors()
    unpack_registrations(orders.registrations)
    model_config = ModelConfig.from_server_args(args)
    drop_library_pages()  # before the weights come
    link = ZmqCoreEnd(orders.socket_dir, get_args(ToCore), get_args(FromCore))
    core = EngineCore(
        args,
        model_config,
        link,
        on_progress=lambda done, total: send(pipe, ("progress", (done, total))),
        on_admission=lambda rids: send(pipe, ("running", rids)),
        on_loaded=give_back_once,
        replica=orders.replica,
        free_bytes=orders.free_bytes,
    )
    gc.collect()
    gc.freeze()  # these objects stay for good: full collections need not traverse them again and again
    drop_library_pages()  # what loading needed
    try:
        send(pipe, ("ready", core.info))
        core.run()
    finally:
        core.shutdown()
        link.close()


def _end_with_parent(pipe: Connection) -> None:
    """End this process when the pipe closes. Nothing is sent over it after the orders."""
    with suppress(EOFError, OSError):
        receive(pipe)
    os._exit(0)
