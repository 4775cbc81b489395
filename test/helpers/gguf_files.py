"""Small GGUF files, written by the package ``gguf``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter


def write_gguf(path: Path, metadata: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write a file of float arrays; integers become uint32, floats float32, lists arrays of their first value's type.

    ``metadata`` begins with ``general.architecture``.
    """
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_metadata(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return metadata of two layers; a change is a key without the prefix, dots as ``__``; None removes the key."""
    said: dict[str, Any] = {
        "context_length": 256,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5e5,
        "rope.dimension_count": 8,
    }
    said |= {name.replace("__", "."): value for name, value in changes.items()}
    keys = {f"{architecture}.{name}": value for name, value in said.items() if value is not None}
    tokens = [f"<{i}>" for i in range(64)]
    tokenizer = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 2}
    return {"general.architecture": architecture} | keys | tokenizer


def arrays_of(*names: str, num_rows: int = 64, num_features: int = 32) -> dict[str, np.ndarray]:
    """Return an embedding, two norms, and rows of zeros under other names."""
    arrays = {"token_embd.weight": np.zeros((num_rows, num_features), np.float32)}
    more = ("blk.0.attn_norm.weight", "blk.1.attn_norm.weight", *names)
    return arrays | {name: np.zeros(num_features, np.float32) for name in more}
