"""What the sides are given: a checkpoint folder at one precision, or a GGUF file as it is; and its sizes."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf

from benchmark.peers.peers import REPOSITORY

SHAPES = ("0.6b", "4b", "llama-1b", "qwen3.5-0.8b", "lfm2-350m", "tiny", "small")
BITS_PER_WEIGHT = {16: 16.0, 8: 8.0, 4: 4.5}  # 4 bits: and a 16-bit scale for each 32 weights
GGUF_SUFFIX = ".gguf"
PLAIN_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Subject:
    """A model that all sides load.

    Args:
        path: a checkpoint folder, or a GGUF file.
        precision: bits of a weight; of no meaning for a GGUF file.
        weights: how they are stored, for the heading.
        size: parameters in all and of the layers, bytes of weights that are read for one token, and the bits of the
            products that bound prefill.
    """

    path: Path
    precision: int
    weights: str
    vocab_size: int
    size: dict[str, float]

    @property
    def name(self) -> str:
        return self.path.name


def of_checkpoint(folder: Path, precision: int) -> Subject:
    return Subject(folder, precision, f"{precision}-bit weights", vocab_size(folder), model_size(folder, precision))


def of_gguf(file: Path) -> Subject:
    """Its products are those of bytes where its weights have less than 16 bits: all sides turn rows into bytes then."""
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    embedding = tensors["token_embd.weight"]
    total = sum(int(tensor.n_elements) for tensor in tensors.values())
    weight_bytes = sum(int(tensor.n_bytes) for tensor in tensors.values())
    num_embedded = int(embedding.n_elements)
    if "output.weight" in tensors:
        weight_bytes -= int(embedding.n_bytes)
        num_embedded *= 2
    plain = all(tensor.tensor_type.name in PLAIN_TYPES for name, tensor in tensors.items() if name.startswith("blk."))
    size = {
        "parameters": total, "layer_parameters": total - num_embedded, "bits": 16 if plain else 8,
        "weight_bytes": weight_bytes,
    }  # fmt: skip
    file_type = reader.get_field("general.file_type")
    weights = "GGUF" if file_type is None else gguf.LlamaFileType(file_type.contents()).name.removeprefix("MOSTLY_")
    return Subject(file, 0, weights, int(embedding.shape[1]), size)


def shape_checkpoint(shape: str, work_dir: Path) -> Path:
    folder = work_dir / "checkpoints" / shape
    if not (folder / "config.json").exists():
        print(f"making {folder} ...", flush=True)
        script = REPOSITORY / "benchmark" / "make_checkpoint.py"
        options = ["--size", shape, "--dtype", "bfloat16", "--tokenizer", "--out", str(folder)]
        subprocess.run([sys.executable, str(script), *options], check=True)
    return folder


def vocab_size(checkpoint: Path) -> int:
    return json.loads((checkpoint / "config.json").read_text())["vocab_size"]


def model_size(checkpoint: Path, precision: int) -> dict[str, float]:
    """Parameters, those of the layers (without embedding), and bytes that are read for one token."""
    config = json.loads((checkpoint / "config.json").read_text())
    total = sum(count_parameters(file) for file in checkpoint.glob("*.safetensors"))
    embedding = config["vocab_size"] * config["hidden_size"]
    read = total if config["tie_word_embeddings"] else total - embedding
    bits = BITS_PER_WEIGHT[precision]
    return {
        "parameters": total, "layer_parameters": read - embedding, "bits": precision, "weight_bytes": read * bits / 8,
    }  # fmt: skip


def count_parameters(file: Path) -> int:
    """Count the parameters of a safetensors file, from its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
