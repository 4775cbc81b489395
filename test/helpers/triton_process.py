"""Tests of Triton kernels without a GPU, in processes of their own: the pytest process never imports Triton.

Triton reads ``TRITON_INTERPRET`` when a kernel is defined. So a test function runs in one of two processes that this
module starts, one with the interpreter, where kernels compute on tensors of the CPU, and one with the compiler.
"""

import atexit
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache, wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 300
MODE = "RTP_LLM_TRITON_TESTS"  # of a process: what it is for
MISSING = importlib.util.find_spec("triton") is None


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test with kernels in Triton's interpreter. Its arguments come from ``parametrize``, not from fixtures."""
    return _elsewhere(test, "interpret")


def compiled(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test with kernels that can be compiled, and not launched."""
    return _elsewhere(test, "compile")


def _elsewhere(test: Callable[..., None], mode: str) -> Callable[..., None]:
    if os.environ.get(MODE) == mode:
        return test

    @pytest.mark.skipif(MISSING, reason="Triton is not installed: pip install 'rtp-llm[dev]' on x86-64 Linux")
    @wraps(test)
    def run(**arguments: Any) -> None:
        failure = _process(mode).run(test.__code__.co_filename, test.__name__, arguments)
        assert failure is None, failure

    return run


class _Process:
    def __init__(self, mode: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, mode, list(sys.path)), daemon=True)
        self._process.start()
        theirs.close()
        atexit.register(self.stop)

    def run(self, file: str, name: str, arguments: dict[str, Any]) -> str | None:
        """Return the traceback of the test's failure; None: it passed."""
        self._connection.send((file, name, arguments))
        if not self._connection.poll(TIMEOUT_S):
            self.stop()
            return f"{name}: no end after {TIMEOUT_S} s"
        failure: str | None = self._connection.recv()
        return failure

    def stop(self) -> None:
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
        _process.cache_clear()


@cache
def _process(mode: str) -> _Process:
    return _Process(mode)


def _serve(connection: Connection, mode: str, path: list[str]) -> None:
    os.environ[MODE] = mode
    os.environ.pop("TRITON_INTERPRET", None)
    if mode == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it has been; Triton 3.9 warns where it is unset
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        while True:
            try:
                file, name, arguments = connection.recv()
            except EOFError:
                return
            torch.manual_seed(1)
            try:
                getattr(_module(file), name)(**arguments)
            except BaseException:
                connection.send(traceback.format_exc())
            else:
                connection.send(None)


@cache
def _module(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"elsewhere_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
