"""Makes the environment of one of our peers, or of several.

    python benchmark/peers/setup.py llama.cpp
    python benchmark/peers/setup.py openvino vllm transformers --into /data/peers
    python benchmark/peers/setup.py llama.cpp --isa avx2 --into /data/peers-avx2
    python benchmark/peers/setup.py --list

Each gets a virtual environment of its own with the exact versions of requirements/PEER.txt, from PyPI. llama.cpp and
its server are compiled for this machine, with all that its processor has (a quarter of an hour on two cores; needs
git-less sources from PyPI, a C++ compiler and nothing else), or with --isa for one instruction set alone, into a folder
of its own. What is there already stays.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for the modules beside this one

from benchmark.peers.peers import DEFAULT_INTO, HERE, OURS, PEERS, llama_cpp_libraries

REQUIREMENTS = HERE / "requirements"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LLAMA_CPP_SOURCES = "llama-cpp-python"  # whose source distribution has all of llama.cpp
LLAMA_CPP_TARGETS = ("llama", "llama-server", "llama-bench")
LLAMA_CPP_OPTIONS = (
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
NATIVE = "native"
_SSE = ("-DGGML_NATIVE=OFF", "-DGGML_SSE42=ON", "-DGGML_BMI2=ON")
_AVX2 = (*_SSE, "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON")
_AVX512 = (*_AVX2, "-DGGML_AVX512=ON")
LLAMA_CPP_ISAS = {  # as ours in rtp_llm/srt/devices/cpu/build.py
    NATIVE: ("-DGGML_NATIVE=ON",),
    "avx2": _AVX2,
    "avx2_vnni": (*_AVX2, "-DGGML_AVX_VNNI=ON"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-DGGML_AVX512_VNNI=ON", "-DGGML_AVX512_VBMI=ON", "-DGGML_AVX512_BF16=ON"),
}
EXIT_ERROR = 2


class SetupError(Exception):
    """An environment cannot be made; with what is missing."""


def main(argv: Sequence[str] | None = None) -> int:
    names = [name for name in PEERS if name != OURS]
    parser = argparse.ArgumentParser(description="Make the environments of our peers.")
    parser.add_argument("peers", nargs="*", metavar="PEER", help=", ".join(names))
    parser.add_argument("--into", type=Path, default=DEFAULT_INTO, help="folder for the environments")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once, for llama.cpp")
    parser.add_argument("--isa", choices=LLAMA_CPP_ISAS, default=NATIVE, help="instruction set of llama.cpp")
    parser.add_argument("--list", action="store_true", help="say which peers there are, and which are ready")
    args = parser.parse_args(argv)
    if unknown := set(args.peers) - set(names):
        parser.error(f"no peer {', '.join(sorted(unknown))}; have {', '.join(names)}")
    if not args.list and not args.peers:
        parser.error(f"name a peer: {', '.join(names)}")
    into = args.into.resolve()
    try:
        for name in args.peers:
            make(name, into / name, args.jobs, args.isa)
    except (SetupError, subprocess.CalledProcessError, OSError) as error:
        print(f"setup.py: {error}", file=sys.stderr)
        return EXIT_ERROR
    for name in names if args.list else ():
        print(f"{name:14} {state(name, into / name, args.isa)}")
    return 0


def state(name: str, folder: Path, isa: str = NATIVE) -> str:
    if is_ready(name, folder, isa):
        return f"ready in {folder}"
    return f"of other versions or another instruction set in {folder}" if marker(folder).exists() else "not made"


def is_ready(name: str, folder: Path, isa: str = NATIVE) -> bool:
    """The environment was completed, from the present list of versions and for this instruction set."""
    return marker(folder).exists() and marker(folder).read_text() == recipe(name, isa)


def marker(folder: Path) -> Path:
    return folder / "complete.txt"


def recipe(name: str, isa: str = NATIVE) -> str:
    """What an environment is made from: versions, and for llama.cpp how it is compiled."""
    versions = (REQUIREMENTS / f"{name}.txt").read_text()
    return versions + (" ".join(llama_cpp_options(isa)) + "\n" if name == "llama.cpp" else "")


def llama_cpp_options(isa: str) -> tuple[str, ...]:
    return "-DCMAKE_BUILD_TYPE=Release", *LLAMA_CPP_ISAS[isa], *LLAMA_CPP_OPTIONS


def make(name: str, folder: Path, jobs: int, isa: str = NATIVE) -> None:
    """Does nothing if it is there already."""
    if is_ready(name, folder, isa):
        print(f"{name}: ready in {folder}")
        return
    print(f"{name}: making {folder} ...", flush=True)
    marker(folder).unlink(missing_ok=True)
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    versions = (REQUIREMENTS / f"{name}.txt").read_text().split()
    install_torch(folder, [version for version in versions if version.startswith("torch==")])
    sources = [version for version in versions if name == "llama.cpp" and version.startswith(LLAMA_CPP_SOURCES)]
    pip(folder, "install", "--no-deps", *[version for version in versions if version not in sources])
    for version in sources:
        make_llama_cpp(folder, version, jobs, isa)
    marker(folder).write_text(recipe(name, isa))
    print(f"{name}: ready in {folder}")


def install_torch(folder: Path, versions: Sequence[str]) -> None:
    """torch's build for CPUs: from where pip is told to look, if it is there, else from PyTorch's own index."""
    for version in versions:
        try:
            pip(folder, "install", "--no-deps", version)
        except subprocess.CalledProcessError:
            pip(folder, "install", "--no-deps", version, "--index-url", TORCH_CPU_INDEX)


def make_llama_cpp(folder: Path, version: str, jobs: int, isa: str) -> None:
    """Compiles library and server once, for one instruction set; the bindings then need no compiler."""
    if (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")) is None:
        raise SetupError("llama.cpp needs a C++ compiler; install g++ or name one in CXX")
    sources = folder / "sources"
    shutil.rmtree(sources, ignore_errors=True)
    pip(folder, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", version, "-d", str(sources))
    with tarfile.open(next(sources.glob("*.tar.gz"))) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # missing before Python 3.11.4
        archive.extractall(sources)
    unpacked = next(path for path in sources.iterdir() if path.is_dir())
    build = llama_cpp_libraries(folder).parent
    tools = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    cmake = str(folder / "bin" / "cmake")
    configure = [cmake, "-S", str(unpacked / "vendor" / "llama.cpp"), "-B", str(build), "-G", "Ninja"]
    run([*configure, *llama_cpp_options(isa)], tools)
    run([cmake, "--build", str(build), "--parallel", str(jobs), "--target", *LLAMA_CPP_TARGETS], tools)
    only_python = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    pip(folder, "install", "--no-deps", "--no-build-isolation", str(unpacked), variables=tools | only_python)


def pip(folder: Path, *arguments: str, variables: dict[str, str] | None = None) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", arguments[0], "--quiet", *arguments[1:]]
    run([*command, "--disable-pip-version-check"], variables or {})


def run(command: Sequence[str], variables: dict[str, str]) -> None:
    print("+ " + " ".join(command[:6]) + (" ..." if len(command) > 6 else ""), flush=True)
    subprocess.run(command, check=True, env=os.environ | variables)


if __name__ == "__main__":
    sys.exit(main())
