"""Kernels for AArch64 on another machine: compiled by Debian's cross compiler, run by qemu, called as if they were own.

``load`` is in place of ``build.load``. A call goes to a process that qemu emulates (``emulated_calls.cpp``), which
fetches from this process's memory whatever the kernel touches, and writes back what it changed. So the kernels' own
tests run unchanged, only slowly.
"""

import ctypes
import functools
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.srt.devices.cpu import binding, build, kernel_files

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"
CALLS = Path(__file__).with_name("emulated_calls.cpp")
SETS = [*kernel_files.AARCH64, kernel_files.PORTABLE]
PREFIX = "aarch64:"  # of an instruction set's name in tests
PR_SET_PTRACER = 0x59616D61
BY_REFERENCE = type(ctypes.byref(ctypes.c_int()))
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]


def instruction_sets() -> list[Any]:
    """Parameters of tests: the sets of this machine, and those that can be emulated, which is slow."""
    own = build.supported_isas() if build.compiler() else []
    missing = pytest.mark.skipif(
        bool(MISSING), reason=f"needs {' and '.join(MISSING)}: g++-aarch64-linux-gnu, qemu-user"
    )
    return [*own, *(pytest.param(PREFIX + name, marks=[pytest.mark.slow, missing]) for name in SETS)]


def compile_quickly(sets: Iterable[str], config: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run without slow tests, compile for those of these sets that engines here do not use in less time."""
    if config.option.markexpr == "not slow":
        for name in sets:
            needed, flags = build.ISAS[name]
            if name != build.isa():
                monkeypatch.setitem(build.ISAS, name, (needed, (*flags, "-O2")))


def use(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make kernels that are bound from now on those of an instruction set of ``instruction_sets``."""
    original = build.load
    for_emulator = isa.startswith(PREFIX)
    load = emulated if for_emulator else original
    target = isa.removeprefix(PREFIX)
    monkeypatch.setattr(build, "isa", lambda: target)
    monkeypatch.setattr(binding.build, "load", lambda name, for_isa=None: load(name, for_isa or target))


@functools.cache
def emulated(name: str, target: str) -> "EmulatedLibrary":
    return EmulatedLibrary(_program(name, target))


def _program(name: str, target: str) -> Path:
    """Compile a kernel file together with the program that calls it, once for all processes of a test run."""
    command = [COMPILER, *kernel_files.arguments(target, ()), "-I", str(kernel_files.SOURCES)]
    files = [str(CALLS), str(kernel_files.SOURCES / f"{name}.cpp")]
    digest = kernel_files.digest_of(name, [*command, CALLS.read_text()])
    folder = Path(tempfile.gettempdir()) / f"rtp-llm-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    program = folder / f"{name}-{target}-{digest}"
    if not program.exists():
        made = folder / f"{program.name}.{os.getpid()}"
        subprocess.run([*command, *files, "-rdynamic", "-ldl", "-o", str(made)], check=True)
        made.replace(program)
    return program


class EmulatedLibrary:
    """As ``ctypes.CDLL``: its attributes are the kernels, its items new ones of them."""

    def __init__(self, program: Path) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [EMULATOR, "-L", LIBRARIES, str(program), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "2"},
        )
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, self._process.pid, 0, 0, 0)  # it may open this process's memory

    def __getattr__(self, name: str) -> "EmulatedFunction":
        if name.endswith("_replayed"):
            raise AttributeError("calls from lists are made by this machine")
        return EmulatedFunction(self, name)

    def __getitem__(self, name: str) -> "EmulatedFunction":
        return EmulatedFunction(self, name)

    def call(self, request: str) -> int:
        with self._lock:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, f"the emulated process ended with status {self._process.wait()}, asked for {request!r}"
        return int(answer)


class EmulatedFunction:
    def __init__(self, library: EmulatedLibrary, name: str) -> None:
        self._library, self._name = library, name
        self.argtypes: tuple[Any, ...] = ()
        self.restype: Any = ctypes.c_int

    def __call__(self, *arguments: Any) -> Any:
        types = self.argtypes or (None,) * len(arguments)
        words = [word(argument, kind) for argument, kind in zip(arguments, types, strict=True)]
        result = self._library.call(" ".join([self._name, *words]))
        return None if self.restype is None else self.restype(result).value


def word(argument: Any, kind: Any) -> str:
    """An argument as the emulated process reads it."""
    if isinstance(argument, BY_REFERENCE):
        argument = argument._obj
    if isinstance(argument, (ctypes.Array, ctypes.Structure)):
        return f"i {ctypes.addressof(argument)}"
    if isinstance(argument, ctypes._SimpleCData):
        argument, kind = argument.value, type(argument)
    if kind in (ctypes.c_float, ctypes.c_double) or isinstance(argument, float):
        return f"f {struct.unpack('<I', struct.pack('<f', argument))[0]}"
    return f"i {int(argument or 0) & (1 << 64) - 1}"
