"""Writes a Qwen3, Llama, Qwen3.5 or LFM2 checkpoint as a GGUF file for llama.cpp; runs in its environment, no torch.

Matrices stay bfloat16, vectors and convolutions become float32, as llama.cpp wants them. The vocabulary is made up, a
word for each id: prompts are ids. Formats: github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the tensor names of
the gguf package.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy

ARCHITECTURES = {"qwen3": "qwen3", "llama": "llama", "qwen3_5_text": "qwen35", "lfm2": "lfm2"}  # by model_type
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
QWEN35_TENSORS = {
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
LFM2_TENSORS = {
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
PARAMETERS = {"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"}  # named without ".weight"
TENSORS_OF = {
    "qwen3_5_text": LAYER_TENSORS | QWEN35_TENSORS,
    "lfm2": LAYER_TENSORS | LFM2_TENSORS,
}  # of a layer, by model_type; others have LAYER_TENSORS
OTHER_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.embedding_norm": "token_embd_norm",
    "lm_head": "output",
}


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
        _add_tensor(writer, gguf_name(name, config["model_type"]), _converted(name, bits, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def gguf_name(name: str, model_type: str = "") -> str:
    """The name in a GGUF file of a tensor of the checkpoint. Raises ValueError for one that has none."""
    stem = name.removesuffix(".weight")
    layer_tensors = TENSORS_OF.get(model_type, LAYER_TENSORS)
    if stem in OTHER_TENSORS:
        return f"{OTHER_TENSORS[stem]}.weight"
    if stem.startswith("model.layers."):
        number, _, part = stem.removeprefix("model.layers.").partition(".")
        if part in layer_tensors:
            return f"blk.{number}.{layer_tensors[part]}.weight"
        if part in PARAMETERS:
            return f"blk.{number}.{PARAMETERS[part]}"
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


def as_float32(bits: numpy.ndarray) -> numpy.ndarray:
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def _converted(name: str, bits: numpy.ndarray, config: dict[str, Any]) -> numpy.ndarray:
    """A tensor as llama.cpp's graph takes it: bits of bfloat16 as uint16, or float32."""
    if name.endswith((".conv1d.weight", ".conv.conv.weight")):
        return as_float32(bits.squeeze(1))
    if name.endswith(".A_log"):
        return -numpy.exp(as_float32(bits))
    if config["model_type"] == "qwen3_5_text" and name.endswith("norm.weight") and ".linear_attn." not in name:
        return as_float32(bits) + 1
    return _permuted(name, bits, config)


def _permuted(name: str, bits: numpy.ndarray, config: dict[str, Any]) -> numpy.ndarray:
    """Llama's query and key rows, per head from (first half, second half) to pairs, as its graph rotates them."""
    if config["model_type"] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return bits
    halves = bits.reshape(-1, 2, config["head_dim"] // 2, bits.shape[1])
    return halves.swapaxes(1, 2).reshape(bits.shape)


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, is_lfm2 = config["num_attention_heads"], config["model_type"] == "lfm2"
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(_lfm2_width(config) if is_lfm2 else config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["norm_eps" if is_lfm2 else "rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_rope_dimension_count(int(head_dim * config["rope_parameters"].get("partial_rotary_factor", 1)))
    kv_heads = config["num_key_value_heads"]
    if is_lfm2:  # a layer without keys and values is a convolution
        writer.add_head_count_kv([kv_heads if kind != "conv" else 0 for kind in config["layer_types"]])
        writer.add_shortconv_l_cache(config["conv_L_cache"])
    else:
        writer.add_head_count_kv(kv_heads)
    if config["model_type"] == "qwen3_5_text":
        _add_linear_attention(writer, config)


def _lfm2_width(config: dict[str, Any]) -> int:
    """The inner width of LFM2's MLP: the configuration's, or two thirds of it rounded up to a multiple."""
    if not config["block_auto_adjust_ff_dim"]:
        return int(config["intermediate_size"])
    width = int(config["block_ffn_dim_multiplier"] * int(2 * config["intermediate_size"] / 3))
    multiple = int(config["block_multiple_of"])
    return -(-width // multiple) * multiple


def _add_linear_attention(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Raises ValueError where value heads would have to be put into another order."""
    if config["linear_num_key_heads"] != config["linear_num_value_heads"]:
        raise ValueError("no GGUF for more value heads than key heads in linear attention")
    writer.add_rope_dimension_sections([*config["rope_parameters"].get("mrope_section", [11, 11, 10]), 0])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_full_attention_interval(1 + config["layer_types"].index("full_attention"))


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Id 0 is the unknown word; no word is special, and nothing is put before a prompt."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>"] + [f"▁{number}." for number in range(1, size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([gguf.TokenType.UNKNOWN] + [gguf.TokenType.NORMAL] * (size - 1))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: numpy.ndarray) -> None:
    if values.dtype == numpy.float32:
        writer.add_tensor(name, numpy.ascontiguousarray(values))
    elif values.ndim == 1:
        writer.add_tensor(name, as_float32(values))
    else:
        bits = numpy.ascontiguousarray(values).view(numpy.uint8)
        writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
