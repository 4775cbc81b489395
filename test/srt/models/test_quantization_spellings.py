"""Settings of quantized checkpoints as programs have written them over the years.

What means the same loads the same weights; what would change the arithmetic is refused by its key.
"""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from quantized import Format

from rtp_llm.srt.configs.model_config import ModelConfig, ModelConfigError
from rtp_llm.srt.layers.quantization.base import QuantizationError
from rtp_llm.srt.layers.quantization.methods import PackedLinearMethod
from rtp_llm.srt.layers.quantization.registry import scheme_name
from rtp_llm.srt.layers.quantization.spellings import canonical
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.quantization_settings import quantization_settings
from tiny_models import make_tiny

SIZES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
NEVER = object()  # a key that is taken out


def packed(group: dict[str, Any] | None = None, weights: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    return with_group({"targets": ["Linear"], "weights": WEIGHTS} | (group or {}), weights) | top


def rows(group: dict[str, Any] | None = None, weights: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    plain = {"targets": ["Linear"], "weights": CHANNEL, "input_activations": ROWS}
    return with_group(plain | (group or {}), weights) | {"format": "int-quantized"} | top


def with_group(group: dict[str, Any], weights: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": without_never(group | {"weights": without_never(group["weights"] | (weights or {}))})
        },
        "ignore": ["lm_head"],
    }


def without_never(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not NEVER}


def in_config(settings: Any) -> dict[str, Any]:
    return {"config.json": {"quantization_config": without_never(settings)}}


pack_symmetric = partial(quantized.pack_quantized, symmetric=True)
FORMATS = {
    "gptq": Format("gptq", GPTQ, quantized.gptq),
    "gptq_v2": Format("gptq_v2", GPTQ | {"checkpoint_format": "gptq_v2"}, partial(quantized.gptq, is_v2=True)),
    "awq": Format("awq", AWQ, quantized.awq, symmetric=False),
    "awq_partly": Format(
        "awq_partly", AWQ | {"modules_to_not_convert": ["model.layers.0"]}, quantized.awq, symmetric=False
    ),
    "packed": Format("packed", packed(), pack_symmetric),
    "packed_zeros": Format(
        "packed_zeros",
        packed(weights={"symmetric": False}),
        partial(quantized.pack_quantized, symmetric=False),
        symmetric=False,
    ),
    "packed_ordered": Format(
        "packed_ordered",
        packed(weights={"actorder": "group"}),
        partial(quantized.pack_quantized, symmetric=True, is_ordered=True),
        shuffled=True,
    ),
    "packed_channel": Format(
        "packed_channel", packed(weights={"strategy": "channel", "group_size": None}), pack_symmetric, group_size=-1
    ),
    "rows": Format("rows", rows(), quantized.int_quantized, bits=8, group_size=-1),
}


def is_quantized(name: str, stored: str) -> bool:
    return bool(re.search(r"layers\.\d+\..*proj\.weight$", name)) and not (
        stored == "awq_partly" and "layers.0." in name
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By format: a quantized checkpoint."""
    directory = tmp_path_factory.mktemp("checkpoints")
    model_dir = make_tiny("LlamaForCausalLM", directory / "model", **SIZES)
    return {
        name: quantized.quantize(model_dir, directory / name, stored, partial(is_quantized, stored=name))[1]
        for name, stored in FORMATS.items()
    }


def respelled(checkpoint: str, directory: Path, files: dict[str, Any]) -> str:
    """The checkpoint without its own settings, with other JSON files; config.json gets further keys."""
    shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    for name, content in files.items():
        (directory / name).write_text(json.dumps(config | content if name == "config.json" else content))
    if "config.json" not in files:
        (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def weights_of(directory: str, quantization: str | None = None) -> dict[str, torch.Tensor]:
    model = load_model(ModelConfig.from_pretrained(directory), directory, quantization=quantization)
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, PackedLinearMethod):
            weights[f"{name} (packed)"] = method.dequantized_weight(module)
    assert any("(packed)" in name for name in weights)
    return weights


def assert_same_weights(directory: str, checkpoint: str, quantization: str | None = None) -> None:
    ours, expected = weights_of(directory, quantization), weights_of(checkpoint)
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(ours[name], weight), name


NAMELESS_GPTQ = GPTQ | {"quant_method": NEVER}
SPARSE = {"format": "dense", "global_sparsity": 0.14, "ignore": ["lm_head"], "registry_requires_subclass": False,
          "sparsity_structure": "unstructured", "targets": ["Linear"]}  # fmt: skip
OLD_AWQ = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
NEW_AWQ = AWQ | {"version": NEVER}
EXPRESSION = r"re:.*layers\.\d+\..*_proj$"

SAME: list[tuple[str, dict[str, Any]]] = [
    # AutoGPTQ, GPTQModel and what transformers saves
    ("gptq", in_config(GPTQ | {"quant_method": "GPTQ"})),
    ("gptq", in_config(GPTQ | {"bits": "4", "group_size": 16.0})),
    ("gptq", in_config(GPTQ | {"bits": 4.0, "group_size": "16"})),
    ("gptq", in_config(GPTQ | {"desc_act": None, "sym": None})),
    ("gptq", in_config(GPTQ | {"desc_act": True, "static_groups": False, "true_sequential": True})),
    ("gptq", in_config(GPTQ | {"damp_percent": 0.01, "model_name_or_path": None, "model_file_base_name": "model"})),
    ("gptq", in_config(GPTQ | {"checkpoint_format": "gptq"})),
    ("gptq", in_config(GPTQ | {"checkpoint_format": "GPTQ"})),
    ("gptq", in_config(GPTQ | {"checkpoint_format": None})),
    ("gptq", in_config(GPTQ | {"format": "gptq"})),
    ("gptq", in_config(GPTQ | {"is_marlin_format": False})),
    ("gptq", in_config(GPTQ | {"is_marlin_format": None, "lm_head": False, "pack_dtype": "int32"})),
    ("gptq", in_config(GPTQ | {"lm_head": "false"})),
    ("gptq", in_config(GPTQ | {"meta": {"quantizer": ["gptqmodel:1.7.4"], "mse": 0.0}, "backend": "auto"})),
    ("gptq", in_config(GPTQ | {"use_exllama": True, "exllama_config": {"version": 2}, "disable_exllama": False})),
    ("gptq", in_config(GPTQ | {"tokenizer": None, "dataset": "c4", "max_input_length": None, "batch_size": 1})),
    ("gptq", in_config(GPTQ | {"dynamic": None})),
    ("gptq", in_config(GPTQ | {"dynamic": {"-:.*nothing.*": {}, "+:.*down.*": {"bits": "4", "group_size": 16.0}}})),
    ("gptq", in_config(GPTQ | {"dynamic": {".*down.*": None}})),
    ("gptq", in_config(GPTQ | {"modules_in_block_to_quantize": [
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["self_attn.o_proj"],
        ["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]})),
    ("gptq", in_config(GPTQ | {"modules_in_block_to_quantize": [
        "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj",
        "mlp.gate_proj", "mlp.down_proj"]})),
    ("gptq", in_config(GPTQ | {"modules_in_block_to_quantize": None, "modules_to_not_convert": "lm_head"})),
    ("gptq", in_config(NAMELESS_GPTQ)),
    ("gptq", in_config(GPTQ | {"quant_method": None})),
    ("gptq", in_config(GPTQ | {"quant_method": ""})),
    ("gptq", {"quantize_config.json": without_never(NAMELESS_GPTQ)}),
    ("gptq", {"quantize_config.json": {"bits": 4, "group_size": 16}}),
    ("gptq", {"quantize_config.json": GPTQ | {"is_marlin_format": False}, "quant_config.json": {"opset": 11}}),
    ("gptq", {"quant_config.json": GPTQ}),
    ("gptq", {"config.json": {"quantization_config": None}, "quantize_config.json": GPTQ}),
    ("gptq", {"config.json": {"quantization_config": {}}, "quantize_config.json": GPTQ}),
    ("gptq", in_config(GPTQ) | {"quantize_config.json": {"bits": 8, "group_size": 128}}),
    ("gptq_v2", in_config(GPTQ | {"checkpoint_format": "GPTQ_V2"})),
    ("gptq_v2", in_config(GPTQ | {"format": "gptq_v2"})),
    ("gptq_v2", in_config(GPTQ | {"format": "gptq", "checkpoint_format": "gptq_v2"})),
    # AutoAWQ
    ("awq", in_config(AWQ | {"quant_method": "AWQ", "version": "GEMM"})),
    ("awq", in_config(AWQ | {"bits": "4", "group_size": 16.0})),
    ("awq", in_config(AWQ | {"zero_point": 1})),
    ("awq", in_config(AWQ | {"zero_point": "true"})),
    ("awq", in_config(AWQ | {"zero_point": NEVER})),
    ("awq", in_config(AWQ | {"zero_point": None})),
    ("awq", in_config(AWQ | {"version": None})),
    ("awq", in_config(AWQ | {"bits": NEVER})),
    ("awq", in_config(NEW_AWQ | {"format": "gemm", "backend": "auto", "sym": False, "desc_act": False})),
    ("awq", in_config(NEW_AWQ | {"checkpoint_format": "GEMM", "backend": "autoawq", "do_fuse": False})),
    ("awq", in_config(AWQ | {"modules_to_not_convert": None})),
    ("awq", in_config(AWQ | {"modules_to_not_convert": []})),
    ("awq", in_config(AWQ | {"modules_to_not_convert": ["visual", "lm_head"], "fuse_max_seq_len": None})),
    ("awq", in_config(OLD_AWQ | {"quant_method": "awq"})),
    ("awq", in_config(OLD_AWQ)),
    ("awq", in_config(OLD_AWQ | {"bits": 4, "group_size": "16"})),
    ("awq", {"quant_config.json": OLD_AWQ}),
    ("awq", {"quant_config.json": {key: value for key, value in OLD_AWQ.items() if key != "version"}}),
    ("awq_partly", in_config(AWQ | {"modules_to_not_convert": ["model.layers.0."]})),
    ("awq_partly", in_config(AWQ | {"modules_to_not_convert": ["layers.0."]})),
    ("awq_partly", in_config(AWQ | {"modules_to_not_convert": "model.layers.0"})),
    ("awq_partly", in_config(AWQ | {"modules_to_not_convert": [r"model\.layers\.0\..*", "lm_head"]})),
    ("awq_partly", in_config(AWQ | {"modules_to_not_convert": ["model.layers.0.self_attn.", "model.layers.0.mlp"]})),
    # compressed-tensors
    ("packed", in_config(packed(quant_method="compressed_tensors"))),
    ("packed", in_config(packed(quant_method="Compressed-Tensors"))),
    ("packed", in_config(packed(quant_method="sparseml"))),
    ("packed", in_config(packed(quant_method=NEVER))),
    ("packed", {"config.json": {"compression_config": packed()}}),
    ("packed", {"config.json": {"quantization_config": None, "compression_config": packed()}}),
    ("packed", in_config({"quantization_config": packed(), "sparsity_config": SPARSE})),
    ("packed", in_config(packed(sparsity_config=SPARSE))),
    ("packed", in_config(packed(sparsity_config={"format": "Dense"}))),
    ("packed", in_config(packed(sparsity_config={"global_sparsity": 0.5, "sparsity_structure": "2:4"}))),
    ("packed", in_config(packed(sparsity_config=None, kv_cache_scheme=None, transform_config=None))),
    ("packed", in_config(packed(sparsity_config={}, kv_cache_scheme={}, transform_config={}))),
    ("packed", in_config(packed(transform_config={"config_groups": {}}, moe_sparsity_config=None))),
    ("packed", in_config(packed(quantization_status="frozen", global_compression_ratio=1.89, version="0.9.2"))),
    ("packed", in_config(packed(quantization_status="compressed", global_compression_ratio=None))),
    ("packed", in_config(packed(format="PACK_QUANTIZED"))),
    ("packed", in_config(packed({"format": "pack-quantized"}, format=NEVER))),
    ("packed", in_config(packed({"format": "pack-quantized"}, format="mixed-precision"))),
    ("packed", in_config(packed({"format": None}))),
    ("packed", in_config(packed({"input_activations": None, "output_activations": None}))),
    ("packed", in_config(packed({"targets": "Linear"}))),
    ("packed", in_config(packed({"targets": None}))),
    ("packed", in_config(packed({"targets": [EXPRESSION]}))),
    ("packed", in_config(packed({"targets": ["model.layers.0", "re:model.layers.1"]}))),
    ("packed", in_config(packed(ignore=None) | {"config_groups": packed()["config_groups"]})),
    ("packed", in_config(packed(ignore="lm_head"))),
    ("packed", in_config(packed(ignore=["re:.*lm_head", "re:vision.*"]))),
    *(("packed", in_config(packed(weights={"type": value}))) for value in ("INT", "Int", None, NEVER)),
    *(("packed", in_config(packed(weights={"strategy": value}))) for value in ("GROUP", "Group", None, NEVER)),
    *(("packed", in_config(packed(weights={"symmetric": value}))) for value in (1, "true", None, NEVER)),
    *(("packed", in_config(packed(weights={"actorder": value})))
      for value in (None, False, "weight", "Weight", "static", "STATIC", "group", "dynamic", True)),
    ("packed", in_config(packed(weights={"num_bits": "4", "group_size": "16"}))),
    ("packed", in_config(packed(weights={"num_bits": 4.0, "group_size": 16.0}))),
    ("packed", in_config(packed(weights={"observer": "mse", "observer_kwargs": {"a": 1}, "dynamic": False}))),
    ("packed", in_config(packed(weights={"block_structure": None, "scale_dtype": None, "zp_dtype": "torch.int8"}))),
    ("packed_zeros", in_config(packed(weights={"symmetric": 0}))),
    ("packed_zeros", in_config(packed(weights={"symmetric": "False", "actorder": "weight"}))),
    *(("packed_ordered", in_config(packed(weights={"actorder": value}))) for value in ("GROUP", "dynamic", True)),
    *(("packed_channel", in_config(packed(weights={"strategy": strategy, "group_size": size})))
      for strategy, size in (("Channel", None), (None, -1), ("channel", -1), ("channel", "-1"), (NEVER, -1.0))),
    ("rows", in_config(rows(format="Int_Quantized"))),
    ("rows", in_config(rows(format="naive-quantized"))),
    ("rows", in_config(rows({"input_activations": ROWS | {"num_bits": "8", "type": "INT", "strategy": "TOKEN"}}))),
    ("rows", in_config(rows({"input_activations": ROWS | {"dynamic": "true", "symmetric": 1, "observer": "minmax"}}))),
    ("rows", in_config(rows({"input_activations": ROWS | {"group_size": None, "observer": None, "actorder": None}}))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "files"), SAME, ids=lambda value: str(value)[:150] if isinstance(value, dict) else None
)
def test_other_spellings_load_the_same_weights(
    stored: str, files: dict[str, Any], checkpoints: dict[str, str], tmp_path: Path
) -> None:
    assert_same_weights(respelled(checkpoints[stored], tmp_path, files), checkpoints[stored])


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gptq", in_config(GPTQ | {"is_marlin_format": True}), "is_marlin_format: true"),
    ("gptq", in_config(GPTQ | {"checkpoint_format": "marlin"}), "checkpoint_format must be one of .*'marlin'"),
    ("gptq", in_config(GPTQ | {"format": "bitblas"}), "checkpoint_format must be one of .*'bitblas'"),
    ("gptq", in_config(GPTQ | {"pack_dtype": "int16"}), "pack_dtype must be one of .*'int16'"),
    ("gptq", in_config(GPTQ | {"bits": "four"}), "bits must be one of .*'four'"),
    ("gptq", in_config(GPTQ | {"bits": True}), "bits must be one of .*True"),
    ("gptq", in_config(GPTQ | {"bits": 4.5}), "bits must be one of .*4.5"),
    ("gptq", in_config(GPTQ | {"group_size": "all"}), "group_size must be a positive number or -1, not 'all'"),
    ("gptq", in_config(GPTQ | {"group_size": [16]}), "group_size must be a positive number"),
    ("gptq", in_config(GPTQ | {"lm_head": "true"}), "lm_head: true"),
    ("gptq", in_config(GPTQ | {"lm_head": "maybe"}), "lm_head must be true or false, not 'maybe'"),
    ("gptq", in_config(GPTQ | {"dynamic": {"+:.*down.*": {"group_size": "32"}}}), "dynamic .* a group_size of 32"),
    ("gptq", in_config(GPTQ | {"dynamic": ["-:.*"]}), "dynamic must be an object"),
    ("gptq", in_config(GPTQ | {"dynamic": {"-:(": {}}}), r"'re:\(' is no regular expression"),
    ("gptq", in_config(GPTQ | {"modules_in_block_to_quantize": [[1]]}), "modules_in_block_to_quantize must be a list"),
    ("gptq", in_config(GPTQ | {"wbits": 8}), "wbits is 8, but bits, which means the same, is 4"),
    ("gptq", {"quantize_config.json": {"bits": 3, "group_size": 16}}, "bits must be one of"),
    ("awq", in_config(AWQ | {"version": "GEMV"}), "version must be one of .*'GEMV'"),
    ("awq", in_config(NEW_AWQ | {"format": "gemv_fast"}), "format must be one of .*'gemv_fast'"),
    ("awq", in_config(NEW_AWQ | {"checkpoint_format": "marlin"}), "checkpoint_format must be one of .*'marlin'"),
    ("awq", in_config(AWQ | {"backend": "llm-awq"}), "backend: llm-awq"),
    ("awq", in_config(AWQ | {"zero_point": 0}), "zero_point: false"),
    ("awq", in_config(AWQ | {"zero_point": "false"}), "zero_point: false"),
    ("awq", in_config(AWQ | {"modules_to_not_convert": {"a": 1}}), "modules_to_not_convert must be a list of names"),
    ("awq", in_config(AWQ | {"q_group_size": 32}), "q_group_size is 32, but group_size"),
    ("packed", in_config(packed(sparsity_config=SPARSE | {"format": "sparse-24-bitmask"})), "sparsity_config"),
    ("packed", in_config(packed(transform_config={"config_groups": {"R1": {}}})), "transform_config"),
    ("packed", in_config(packed(kv_cache_scheme={"num_bits": 8})), "kv_cache_scheme"),
    ("packed", in_config(packed(moe_sparsity_config={"method": "novice"})), "moe_sparsity_config"),
    ("packed", in_config(packed(config_groups={"W4A16": ["Linear"]})), "config_groups.W4A16 must be an object"),
    ("packed", in_config(packed(weights={"actorder": "random"})), "actorder must be one of .*'random'"),
    ("packed", in_config(packed(weights={"strategy": "tensor"})), "strategy must be one of .*'tensor'"),
    ("packed", in_config(packed(weights={"strategy": None, "group_size": None})), "strategy must be one of .*None"),
    ("packed", in_config(packed(weights={"group_size": -1})), "group_size must be positive"),
    ("packed", in_config(packed(weights={"symmetric": "half"})), "symmetric must be true or false"),
    ("packed", in_config(packed(weights={"type": "FLOAT"})), "type 'FLOAT'"),
    ("packed", in_config(packed(format="dense")), "format 'dense' is not supported"),
    ("packed", in_config(packed(format=NEVER)), "format None is not supported"),
    ("packed", in_config(packed({"targets": ["re:["]})), r"'re:\[' is no regular expression"),
    ("packed", in_config(packed({"output_activations": ROWS})), "output_activations"),
    ("rows", in_config(rows({"input_activations": ROWS | {"dynamic": "local"}})), "input_activations must be"),
    ("rows", in_config(rows({"input_activations": ROWS | {"num_bits": 4}})), "input_activations must be"),
    ("gptq", in_config({"bits": 4, "group_size": 16}), r"names no quant_method, and its keys \(bits, group_size\)"),
    ("gptq", in_config({"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}), "bnb_4bit_quant_type must be one of"),
    ("gptq", in_config({"quant_method": "AQLM"}), "quantized by 'aqlm'"),
]


@pytest.mark.parametrize(("stored", "files", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_changes_the_arithmetic_is_refused_by_its_key(
    stored: str, files: dict[str, Any], message: str, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    directory = respelled(checkpoints[stored], tmp_path, files)
    with pytest.raises(QuantizationError) as caught:
        weights_of(directory)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize("value", ["awq", [1], 4])
def test_settings_that_are_no_object(value: Any, checkpoints: dict[str, str], tmp_path: Path) -> None:
    directory = respelled(checkpoints["gptq"], tmp_path, {"config.json": {"quantization_config": value}})
    with pytest.raises(ModelConfigError, match=r"`quantization_config` in .*config.json must be an object, not "):
        ModelConfig.from_pretrained(directory)


def test_the_flag_names_a_method_that_the_settings_do_not(checkpoints: dict[str, str], tmp_path: Path) -> None:
    directory = respelled(checkpoints["gptq"], tmp_path, in_config({"bits": 4, "group_size": 16}))
    assert_same_weights(directory, checkpoints["gptq"], quantization="gptq")


def test_files_of_other_programs_quantize_nothing(checkpoints: dict[str, str], tmp_path: Path) -> None:
    plain = make_tiny("LlamaForCausalLM", tmp_path / "model", **SIZES)
    (tmp_path / "model" / "quantize_config.json").write_text('{"per_channel": true, "reduce_range": true}')
    load_model(ModelConfig.from_pretrained(plain), plain)
    (tmp_path / "model" / "quantize_config.json").write_text("{")
    with pytest.raises(QuantizationError, match=r"quantize_config.json cannot be read"):
        load_model(ModelConfig.from_pretrained(plain), plain)


def test_what_is_sparse_only_is_not_quantized(tmp_path: Path) -> None:
    settings = {"quant_method": "compressed-tensors", "sparsity_config": SPARSE}
    assert canonical(settings) == {} and scheme_name("int8", canonical(settings)) == "int8"
    plain = make_tiny("LlamaForCausalLM", tmp_path / "model", **SIZES)
    config = ModelConfig.from_pretrained(plain, json_model_override_args={"quantization_config": settings})
    load_model(config, plain)
    settings["sparsity_config"] = SPARSE | {"format": "sparse-bitmask"}
    config = ModelConfig.from_pretrained(plain, json_model_override_args={"quantization_config": settings})
    with pytest.raises(QuantizationError, match="sparsity_config is not supported"):
        load_model(config, plain)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_settings_of_the_language_part(key: str, tmp_path: Path) -> None:
    text = {"model_type": "llama", "vocab_size": 9, "hidden_size": 32, key: GPTQ | {"quant_method": "GPTQ"}}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantization_settings(ModelConfig.from_pretrained(str(tmp_path))) == GPTQ
