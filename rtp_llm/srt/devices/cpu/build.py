"""Compile a C++ kernel file at its first use, for this machine, or take it from the wheel, and load it.

A kernel file ``NAME.cpp`` is in this folder, includes headers of this folder (``common.h``, and its own parts,
``NAME_PART.h``) and exports ``extern "C"`` functions of pointers and sizes. It includes none of torch's headers, so
that it compiles in seconds. It uses the OpenMP library that torch has loaded, so that there is one pool of threads.
Libraries are kept in ``~/.cache/rtp_llm/kernels`` (``RTP_LLM_KERNEL_CACHE`` names another folder), under a key of
everything that they depend on. They are code, so they are loaded only from a folder and a file that no other user
could have written (``utils/private_files.py``). If the folder is not safe, each process compiles for itself and keeps
nothing. A library that came compiled with the package (``kernel_files.py``) is taken instead, without any compiler.
"""

import ctypes
import fcntl
import functools
import logging
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from rtp_llm.srt.devices.cpu.kernel_files import (
    COMPILED,
    COMPILER_TIMEOUT_S,
    ISAS,
    OPENMP,
    SOURCES,
    arguments,
    compiled_name,
    digest_of,
    welcome_flags,
)
from rtp_llm.srt.platform import cpu_flags, num_cpus
from rtp_llm.srt.utils.private_files import prepared_folder, problem_of_file
from rtp_llm.srt.utils.scratch import ScratchFolder

logger = logging.getLogger(__name__)

# How clang is given OpenMP: by its own library, or, Apple's clang, by Homebrew's.
HOMEBREW = ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")
OPENMP_OF_CLANG = (
    OPENMP,
    *(("-Xpreprocessor", *OPENMP, f"-I{place}/include", f"-L{place}/lib", "-lomp") for place in HOMEBREW),
)

# What nearly every model needs, those first that take the compiler longest. Products depend on the weights.
USUAL = ("attention", "elementwise", "sampling", "replay")


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
    library = _open_carried(name, target)
    if library is not None:
        return library
    folder = _sound_cache()
    if folder is not None:
        return _open(_built_in(folder, name, target))
    with ScratchFolder() as private:
        return _open(_built_in(private, name, target))  # a loaded library does not need its file


@functools.cache
def kernels_work() -> bool:
    """Whether this machine can compile and load kernels; if not, log once why. The usual ones are compiled from now
    on, in the background."""
    try:
        load("probe")
        compile_ahead(USUAL)
    except KernelBuildError as error:
        logger.warning(
            "no CPU kernels: %s\nPlain torch computes instead, several times slower in bfloat16. Install g++ "
            "(Debian: apt-get install g++), or name a C++ compiler in CXX.",
            error,
        )
        return False
    return True


def compile_ahead(kernels: Iterable[str]) -> None:
    """Begin to compile these kernels, as many at once as there are processors; ``load`` waits for its own."""
    missing = [name for name in kernels if _carried(name, isa()) is None]
    folder = _sound_cache() if missing else None
    if folder is None:
        return
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in missing:
        names.put(name)
    for _ in range(min(num_cpus(), names.qsize())):
        threading.Thread(target=_compile_named, args=(names, folder), name="kernel compiler", daemon=True).start()


def _compile_named(names: queue.SimpleQueue[str], folder: Path) -> None:
    """Compile until there is no more name. An error ends it: ``load`` compiles the same again, and raises it."""
    with suppress(queue.Empty, KernelBuildError):
        while True:
            _built_in(folder, names.get_nowait(), isa())


def _carried(name: str, target: str) -> Path | None:
    """Return the library that came compiled with the package, of these very sources, if there is one."""
    if not COMPILED.is_dir():
        return None
    path = COMPILED / compiled_name(name, target, welcome_flags(name, target, cpu_flags()))
    return path if path.exists() else None


def _open_carried(name: str, target: str) -> ctypes.CDLL | None:
    path = _carried(name, target)
    if path is None:
        return None
    if (library := openmp_library()) is not None:
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)  # loaded already: from now on others find its functions, too
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # made for a newer system
        logger.warning("the CPU kernel %s that came with the package does not load, and is compiled: %s", name, error)
        return None


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


