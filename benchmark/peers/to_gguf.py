"""Writes a Qwen3 or Llama checkpoint as a GGUF file for llama.cpp; runs in llama.cpp's environment, without torch.

Matrices stay bfloat16, vectors become float32, as llama.cpp wants them. The vocabulary is made up, a word for each id:
prompts are ids. Formats: github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the tensor names of the gguf package.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy

ARCHITECTURES = {"qwen3": "qwen3", "llama": "llama"}  # by model_type of config.json
LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Writes ``path``, which is there only when it is complete.

    Raises:
        ValueError: the checkpoint is of another architecture, or not in bfloat16.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(f"no GGUF for model_type {config['model_type']!r}; have {', '.join(ARCHITECTURES)}")
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, ARCHITECTURES[config["model_type"]])
    _add_shape(writer, config)
    _add_vocabulary(writer, config["vocab_size"])
    if (factors := rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, bits in bfloat16_tensors(checkpoint):
        _add_tensor(writer, gguf_name(name), _permuted(name, bits, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a tensor of the checkpoint. Raises ValueError for one that has none."""
    stem = name.removesuffix(".weight")
    if stem in OTHER_TENSORS:
        return f"{OTHER_TENSORS[stem]}.weight"
    if stem.startswith("model.layers."):
        number, _, part = stem.removeprefix("model.layers.").partition(".")
        if part in LAYER_TENSORS:
            return f"blk.{number}.{LAYER_TENSORS[part]}.weight"
    raise ValueError(f"a GGUF file has no place for {name!r}")


def bfloat16_tensors(checkpoint: Path) -> Iterator[tuple[str, numpy.ndarray]]:
    """(name, its bits as uint16 in the tensor's shape) of every tensor: numpy knows no bfloat16.

    A safetensors file is the length of a JSON header (8 bytes, little endian), the header, and the bytes.
    """
    for file in sorted(checkpoint.glob("*.safetensors")):
        memory = numpy.memmap(file, dtype=numpy.uint8, mode="r")
        start = 8 + int.from_bytes(memory[:8].tobytes(), "little")
        header = json.loads(memory[8:start].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{file}: {name} is {entry['dtype']}; the peers are compared on bfloat16 checkpoints")
            first, last = entry["data_offsets"]
            yield name, memory[start + first : start + last].view(numpy.uint16).reshape(entry["shape"])


def rope_factors(config: dict[str, Any]) -> numpy.ndarray | None:
    """What each rotary frequency is divided by in Llama 3.1 and later [head_dim / 2]; None for plain RoPE."""
    rope = config["rope_parameters"]
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "llama3":
        raise ValueError(f"no GGUF for rope_type {rope['rope_type']!r}; have default, llama3")
    head_dim = config["head_dim"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (numpy.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelengths
    kept = numpy.clip((turns - low) / (high - low), 0, 1)  # 1: the frequency as it is; 0: divided by the factor
    return (1 / (kept + (1 - kept) / rope["factor"])).astype(numpy.float32)


def _permuted(name: str, bits: numpy.ndarray, config: dict[str, Any]) -> numpy.ndarray:
    """Llama's query and key rows, per head from (first half, second half) to pairs, as its graph rotates them."""
    if config["model_type"] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return bits
    halves = bits.reshape(-1, 2, config["head_dim"] // 2, bits.shape[1])
    return halves.swapaxes(1, 2).reshape(bits.shape)


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Id 0 is the unknown word; no word is special, and nothing is put before a prompt."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>"] + [f"▁{number}." for number in range(1, size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([gguf.TokenType.UNKNOWN] + [gguf.TokenType.NORMAL] * (size - 1))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _add_tensor(writer: gguf.GGUFWriter, name: str, bits: numpy.ndarray) -> None:
    if bits.ndim == 1:
        writer.add_tensor(name, (bits.astype(numpy.uint32) << 16).view(numpy.float32))
        return
    writer.add_tensor(name, numpy.ascontiguousarray(bits).view(numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
