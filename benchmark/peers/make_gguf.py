"""Makes GGUF files of several types from one random checkpoint, by llama.cpp's own quantizer.

    python benchmark/peers/setup.py llama.cpp
    python benchmark/peers/make_gguf.py --shape 0.6b --types Q4_0 Q4_K_M Q8_0
    python benchmark/peers/run.py --model benchmark/peers/.work/gguf/0.6b-Q4_K_M.gguf

Prints the path of each. What is there already stays.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for the modules beside this one

from benchmark.peers.peers import DEFAULT_INTO, HERE, PEERS
from benchmark.peers.subject import SHAPES, shape_checkpoint

TYPES = ("Q4_0", "Q4_K_M", "Q8_0")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make GGUF files of several types from one random checkpoint.")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="llama.cpp's names of whole files' types")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--into", type=Path, default=DEFAULT_INTO, help="where setup.py put the environments")
    parser.add_argument("--work-dir", type=Path, default=HERE / ".work", help="checkpoints and files")
    args = parser.parse_args(argv)
    for path in make_files(args.shape, args.types, args.into.resolve(), args.work_dir.resolve(), args.threads):
        print(path)
    return 0


def make_files(shape: str, types: Sequence[str], into: Path, work_dir: Path, threads: int) -> list[Path]:
    """Return a file of each type.

    Raises:
        subprocess.CalledProcessError: llama.cpp knows no such type, or has no environment; it has said so.
    """
    folder = work_dir / "gguf"
    files = [folder / f"{shape}-{file_type}.gguf" for file_type in types]
    if all(file.exists() for file in files):
        return files
    peer = PEERS["llama.cpp"]
    command = [str(peer.python(into)), "-P", "-m", "benchmark.peers.quantize_gguf"]
    command += [str(shape_checkpoint(shape, work_dir)), str(folder), str(threads), *types]
    subprocess.run(command, check=True, env=peer.process_variables(into, threads), stdout=sys.stderr)
    return files


if __name__ == "__main__":
    sys.exit(main())
