"""Compile a C++ kernel file at its first use, for this machine, and load it.

A kernel file ``NAME.cpp`` is in this folder, includes headers of this folder (``common.h``, and its own parts,
``NAME_PART.h``) and exports ``extern "C"`` functions of pointers and sizes. It includes none of torch's headers, so
that it compiles in seconds. It uses the OpenMP library that torch has loaded, so that there is one pool of threads.
Libraries are kept in ``~/.cache/rtp_llm/kernels`` (``RTP_LLM_KERNEL_CACHE`` names another folder), under a key of
everything that they depend on. They are code, so they are loaded only from a folder and a file that no other user
could have written (``utils/private_files.py``). If the folder is not safe, each process compiles for itself and keeps
nothing.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rtp_llm.srt.platform import cpu_flags
from rtp_llm.srt.utils.private_files import problem_of_file, problem_of_folder
from rtp_llm.srt.utils.scratch import ScratchFolder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Werror=return-type",
)
COMPILER_TIMEOUT_S = 300

# Best first: instruction set -> flags that the processor must have, and the compiler's flags.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c")
ISAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512_bf16": (
        (*_AVX512, "avx512_bf16", "avx512_vnni"),
        (*(f"-m{flag}" for flag in _AVX512), "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512"),
    ),
    "avx512": (_AVX512, (*(f"-m{flag}" for flag in _AVX512), "-mprefer-vector-width=512")),
    "avx2": (("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c")),
    "portable": ((), ()),
}
WELCOME = ("avx512vbmi",)  # flags that kernels for AVX-512 make use of where the processor has them


class KernelBuildError(RuntimeError):
    """A kernel file does not compile or load here; the message contains the compiler's output."""


def supported_isas() -> list[str]:
    """Return the instruction sets that this processor has, best first; the last is ``portable``."""
    flags = cpu_flags()
    return [isa for isa, (needed, _) in ISAS.items() if flags.issuperset(needed)]


@functools.cache
def isa() -> str:
    """Return the instruction set that kernels are compiled for: the best, or the one in ``RTP_LLM_CPU_ISA``.

    Raises:
        ValueError: the processor does not have the latter.
    """
    supported, asked = supported_isas(), os.environ.get("RTP_LLM_CPU_ISA")
    if asked and asked not in supported:
        raise ValueError(f"RTP_LLM_CPU_ISA is {asked!r}, but this processor has {supported}")
    return asked or supported[0]


@functools.cache
def compiler() -> str | None:
    """Return the C++ compiler: ``CXX``, else one in an absolute folder of the path; None: there is none."""
    asked = os.environ.get("CXX")
    names = [shlex.split(asked)[0]] if asked else ["g++", "c++", "clang++"]
    folders = os.pathsep.join(filter(os.path.isabs, os.get_exec_path()))
    return next((path for name in names if (path := shutil.which(name, path=folders))), None)


@functools.cache
def load(name: str, for_isa: str | None = None) -> ctypes.CDLL:
    """Return the library of ``NAME.cpp``, compiled now if it is not in the cache. ``for_isa``: None: ``isa()``.

    Raises:
        KernelBuildError: there is no compiler, or compiling or loading fails.
    """
    target = for_isa or isa()
    folder = _sound_cache()
    if folder is not None:
        return _open(_built_in(folder, name, target))
    with ScratchFolder() as private:
        return _open(_built_in(private, name, target))  # a loaded library does not need its file


@functools.cache
def kernels_work() -> bool:
    """Whether this machine can compile and load kernels; if not, log once why."""
    try:
        load("probe")
    except KernelBuildError as error:
        logger.warning(
            "no CPU kernels: %s\nPlain torch computes instead, several times slower in bfloat16. Install g++ "
            "(Debian: apt-get install g++), or name a C++ compiler in CXX.",
            error,
        )
        return False
    return True


def _built_in(folder: Path, name: str, target: str) -> Path:
    path = folder / f"{name}-{target}-{_key(name, target)}.so"
    if _problem_of(path) is not None:
        with _lock(path.with_suffix(".lock")):
            problem = _problem_of(path)  # another process may have compiled it while this one waited
            if problem:
                logger.warning("a compiled CPU kernel is not loaded but compiled anew: %s", problem)
            if problem is not None:
                _compile(name, target, path)
    return path