def cache_folder(variable: str = "RTP_LLM_KERNEL_CACHE", name: str = "kernels") -> Path:
    """Return the folder that an environment variable names, else one of this user's cache."""
    asked = os.environ.get(variable)
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rtp_llm" / name


def _sound_cache() -> Path | None:
    """Return the cache's folder, created if needed; None, with a warning, if it cannot be used."""
    folder, problem = prepared_folder(cache_folder())
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
    """Return a hash of sources, flags, compiler, processor and torch. Where sources and torch lie does not count: a
    library finds OpenMP, which is loaded, by its name. So copies of the package share what they compile."""
    command = _command(name, target, Path("x"), Path())
    names = [Path(word).name if word == openmp_library() else word for word in command]
    return digest_of(name, (*names, _compiler_version(), torch.__version__, *sorted(cpu_flags())), SOURCES)


def library_id(name: str) -> str:
    """Return a name of the library that ``load`` gives: another one as soon as anything that it depends on changes."""
    carried = _carried(name, isa())
    return carried.name if carried else f"{name}-{isa()}-{_key(name, isa())}"


@functools.cache
def _compiler_version() -> str:
    found = compiler()
    if found is None:
        raise KernelBuildError("there is no C++ compiler (looked for CXX, g++, c++, clang++)")
    return subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30).stdout


def _is_clang() -> bool:
    return "clang" in _compiler_version()


@functools.cache
def _openmp() -> tuple[str, ...]:
    """Return the compiler's flags for OpenMP; none, with a warning, if it has none: kernels then use one thread."""
    if not _is_clang():
        return OPENMP
    asked = shlex.split(os.environ.get("CXX", ""))
    with ScratchFolder() as folder:
        source = folder / "threads.cpp"
        source.write_text('#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n')
        for flags in OPENMP_OF_CLANG:
            command = [str(compiler()), *asked[1:], "-shared", "-fPIC", str(source), *flags, "-o", f"{folder}/threads"]
            if subprocess.run(command, capture_output=True, timeout=COMPILER_TIMEOUT_S).returncode == 0:
                return flags
    logger.warning(
        "%s has no OpenMP, so that CPU kernels compute on one thread. Install it (macOS: brew install libomp; Debian: "
        "apt-get install libomp-dev), or name another C++ compiler in CXX.",
        compiler(),
    )
    return ()


def _command(name: str, target: str, output: Path, sources: Path) -> list[str]:
    """Clang's regions run in its own OpenMP library, so that torch's must not answer for the number of a thread."""
    asked = shlex.split(os.environ.get("CXX", ""))
    library = None if _is_clang() else openmp_library()
    return [
        str(compiler()), *asked[1:], "-shared", *arguments(target, welcome_flags(name, target, cpu_flags()), _openmp()),
        "-I", str(sources), str(sources / f"{name}.cpp"), *([library] if library else ()),
        "-o", str(output),
    ]  # fmt: skip


class _Place(ctypes.Structure):
    """``Dl_info`` of dladdr."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@functools.cache
def openmp_library() -> str | None:
    """Return the OpenMP library whose functions torch finds. Other packages may have loaded libraries of their own, in
    the same process, whose threads are others. None: the compiler's own choice."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(torch._C.__file__), "omp_get_max_threads", None)
    place, dladdr = _Place(), ctypes.CDLL(None).dladdr
    dladdr.argtypes = ctypes.c_void_p, ctypes.POINTER(_Place)
    found = function is not None and dladdr(ctypes.cast(function, ctypes.c_void_p), place)
    return os.fsdecode(place.file) if found else None


def _compile(name: str, target: str, path: Path) -> None:
    """Compile to ``path``, completely or not at all. The next call overwrites the remains of an interrupted one."""
    started = time.monotonic()
    made = path.with_suffix(".new")
    made.unlink(missing_ok=True)
    command = _command(name, target, made, SOURCES)
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
