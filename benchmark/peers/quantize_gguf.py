"""What make_gguf.py runs in llama.cpp's environment: a checkpoint's GGUF file in bfloat16, and one of each type.

python -m benchmark.peers.quantize_gguf CHECKPOINT FOLDER THREADS TYPE ...
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import llama_cpp

from benchmark.peers.adapters.llama_cpp import quantize
from benchmark.peers.to_gguf import write_gguf

PREFIX = "LLAMA_FTYPE_MOSTLY_"


def main(argv: Sequence[str]) -> int:
    checkpoint, folder, threads, types = Path(argv[0]), Path(argv[1]), int(argv[2]), argv[3:]
    known = [name.removeprefix(PREFIX) for name in vars(llama_cpp) if name.startswith(PREFIX)]
    if unknown := set(types) - set(known):
        print(f"llama.cpp has no type {', '.join(sorted(unknown))}; it has {', '.join(known)}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / f"{checkpoint.name}-BF16.gguf"
    if not plain.exists():
        write_gguf(checkpoint, plain)
    for name in types:
        path = folder / f"{checkpoint.name}-{name}.gguf"
        if not path.exists():
            quantize(plain, path, getattr(llama_cpp, PREFIX + name), threads)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