def _problem_of(path: Path) -> str | None:
    """Return why a library cannot be loaded: others could have written it; an empty string: it does not exist. None:
    it can."""
    try:
        return problem_of_file(path)
    except FileNotFoundError:
        return ""


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(f"the compiled CPU kernel {path} does not load: {error}") from error


def cache_folder() -> Path:
    asked = os.environ.get("RTP_LLM_KERNEL_CACHE")
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rtp_llm" / "kernels"


def _sound_cache() -> Path | None:
    """Return the cache's folder, created if needed; None, with a warning, if it cannot be used."""
    try:
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = cache_folder().resolve(strict=True)
        problem = problem_of_folder(folder)
        if problem is None and not os.access(folder, os.W_OK | os.X_OK):
            problem = f"{folder} cannot be written to"
    except OSError as error:
        problem = f"{cache_folder()}: {error.strerror}"
    if problem is None:
        return folder
    _warn_of_cache(problem)
    return None


@functools.cache
def _warn_of_cache(problem: str) -> None:
    """Log a warning, once for each problem, not for each kernel."""
    logger.warning(
        "compiled CPU kernels are neither loaded from the cache nor kept: %s. Every start compiles them anew, which "
        "takes a minute. Make it a folder that is yours alone (chmod 700), or name one in RTP_LLM_KERNEL_CACHE",
        problem,
    )


def _key(name: str, target: str) -> str:
    """Return a hash of sources, flags, compiler, processor and torch."""
    digest = hashlib.sha256()
    for file in _sources(f"{name}.cpp"):
        digest.update((SOURCES / file).read_bytes())
    for part in (*_command(name, target, Path("x")), _compiler_version(), torch.__version__, *sorted(cpu_flags())):
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()[:16]


def _sources(file: str) -> list[str]:
    """Return a file and the files of this folder that it includes, each once."""
    files = [file]
    for known in files:
        included = re.findall(r'^#include "([^"]+)"$', (SOURCES / known).read_text(encoding="utf-8"), re.MULTILINE)
        files += [name for name in dict.fromkeys(included) if name not in files]
    return files


@functools.cache
def _compiler_version() -> str:
    found = compiler()
    if found is None:
        raise KernelBuildError("there is no C++ compiler (looked for CXX, g++, c++, clang++)")
    return subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30).stdout


def _command(name: str, target: str, output: Path) -> list[str]:
    asked = shlex.split(os.environ.get("CXX", ""))
    _, flags = ISAS[target]
    if target.startswith("avx512"):
        flags += tuple(f"-m{flag}" for flag in WELCOME if flag in cpu_flags())
    return [
        str(compiler()), *asked[1:], *FLAGS, *flags, "-I", str(SOURCES), str(SOURCES / f"{name}.cpp"),
        *openmp_libraries(), "-o", str(output),
    ]  # fmt: skip


@functools.cache
def openmp_libraries() -> tuple[str, ...]:
    """Return the OpenMP libraries that torch has loaded into this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return ()  # not Linux: the compiler's own choice
    return tuple(sorted(set(re.findall(r"(/\S*lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\d]*)$", maps, re.MULTILINE))))


def _compile(name: str, target: str, path: Path) -> None:
    """Compile to ``path``, completely or not at all. The next call overwrites the remains of an interrupted one."""
    started = time.monotonic()
    made = path.with_suffix(".new")
    made.unlink(missing_ok=True)
    command = _command(name, target, made)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILER_TIMEOUT_S)
        if done.returncode:
            raise KernelBuildError(
                f"{compiler()} does not compile the CPU kernel {name} for {target}:\n{done.stderr.strip()}"
            )
        made.chmod(0o700)
        made.replace(path)
    except subprocess.TimeoutExpired as error:
        raise KernelBuildError(f"compiling the CPU kernel {name} took over {COMPILER_TIMEOUT_S} s") from error
    finally:
        made.unlink(missing_ok=True)
    logger.info("compiled the CPU kernel %s for %s in %.1f s", name, target, time.monotonic() - started)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file lock, one process at a time; the system frees it when its holder dies."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


if __name__ == "__main__":
    print(*supported_isas(), sep="\n")
