"""Checkpoints in fp8, in every spelling: the weights are those that are meant, and answers those of transformers."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import floats
import pytest
import torch
from floats import Format
from test_quantized_checkpoints import PROMPTS, PlainModel, assert_close, engine_logprobs, refused

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.devices.reference.provider import ReferenceProvider
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.kernels.packed import OneByOne, PackedWeight, PlainExperts
from rtp_llm.srt.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear
from rtp_llm.srt.layers.moe import Experts, FusedMoE
from rtp_llm.srt.layers.quantization.base import QuantizedModel, process_weights
from rtp_llm.srt.layers.quantization.registry import quantization_config
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.weight_loading import WeightLoadError
from tiny_models import make_tiny

SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(strategy: str, stored: str = "float-quantized", **weights: Any) -> dict[str, Any]:
    inputs = FLOAT | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": FLOAT | {"strategy": strategy} | weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": FLOAT | {"strategy": "tensor", "dynamic": False},
    }


def with_cache_scales(tensors: floats.Tensors) -> None:
    for layer in range(2):
        for name in ("k_scale", "v_scale", "k_proj.k_scale", "v_proj.output_scale"):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(0.5)


MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.31"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*router*"]},
}
FORMATS = [
    Format("blocks", FP8 | {"weight_block_size": [24, 40]}, floats.blocks(24, 40)),
    Format("bytes", FP8 | {"weight_block_size": [16, 32], "scale_fmt": "ue8m0"}, floats.powers_of_two(16, 32)),
    Format(
        "static",
        FP8 | {"activation_scheme": "static", "weight_block_size": None},
        floats.whole("weight_scale_inv", (), activation_scale=2.0),
    ),
    Format(
        "autofp8",
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        floats.whole("weight_scale", (1,), input_scale=0.1),
        edit=with_cache_scales,
    ),
    Format(
        "fbgemm", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200}, floats.outputs("weight_scale", (-1, 1))
    ),
    Format("tensor", compressed("tensor", "naive-quantized"), floats.whole("weight_scale", (1,), input_scale=0.5)),
    Format("channel", compressed("channel"), floats.outputs("weight_scale", (-1, 1))),
    Format("group", compressed("group", group_size=32), floats.blocks(1, 32, "weight_scale")),
    Format("block", compressed("block", block_structure="16x40"), floats.blocks(16, 40, "weight_scale")),
    Format(
        "mxfp8",
        compressed("group", "mxfp8-quantized", group_size=32, scale_dtype="torch.uint8"),
        floats.powers_of_two(1, 32, "weight_scale"),
    ),
    Format("modelopt", MODELOPT, floats.whole("weight_scale", (), input_scale=0.5), "hf_quant_config.json"),
    Format(
        "modelopt-blocks",
        {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo", "ignore": ["lm_head"]},
        floats.blocks(128, 128, "weight_scale", lambda scales: scales[:, None, :, None]),
    ),
    Format(
        "modelopt-outputs",
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        floats.outputs("weight_scale", (-1,)),
    ),
]


def named(name: str) -> Format:
    return next(stored for stored in FORMATS if stored.name == name)


def is_quantized(name: str) -> bool:
    return bool(re.search(r"layers\.\d+\..*(proj|proj_with_mqa)\.weight$", name))


def weights_of(model_dir: str) -> dict[str, torch.Tensor]:
    """The weights that the engine multiplies with, of a model in float32."""
    config = ModelConfig.from_pretrained(model_dir, dtype="float32")
    model = load_model(config, model_dir, device="reference")
    weights: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            weights[name] = rows_of(module.packed)
        elif isinstance(module, Experts):
            for kind, packed in module.packed.items():
                if isinstance(packed, OneByOne):
                    weights[f"{name}.{kind}"] = torch.stack([rows_of(one) for one in packed.experts])
                else:
                    assert isinstance(packed, PlainExperts)
                    weights[f"{name}.{kind}"] = packed.weight
    return weights


def rows_of(packed: PackedWeight) -> torch.Tensor:
    return packed.rows(torch.arange(packed.num_rows))


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, expected[name]), name


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny("Qwen2ForCausalLM", tmp_path_factory.mktemp("model"), **SIZES)


@pytest.mark.parametrize("stored", [pytest.param(stored, id=stored.name) for stored in FORMATS])
def test_weights_are_numbers_times_scales(stored: Format, model_dir: str, tmp_path: Path) -> None:
    plain, packed = floats.store(model_dir, tmp_path, stored, is_quantized)
    assert_equal(weights_of(packed), weights_of(plain))


EXPERTS = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 16}


@pytest.mark.parametrize("name", ["blocks", "autofp8", "channel", "bytes"])
def test_weights_of_experts(name: str, tmp_path: Path) -> None:
    model_dir = make_tiny("Qwen3MoeForCausalLM", tmp_path / "model", **EXPERTS)
    plain, packed = floats.store(model_dir, tmp_path, named(name), is_quantized)
    assert_equal(weights_of(packed), weights_of(plain))


def test_answers(model_dir: str, tmp_path: Path) -> None:
    plain, packed = floats.store(model_dir, tmp_path, named("blocks"), is_quantized)
    expected = PlainModel(plain).logprobs(PROMPTS)
    assert_close(engine_logprobs(packed), expected, 1e-3)
    assert_close(engine_logprobs(packed, dtype="bfloat16"), expected, 0.3)


def test_answers_of_latent_attention_and_experts(tmp_path: Path) -> None:
    """DeepSeek-V3: kv_b_proj is quantized as well, and needed in floats."""
    model_dir = make_tiny("DeepseekV3ForCausalLM", tmp_path / "model")
    plain, packed = floats.store(model_dir, tmp_path, named("blocks"), is_quantized)
    assert_close(engine_logprobs(packed), PlainModel(plain).logprobs(PROMPTS), 1e-3)


@pytest.mark.parametrize("name", ["blocks", "channel", "modelopt"])
def test_what_the_model_does_not_multiply_in_fp8_is_dequantized(name: str, tmp_path: Path) -> None:
    """A router and the head: ``ignore`` and ``exclude_modules`` may lack them."""
    model_dir = make_tiny("Qwen3MoeForCausalLM", tmp_path / "model", **EXPERTS | {"tie_word_embeddings": False})
    plain, packed = floats.store(
        model_dir, tmp_path, named(name), lambda n: is_quantized(n) or n in ("lm_head.weight", ROUTER)
    )
    assert_equal(weights_of(packed), weights_of(plain))
    heads = [
        load_model(ModelConfig.from_pretrained(path), path, device="reference").lm_head for path in (packed, plain)
    ]
    assert torch.equal(*(rows_of(head.packed) for head in heads))


ROUTER = "model.layers.1.mlp.gate.weight"


def test_answers_through_transformers(model_dir: str, tmp_path: Path) -> None:
    """There, all weights are dequantized."""
    plain, packed = floats.store(model_dir, tmp_path, named("blocks"), is_quantized)
    expected = PlainModel(plain).logprobs(PROMPTS)
    assert_close(engine_logprobs(packed, model_impl="transformers"), expected, 1e-3)


# Ranks, and tensors of all experts


def scheme_of(stored: Format) -> Any:
    settings = (
        stored.settings if "quant_method" in stored.settings else {"quant_method": "modelopt", "quant_algo": "FP8"}
    )
    return quantization_config(settings["quant_method"], QuantizedModel(settings=settings))


def load_into(layer: LinearBase, scheme: Any, tensors: floats.Tensors) -> None:
    named_tensors = ((f"{layer.prefix}.{kind}", tensor) for kind, tensor in tensors.items())
    for name, tensor in scheme.translate(named_tensors, torch.float32, "cpu"):
        kind = name.removeprefix(f"{layer.prefix}.")
        if kind in dict(layer.named_parameters()):
            layer.get_parameter(kind).weight_loader(layer.get_parameter(kind), tensor)  # type: ignore[operator]
        else:
            assert scheme.may_leave(name, tensor)


@pytest.mark.parametrize("name", ["blocks", "static", "channel", "group"])
@pytest.mark.parametrize("num_inputs", [64, 100])
def test_ranks_hold_their_parts(name: str, num_inputs: int) -> None:
    """Also where a rank's part begins within a block."""
    stored, weight = named(name), torch.randn(24, num_inputs)
    tensors, meant = stored.write(weight)
    half = num_inputs // 2
    for rank in range(2):
        scheme, group = scheme_of(stored), RankGroup(rank, 2)
        by_rows = RowParallelLinear(num_inputs, 24, bias=False, quant_config=scheme, prefix="a.b", tp_group=group)
        load_into(by_rows, scheme, tensors)
        process_weights(by_rows)
        assert torch.equal(rows_of(by_rows.packed), meant[:, rank * half :][:, :half])
        by_columns = ColumnParallelLinear(num_inputs, 24, bias=False, quant_config=scheme, prefix="a.b", tp_group=group)
        load_into(by_columns, scheme, tensors)
        process_weights(by_columns)
        assert torch.equal(rows_of(by_columns.packed), meant[rank * 12 :][:12])


