"""Kernel files, the instruction sets that they are compiled for, and the compiler's arguments. Imports no torch.

A kernel file ``NAME.cpp`` is in this folder, includes headers of this folder, and is compiled for one instruction set.
A wheel carries libraries of all sets of its architecture in ``compiled/`` (``setup.py`` makes them by
``compile_all``); they name no OpenMP library, and take the one that torch has loaded.
"""

import hashlib
import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
COMPILED = SOURCES / "compiled"  # in a wheel
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Werror=return-type",
)
OPENMP = ("-fopenmp",)
PORTABLE = "portable"
COMPILER_TIMEOUT_S = 300

# Best first: instruction set -> flags that the processor must have, and the compiler's flags.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c")
X86_64: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512_bf16": (
        (*_AVX512, "avx512_bf16", "avx512_vnni"),
        (*(f"-m{flag}" for flag in _AVX512), "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512"),
    ),
    "avx512": (_AVX512, (*(f"-m{flag}" for flag in _AVX512), "-mprefer-vector-width=512")),
    "avx2_vnni": (("avx2", "fma", "f16c", "avx_vnni"), ("-mavx2", "-mfma", "-mf16c", "-mavxvnni")),
    "avx2": (("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c")),
}
AARCH64: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "neon_i8mm": (("asimddp", "bf16", "i8mm"), ("-march=armv8.2-a+dotprod+bf16+i8mm",)),
    "neon_bf16": (("asimddp", "bf16"), ("-march=armv8.2-a+dotprod+bf16",)),
    "neon_dot": (("asimddp",), ("-march=armv8.2-a+dotprod",)),
}
ISAS = X86_64 | AARCH64 | {PORTABLE: ((), ())}
WELCOME = ("avx512vbmi",)  # flags that kernels for AVX-512 make use of where the processor has them


def kernel_names() -> list[str]:
    return sorted(path.stem for path in SOURCES.glob("*.cpp"))


def welcome_flags(name: str, target: str, cpu_flags: Iterable[str]) -> tuple[str, ...]:
    """Return the flags of the processor beyond those of the set that a kernel makes use of."""
    if not target.startswith("avx512"):
        return ()
    text = "".join((SOURCES / file).read_text(encoding="utf-8") for file in source_files(f"{name}.cpp"))
    return tuple(flag for flag in WELCOME if flag in cpu_flags and f"__{flag.upper()}__" in text)


def arguments(target: str, welcome: Iterable[str], openmp: Sequence[str] = OPENMP) -> list[str]:
    """Return the compiler's arguments for an instruction set, without files. ``openmp``: those that give it threads."""
    return [*FLAGS, *openmp, *ISAS[target][1], *(f"-m{flag}" for flag in welcome)]


def source_files(file: str, sources: Path = SOURCES) -> list[str]:
    """Return a file and the files of its folder that it includes, each once."""
    files = [file]
    for known in files:
        included = re.findall(r'^#include "([^"]+)"$', (sources / known).read_text(encoding="utf-8"), re.MULTILINE)
        files += [name for name in dict.fromkeys(included) if name not in files]
    return files


def digest_of(name: str, parts: Iterable[str], sources: Path = SOURCES) -> str:
    """Return a hash of a kernel's source files and of whatever else it depends on."""
    digest = hashlib.sha256()
    for file in source_files(f"{name}.cpp", sources):
        digest.update((sources / file).read_bytes())
    for part in parts:
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()[:16]


def compiled_name(name: str, target: str, welcome: tuple[str, ...]) -> str:
    """Return the name of a library of ``compiled/``: another one as soon as a source or a flag changes."""
    digest = digest_of(name, arguments(target, welcome))
    return f"{name}-{'+'.join((target, *welcome))}-{digest}.so"


def compile_all(compiler: Sequence[str], folder: Path, machine: str, jobs: int) -> list[Path]:
    """Compile every kernel for every instruction set of ``machine`` (``x86_64``) into ``folder``, ``jobs`` at once.

    Raises:
        subprocess.CalledProcessError: one does not compile; the compiler has said why on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    variants = [
        (name, target, flags)
        for name in kernel_names()
        for target in (*_sets_of(machine), PORTABLE)
        for flags in dict.fromkeys(((), welcome_flags(name, target, WELCOME)))
    ]
    with ThreadPoolExecutor(jobs) as pool:
        made = [pool.submit(compile_carried, compiler, folder, *variant) for variant in variants]
        return [library.result() for library in made]


def _sets_of(machine: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    return {"x86_64": X86_64, "aarch64": AARCH64}.get(machine, {})


def compile_carried(compiler: Sequence[str], folder: Path, name: str, target: str, welcome: tuple[str, ...]) -> Path:
    """Compile a library of ``compiled/``; return where it is.

    Link without -fopenmp, so that the functions of OpenMP stay undefined: torch's own are taken at run time."""
    library = folder / compiled_name(name, target, welcome)
    half = library.with_suffix(".o")
    source = SOURCES / f"{name}.cpp"
    compiling = [*compiler, *arguments(target, welcome), "-I", str(SOURCES), "-c", str(source), "-o", str(half)]
    subprocess.run(compiling, check=True, timeout=COMPILER_TIMEOUT_S)
    linking = [*compiler, "-shared", "-s", "-static-libstdc++", "-static-libgcc", str(half), "-o", str(library)]
    subprocess.run(linking, check=True, timeout=COMPILER_TIMEOUT_S)
    half.unlink()
    return library
