"""GGUF files of tiny checkpoints, made as llama.cpp's converter makes them: what tests of reading GGUF begin with.

``write_gguf`` reads config.json, weights and tokenizer of a folder, and writes one file with the package ``gguf``:
metadata by the tables here, names of tensors by the package's map, and what the converter does to the tensors of one
architecture by ``gguf_conversions``. Nothing is shared with our reader.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Key = str | Callable[[Config], Any]  # a field of the configuration, or what is made of it; None is not written
Change = Callable[[str, torch.Tensor, Config], Tensors]  # name and tensor of the checkpoint -> what is written of it

F32 = gguf.GGMLQuantizationType.F32

# Keys that the converter takes from the first of these fields which the configuration has.
COMMON: dict[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers", "n_layer", "n_layers"),
    "context_length": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "embedding_length": ("hidden_size", "n_embd", "d_model"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head", "n_heads"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
}
YARN = {
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
SCORES = {
    "softmax": gguf.ExpertGatingFuncType.SOFTMAX,
    "sigmoid": gguf.ExpertGatingFuncType.SIGMOID,
}
# Keys whose values are float32, whatever the configuration has them as.
_FLOATS = re.compile(r"epsilon$|freq_base|scale$|softcapping$|_factor$|beta_|multiplier$|bias$|clamp_kqv$|^xielu")
_IS_QUANTIZED = re.compile(r"(?<!_norm)(?<!ffn_gate_inp)(?<!ffn_gate_inp_shexp)(?<!position_embd)\.weight$")


@dataclass(frozen=True)
class Conversion:
    """What the converter makes of one architecture.

    Args:
        architecture: ``general.architecture``.
        keys: metadata beside the common ones, without the architecture's prefix.
        common: the common keys that it writes; None: all.
        changes: (regular expression on a tensor's name, what is written of it); the first that matches.
        renamed: (regular expression, replacement): names as the package's map knows them. Applied after ``changes``.
        extra: tensors that the converter makes of the configuration, by their names in the file.
        read: metadata that it makes of tensors, with whole names.
    """

    architecture: str
    keys: Mapping[str, Key] = field(default_factory=dict)
    common: Sequence[str] | None = None
    changes: Sequence[tuple[str, Change]] = ()
    renamed: Sequence[tuple[str, str]] = ()
    extra: Callable[[Config], Tensors] | None = None
    read: Callable[[Tensors], dict[str, Any]] | None = None


def write_gguf(
    model_dir: str | Path,
    path: str | Path,
    conversion: Conversion,
    quantized: gguf.GGMLQuantizationType = F32,
    as_values: bool = False,
) -> Path:
    """Write the checkpoint in a folder as a GGUF, and return its path.

    Args:
        quantized: the type of matrices; vectors, routers and learned positions are F32.
        as_values: write the values that the blocks of ``quantized`` stand for, as F32.
    """
    config = json.loads(Path(model_dir, "config.json").read_text())
    tensors = load_file(Path(model_dir, "model.safetensors"))
    writer = gguf.GGUFWriter(path, conversion.architecture)
    for key, value in metadata_of(config, tensors, conversion).items():
        _add(writer, key, value)
    _add_tokenizer(writer, Path(model_dir))
    for name, tensor in converted_tensors(config, tensors, conversion).items():
        kind = type_of(name, tensor, quantized)
        data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
        if as_values:
            data, kind = gguf.quants.dequantize(data, kind), F32
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def type_of(name: str, tensor: torch.Tensor, quantized: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """Return the type of a tensor of the file: F16 where rows are no whole blocks."""
    if tensor.dim() < 2 or not _IS_QUANTIZED.search(name):
        return F32
    values_of_a_block, _ = gguf.GGML_QUANT_SIZES[quantized]
    return gguf.GGMLQuantizationType.F16 if tensor.shape[-1] % values_of_a_block else quantized


def metadata_of(config: Config, tensors: Tensors, conversion: Conversion) -> dict[str, Any]:
    """Return the metadata of the model, without that of its tokenizer. Keys are whole."""
    said = {key: _first(config, fields) for key, fields in COMMON.items()}
    if conversion.common is None:
        said |= _rope_keys(config) | {"expert_gating_func": SCORES.get(config.get("scoring_func", ""))}
    else:
        said = {key: said[key] for key in conversion.common}
    for key, source in conversion.keys.items():
        said[key] = config.get(source) if isinstance(source, str) else source(config)
    metadata = {f"{conversion.architecture}.{key}": value for key, value in said.items() if value is not None}
    return metadata | (conversion.read(tensors) if conversion.read else {})


def _first(config: Config, fields: Sequence[str]) -> Any:
    return next((config[name] for name in fields if config.get(name) is not None), None)


def rope_of(config: Config, kind: str = "full_attention") -> dict[str, Any]:
    """Return the rotary parameters, of one kind of layers if they differ; old files say ``rope_theta`` alone."""
    rope = config.get("rope_parameters") or {}
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") else {}
    return theta | (rope.get(kind, {}) if "full_attention" in rope else rope)


def _rope_keys(config: Config) -> dict[str, Any]:
    rope = rope_of(config)
    keys = {"rope.freq_base": rope.get("rope_theta")}
    if "full_attention" in (config.get("rope_parameters") or {}):
        keys["rope.freq_base_swa"] = rope_of(config, "sliding_attention").get("rope_theta")
    kind = rope.get("rope_type")
    if kind == "longrope":
        keys["rope.scaling.type"] = "longrope"
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys |= {f"rope.scaling.{key}": rope.get(name) for name, key in YARN.items()}
    return keys


def converted_tensors(config: Config, tensors: Tensors, conversion: Conversion) -> Tensors:
    """Return the tensors of the file, by their names in it.

    Raises:
        ValueError: the package's map knows no such tensor.
    """
    architectures = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    num_layers = _first(config, COMMON["block_count"]) or len(config["layers_block_type"])
    num_layers += config.get("num_nextn_predict_layers", 0)
    names = gguf.get_tensor_name_map(architectures[conversion.architecture], num_layers)
    written = dict(conversion.extra(config)) if conversion.extra else {}
    for name, tensor in _stacked(dict(_changed(config, tensors, conversion))).items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias", ".scale"))
        if known is None:
            raise ValueError(f"gguf knows no tensor {name!r} of {conversion.architecture}")
        written[known] = tensor
    return written


def _changed(config: Config, tensors: Tensors, conversion: Conversion) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        change = next((change for pattern, change in conversion.changes if re.search(pattern, name)), None)
        for new_name, new_tensor in (change(name, tensor, config) if change else {name: tensor}).items():
            for pattern, replacement in conversion.renamed:
                new_name = re.sub(pattern, replacement, new_name)
            yield new_name, new_tensor


def _stacked(tensors: Tensors) -> Tensors:
    """Put what a layer has many of, each with a tensor of its own in the checkpoint, into one.

    Experts: ``experts.3.w1.weight`` -> ``experts.w1.weight``; norms of heads: ``norms.3.weight`` -> ``weight``.
    """
    kept: Tensors = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.search(r"\.(experts|norms)\.(\d+)\.", name):
            whole = name.replace(match[0], ".experts." if match[1] == "experts" else ".")
            parts.setdefault(whole, {})[int(match[2])] = tensor
        else:
            kept[name] = tensor
    return kept | {name: torch.stack([of[number] for number in range(len(of))]) for name, of in parts.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, (list, tuple)):
        writer.add_array(key, value)
    elif isinstance(value, float) or _FLOATS.search(key):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, model_dir: Path) -> None:
    """Write a vocabulary of bytes (``make_tiny``'s). It has no merges, and the file cannot hold an empty list."""
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["<|endoftext|>"])
    writer.add_unk_token_id(vocabulary["<unk>"])