@pytest.mark.parametrize("stored", FORMATS, ids=lambda stored: stored.name)
def test_whether_a_checkpoint_is_made_for_inputs_in_fp8(stored: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is told; those of weights alone are ModelOpt's in blocks, and groups without input_activations."""
    told, pack_fp8 = [], ReferenceProvider.pack_fp8

    def noted(provider: Any, *args: Any) -> PackedWeight:
        told.append(args[3])
        return pack_fp8(provider, *args)

    monkeypatch.setattr(ReferenceProvider, "pack_fp8", noted)
    tensors, _ = stored.write(torch.randn(24, 64))
    weights_only = [{"weights": group["weights"]} for group in stored.settings.get("config_groups", {}).values()]
    for settings in [stored.settings, *({**stored.settings, "config_groups": {"g": only}} for only in weights_only)]:
        scheme = scheme_of(replace(stored, settings=settings))
        layer = ColumnParallelLinear(64, 24, bias=False, quant_config=scheme, prefix="a.b")
        load_into(layer, scheme, tensors)
        process_weights(layer)
    assert told == [stored.name != "modelopt-blocks", *(False for _ in weights_only)]


@pytest.mark.parametrize("name", ["blocks", "static", "channel"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_in_one_tensor(name: str, separate: bool, ranks: int) -> None:
    """As transformers writes them; a gate's blocks and those of its projection may each begin anew."""
    stored, experts = named(name), [(torch.randn(2, 56, 64), torch.randn(64, 56)) for _ in range(3)]
    firsts, downs = [], []
    for gate_up, down in experts:
        parts = [stored.write(part) for part in (gate_up if separate else [gate_up.flatten(0, 1)])]
        firsts.append(([part for part, _ in parts], torch.cat([meant for _, meant in parts])))
        downs.append(stored.write(down))
    scale = next(kind for kind in downs[0][0] if kind.startswith("weight_scale"))
    tensors = {
        "gate_up_proj": torch.stack([torch.cat([part["weight"] for part in parts]) for parts, _ in firsts]),
        "gate_up_proj_scale_inv": torch.stack([torch.cat([_two_dim(p[scale]) for p in parts]) for parts, _ in firsts]),
        "down_proj": torch.stack([part["weight"] for part, _ in downs]),
        "down_proj_scale_inv": torch.stack([_two_dim(part[scale]) for part, _ in downs]),
    }
    meant = torch.stack([both for _, both in firsts]).unflatten(1, (2, 56))
    for rank in range(ranks):
        scheme, group = scheme_of(stored), RankGroup(rank, ranks)
        layer = FusedMoE(3, 64, 56, quant_config=scheme, prefix="layers.0.experts", tp_group=group)
        for name, tensor in scheme.translate(tensors.items(), torch.float32, "cpu"):
            parameter, shard_id = layer.weight_sources[name]
            layer.get_parameter(parameter).weight_loader(layer.get_parameter(parameter), tensor, shard_id)  # type: ignore[operator]
        process_weights(layer)
        size = 56 // ranks
        own = slice(rank * size, rank * size + size)
        for expert in range(3):
            w13, w2 = (layer.packed[kind].experts[expert] for kind in ("w13", "w2"))  # type: ignore[attr-defined]
            assert torch.equal(rows_of(w13), meant[expert][:, own].flatten(0, 1))
            assert torch.equal(rows_of(w2), downs[expert][1][:, own])


def _two_dim(scales: torch.Tensor) -> torch.Tensor:
    return scales.reshape(1, 1) if scales.numel() == 1 else scales


# What is wrong is named


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size must be two positive numbers, not \[128\]"),
        (FP8 | {"activation_scheme": "never"}, "activation_scheme must be one of"),
        (FP8 | {"fmt": "e5m2"}, "fmt must be one of .*, not 'e5m2'"),
        (FP8 | {"expert_dtype": "fp4"}, r"expert_dtype must be one of \['fp8'\], not 'fp4'"),
        (FP8 | {"modules_to_convert": ["embed"]}, "modules_to_convert, tables in 8 bits, is not supported"),
        (FP8 | {"modules_to_not_convert": ["q_proj"]}, "qkv_proj: the checkpoint quantizes some of .*k_proj"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' of ModelOpt is not supported"),
        (compressed("block"), "strategy block needs a block_structure"),
        (compressed("tensor_group"), "strategy must be one of"),
        (compressed("channel", "nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported for floats"),
        (compressed("channel", num_bits=4), "weights of type 'float' with 4 bits"),
        (compressed("channel", symmetric=False), "floats with zero points"),
    ],
)
def test_what_is_not_supported_is_named(settings: dict[str, Any], message: str, model_dir: str, tmp_path: Path) -> None:
    assert re.search(message, refused(settings, model_dir, tmp_path))


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("weight", lambda weight: weight.float().to(torch.float8_e5m2), "is in float8_e5m2, another format"),
        ("weight", lambda weight: weight.float().to(torch.float8_e4m3fnuz), "is in float8_e4m3fnuz, another format"),
        ("weight", lambda weight: weight.bfloat16(), "is in bfloat16, not quantized"),
        ("weight_scale_inv", lambda scales: scales[:1].clone(), r"down_proj: scales: .*\(3, 3\), the checkpoint has"),
    ],
)
def test_tensors_of_other_formats_are_named(
    kind: str, spoil: Any, message: str, model_dir: str, tmp_path: Path
) -> None:
    def edit(tensors: floats.Tensors) -> None:
        name = f"model.layers.1.mlp.down_proj.{kind}"
        tensors[name] = spoil(tensors[name])

    stored = Format("spoiled", named("blocks").settings, named("blocks").write, edit=edit)
    _, packed = floats.store(model_dir, tmp_path, stored, is_quantized)
    with pytest.raises(WeightLoadError, match=message):
        load_model(ModelConfig.from_pretrained(packed), packed)
