"""GPTQ, AWQ and compressed-tensors checkpoints: the engine answers as transformers on the values they stand for."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import quantized
from quantized import Format
from rtp_llm import Engine
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.layers.quantization.base import QuantizationError
from rtp_llm.srt.models.loader import WeightLoadError, load_model
from tiny_models import make_tiny, random_prompts

SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(stored: str, activations: Any = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int"} | weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packed(**weights: Any) -> dict[str, Any]:
    return compressed("pack-quantized", **{"num_bits": 4, "symmetric": True, "strategy": "group"} | weights)


CHANNEL = dict(num_bits=8, symmetric=True, strategy="channel")
pack_symmetric = partial(quantized.pack_quantized, symmetric=True)
FORMATS = [
    Format("gptq-symmetric", GPTQ, quantized.gptq),
    Format("gptq-zeros", GPTQ | {"sym": False}, quantized.gptq, symmetric=False),
    Format(
        "gptq-v2",
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        partial(quantized.gptq, is_v2=True),
        symmetric=False,
    ),
    Format("gptq-one-group", GPTQ | {"group_size": -1}, quantized.gptq, group_size=-1),
    Format("gptq-desc-act", GPTQ | {"desc_act": True}, quantized.gptq, symmetric=False, shuffled=True),
    Format("gptq-8bit", GPTQ | {"bits": 8}, quantized.gptq, bits=8),
    Format("gptq-8bit-zeros", GPTQ | {"bits": 8}, quantized.gptq, bits=8, symmetric=False, shuffled=True),
    Format("awq", AWQ, quantized.awq, symmetric=False),
    Format("packed-groups", packed(group_size=16), pack_symmetric),
    Format(
        "packed-zeros",
        packed(group_size=16, symmetric=False),
        partial(quantized.pack_quantized, symmetric=False),
        symmetric=False,
    ),
    Format(
        "packed-order",
        packed(group_size=16, actorder="group"),
        partial(quantized.pack_quantized, symmetric=True, is_ordered=True),
        shuffled=True,
    ),
    Format("packed-channel", packed(strategy="channel"), pack_symmetric, group_size=-1),
    Format("packed-8bit", packed(num_bits=8, group_size=32), pack_symmetric, bits=8, group_size=32),
    Format(
        "int8-rows",
        compressed("int-quantized", ROWS, **CHANNEL),
        quantized.int_quantized,
        bits=8,
        group_size=-1,
        quantizes_rows=True,
    ),
    Format(
        "int8-weights",
        compressed("int-quantized", None, **CHANNEL),
        quantized.int_quantized,
        bits=8,
        group_size=-1,
        quantizes_rows=True,  # as documented: a scale per output means the product of integers
    ),
]


def is_quantized(name: str) -> bool:
    return bool(re.search(r"layers\.\d+\..*(proj|w[123])\.weight$", name))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny("Qwen2ForCausalLM", tmp_path_factory.mktemp("model"), **SIZES)


PROMPTS = [random_prompts(40, [30])[0], random_prompts(41, [9])[0]]


def transformers_logprobs(model_dir: str, quantizes_rows: bool = False) -> list[list[float]]:
    """Of each prompt's tokens but the first, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if quantizes_rows:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and is_quantized(f"{name}.weight"):
                module.register_forward_pre_hook(lambda _, args: (rounded_rows(args[0]),))
    results = []
    for ids in PROMPTS:
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        results.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return results


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    scales = x.abs().amax(-1, keepdim=True) / 127
    return (x / scales).round() * scales


def engine_logprobs(model_dir: str, **options: Any) -> list[list[float]]:
    with Engine(model_path=model_dir, max_total_tokens=512, log_level="error", **options) as engine:
        results = engine.generate(
            input_ids=PROMPTS, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
        )
    return [[entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]] for result in results]


def assert_close(ours: list[list[float]], expected: list[list[float]], tolerance: float) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=tolerance)


@pytest.mark.parametrize("stored", [pytest.param(stored, id=stored.name) for stored in FORMATS])
def test_answers_are_those_of_the_integers(stored: Format, model_dir: str, tmp_path: Path) -> None:
    plain, packed_dir = quantized.quantize(model_dir, tmp_path, stored, is_quantized)
    expected = transformers_logprobs(plain, stored.quantizes_rows)
    # An activation that lies between two integers may be rounded either way.
    assert_close(engine_logprobs(packed_dir), expected, 2e-2 if stored.quantizes_rows else 1e-3)


@pytest.mark.parametrize("stored", [FORMATS[1], FORMATS[7], FORMATS[9], FORMATS[13]], ids=lambda stored: stored.name)
def test_two_ranks_share_a_quantized_model(stored: Format, model_dir: str, tmp_path: Path) -> None:
    _, packed_dir = quantized.quantize(model_dir, tmp_path, stored, is_quantized)
    tolerance = 3e-2 if stored.quantizes_rows else 1e-3  # each rank rounds its own part of a row
    assert_close(engine_logprobs(packed_dir, tp_size=2), engine_logprobs(packed_dir), tolerance)


@pytest.mark.parametrize("name", ["gptq-zeros", "awq", "packed-zeros", "int8-rows"])
def test_experts(name: str, tmp_path: Path) -> None:
    sizes = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    model_dir = make_tiny("Qwen3MoeForCausalLM", tmp_path / "model", **sizes)
    stored = next(stored for stored in FORMATS if stored.name == name)
    plain, packed_dir = quantized.quantize(model_dir, tmp_path, stored, is_quantized)
    ours = engine_logprobs(packed_dir)
    if stored.quantizes_rows:  # transformers computes experts without modules that a hook could be given
        ours_plain = engine_logprobs(plain)
        assert_close(ours, ours_plain, 0.5)
        assert ours != ours_plain
    else:
        assert_close(ours, transformers_logprobs(plain), 1e-3)


def load(model_dir: str, tmp_path: Path, settings: dict[str, Any], stored: Format = FORMATS[0]) -> nn.Module:
    changed = Format(**{name: getattr(stored, name) for name in stored.__slots__} | {"settings": settings})
    _, packed_dir = quantized.quantize(model_dir, tmp_path, changed, is_quantized)
    return load_model(ModelConfig.from_pretrained(packed_dir), packed_dir)
