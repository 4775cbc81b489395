"""Checkpoints of bitsandbytes, of 4 and 8 bits: weights are those that are meant, answers those of transformers."""

import re
from pathlib import Path
from typing import Any

import bits
import floats
import pytest
import torch
from floats import Format
from test_fp8_checkpoints import SIZES, assert_equal, is_quantized, load_into, rows_of, weights_of
from test_quantized_checkpoints import PROMPTS, PlainModel, assert_close, engine_logprobs, refused

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.layers.linear import LinearBase, RowParallelLinear
from rtp_llm.srt.layers.quantization.base import QuantizedModel, process_weights
from rtp_llm.srt.layers.quantization.registry import quantization_config
from rtp_llm.srt.models.loader import load_model
from tiny_models import make_tiny

FOUR: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "_load_in_4bit": True,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": None,
}
EIGHT: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
FORMATS = [
    Format("nf4", FOUR, bits.four_bits("nf4")),
    Format("nf4-large-blocks", FOUR, bits.four_bits("nf4", blocksize=256)),
    Format("nf4-nested", FOUR | {"bnb_4bit_use_double_quant": True}, bits.four_bits("nf4", nested=True)),
    Format("nf4-in-bfloat16", FOUR, bits.four_bits("nf4", storage=torch.bfloat16)),
    Format("fp4", FOUR | {"bnb_4bit_quant_type": "fp4"}, bits.four_bits("fp4")),
    Format("int8", EIGHT, bits.eight_bits),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with layers of 64 and 96 inputs: blocks of 64 end within rows of 96."""
    return make_tiny("Qwen2ForCausalLM", tmp_path_factory.mktemp("model"), **SIZES)


@pytest.mark.parametrize("stored", [pytest.param(stored, id=stored.name) for stored in FORMATS])
def test_weights_are_those_that_are_meant(stored: Format, model_dir: str, tmp_path: Path) -> None:
    plain, packed = floats.store(model_dir, tmp_path, stored, is_quantized)
    assert_equal(weights_of(packed), weights_of(plain))


@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
def test_routers_and_experts_are_dequantized(name: str, tmp_path: Path) -> None:
    """transformers 4 quantized them as it did every linear layer."""
    sizes = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    model_dir = make_tiny("Qwen3MoeForCausalLM", tmp_path / "model", **sizes)
    stored = next(stored for stored in FORMATS if stored.name == name)
    plain, packed = floats.store(
        model_dir, tmp_path, stored, lambda n: is_quantized(n) or n.endswith("mlp.gate.weight")
    )
    assert_equal(weights_of(packed), weights_of(plain))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_answers(name: str, model_dir: str, tmp_path: Path) -> None:
    stored = next(stored for stored in FORMATS if stored.name == name)
    plain, packed = floats.store(model_dir, tmp_path, stored, is_quantized)
    expected = PlainModel(plain).logprobs(PROMPTS)
    assert_close(engine_logprobs(packed), expected, 1e-3)
    assert_close(engine_logprobs(packed, dtype="bfloat16"), expected, 0.4)


def test_answers_through_transformers(model_dir: str, tmp_path: Path) -> None:
    """There, weights are dequantized."""
    plain, packed = floats.store(model_dir, tmp_path, FORMATS[0], is_quantized)
    assert_close(engine_logprobs(packed, model_impl="transformers"), PlainModel(plain).logprobs(PROMPTS), 1e-3)


@pytest.mark.parametrize(("name", "most"), [("nf4-nested", 0.3), ("int8", 0.52)])
def test_memory(name: str, most: float, tmp_path: Path) -> None:
    """At most this part of bfloat16's bytes is stored; 4 bits have a scale in float32 for each 64."""
    model_dir = make_tiny(
        "Qwen2ForCausalLM", tmp_path / "model", **SIZES | {"hidden_size": 128, "intermediate_size": 256}
    )
    stored = next(stored for stored in FORMATS if stored.name == name)
    _, packed = floats.store(model_dir, tmp_path, stored, is_quantized)
    model = load_model(ModelConfig.from_pretrained(packed, dtype="bfloat16"), packed)
    linear = [module for name, module in model.named_modules() if isinstance(module, LinearBase)]
    plain = sum(2 * rows.numel() for rows in (rows_of(module.packed) for module in linear))
    assert sum(module.packed.nbytes for module in linear) < most * plain


@pytest.mark.parametrize("stored", [pytest.param(stored, id=stored.name) for stored in FORMATS])
def test_ranks_hold_their_parts(stored: Format) -> None:
    scheme = quantization_config("bitsandbytes", QuantizedModel(settings=stored.settings))
    tensors, meant = stored.write(torch.randn(24, 160))
    for rank in range(2):
        layer = RowParallelLinear(
            160, 24, bias=False, quant_config=scheme, prefix="x", reduce_results=False, tp_group=RankGroup(rank, 2)
        )
        load_into(layer, scheme, tensors)
        process_weights(layer)
        assert torch.equal(rows_of(layer.packed), meant[:, 80 * rank :][:, :80])


# What is wrong is named


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FOUR | {"load_in_8bit": True}, "must have either load_in_4bit or load_in_8bit, not both"),
        ({"quant_method": "bitsandbytes"}, "must have either load_in_4bit or load_in_8bit, not neither"),
        (FOUR | {"bnb_4bit_quant_type": "af4"}, r"bnb_4bit_quant_type must be one of \['nf4', 'fp4'\], not 'af4'"),
        (FOUR | {"llm_int8_skip_modules": ["k_proj"]}, "qkv_proj: the checkpoint quantizes some of"),
    ],
)
def test_what_is_not_supported_is_named(settings: dict[str, Any], message: str, model_dir: str, tmp_path: Path) -> None:
    assert re.search(message, refused(settings, model_dir, tmp_path))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"shape": [64, 1 << 40]}, r"q_proj\.weight: 2048 bytes are not \[64, 1099511627776\] codes"),
        ({"shape": [32]}, r"q_proj\.weight\.quant_state is no description of a weight of 4 bits"),
        ({"blocksize": 32}, r"64 scales are not those of \[64, 64\] in blocks of 32, which must be a multiple of 64"),
        ({"quant_type": "fp4"}, "of type 'fp4', not 'nf4' as the configuration says"),
    ],
)
def test_a_weight_that_is_not_as_described_is_named(
    state: dict[str, Any], message: str, model_dir: str, tmp_path: Path
) -> None:
    stored = Format("spoiled", FOUR, bits.four_bits("nf4", edit=state))
    _, packed = floats.store(model_dir, tmp_path, stored, lambda name: name.endswith("0.self_attn.q_proj.weight"))
    with pytest.raises(ValueError, match=message):
        load_model(ModelConfig.from_pretrained(packed), packed)


def test_a_weight_that_lacks_its_scales_is_named(model_dir: str, tmp_path: Path) -> None:
    def edit(tensors: floats.Tensors) -> None:
        del tensors["model.layers.1.mlp.down_proj.weight.absmax"]

    stored = Format("spoiled", FOUR, bits.four_bits("nf4"), edit=edit)
    _, packed = floats.store(model_dir, tmp_path, stored, is_quantized)
    with pytest.raises(ValueError, match=r"down_proj\.weight\.quant_map"):
        load_model(ModelConfig.from_pretrained(packed), packed)


def test_rows_that_do_not_follow_one_another(model_dir: str, tmp_path: Path) -> None:
    def edit(tensors: floats.Tensors) -> None:
        tensors["model.layers.1.mlp.down_proj.weight_format"].fill_(2)

    stored = Format("spoiled", EIGHT, bits.eight_bits, edit=edit)
    _, packed = floats.store(model_dir, tmp_path, stored, is_quantized)
    with pytest.raises(ValueError, match="only weights whose rows follow one another"):
        load_model(ModelConfig.from_pretrained(packed), packed)
