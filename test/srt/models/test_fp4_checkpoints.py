"""NVFP4 and MXFP4 of linear layers: the weights are those that are meant, and answers those of transformers."""

from pathlib import Path
from typing import Any

import floats
import pytest
import torch
from floats import Format
from test_fp8_checkpoints import SIZES, assert_equal, is_quantized, load_into, rows_of, weights_of
from test_quantized_checkpoints import PROMPTS, PlainModel, assert_close, engine_logprobs

from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.layers.linear import RowParallelLinear
from rtp_llm.srt.layers.quantization.base import QuantizedModel, process_weights
from rtp_llm.srt.layers.quantization.registry import quantization_config
from tiny_models import make_tiny


def compressed(stored: str, group_size: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": group_size}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": weights | {"dynamic": "local"}}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FORMATS = [
    Format(
        "nvfp4",
        compressed("nvfp4-pack-quantized", 16),
        floats.four_bits(16, "weight_packed", "weight_global_scale", divides=True),
    ),
    Format("mxfp4", compressed("mxfp4-pack-quantized", 32), floats.four_bits(32, "weight_packed")),
    Format(
        "modelopt",
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        floats.four_bits(16, "weight", "weight_scale_2"),
    ),
]
IDS = [stored.name for stored in FORMATS]


@pytest.mark.parametrize("stored", FORMATS, ids=IDS)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3MoeForCausalLM"])
def test_weights_are_those_that_are_meant(architecture: str, stored: Format, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    sizes = SIZES | experts if "Moe" in architecture else SIZES
    model_dir = make_tiny(architecture, tmp_path / "model", **sizes)
    plain, packed = floats.store(model_dir, tmp_path, stored, is_quantized)
    assert_equal(weights_of(packed), weights_of(plain))


def test_answers(tmp_path: Path) -> None:
    model_dir = make_tiny("Qwen2ForCausalLM", tmp_path / "model", **SIZES)
    plain, packed = floats.store(model_dir, tmp_path, FORMATS[0], is_quantized)
    expected = PlainModel(plain).logprobs(PROMPTS)
    assert_close(engine_logprobs(packed), expected, 1e-3)
    assert_close(engine_logprobs(packed, dtype="bfloat16"), expected, 0.4)


@pytest.mark.parametrize("stored", FORMATS, ids=IDS)
def test_ranks_hold_their_parts(stored: Format) -> None:
    scheme = quantization_config(stored.settings["quant_method"], QuantizedModel(settings=stored.settings))
    tensors, meant = stored.write(torch.randn(24, 160))
    for rank in range(2):
        layer = RowParallelLinear(
            160, 24, bias=False, quant_config=scheme, prefix="x", reduce_results=False, tp_group=RankGroup(rank, 2)
        )
        load_into(layer, scheme, tensors)
        process_weights(layer)
        assert torch.equal(rows_of(layer.packed), meant[:, 80 * rank :][:, :80])
