"""GPTQ, AWQ and compressed-tensors checkpoints: the engine answers as transformers on the values they stand for."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from quantized import Format
from torch import nn
from transformers import AutoModelForCausalLM

from rtp_llm import Engine
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.layers.linear import RowParallelLinear
from rtp_llm.srt.layers.quantization.base import QuantizedModel, process_weights
from rtp_llm.srt.layers.quantization.registry import quantization_config
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.weight_loading import WeightLoadError
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


class PlainModel:
    """transformers in float32 on what the integers stand for. ``quantizes_rows``: products round their rows to int8."""

    def __init__(self, model_dir: str, quantizes_rows: bool = False) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._quantizes_rows = quantizes_rows
        self._margin = 0.5  # of the newest forward pass: how near to two integers an activation came
        if quantizes_rows:
            for name, module in self._model.named_modules():
                if isinstance(module, nn.Linear) and is_quantized(f"{name}.weight"):
                    module.register_forward_pre_hook(lambda _, args: (self._round(args[0]),))

    def prompts(self) -> list[list[int]]:
        """Prompts whose rounding no last digit decides: an activation half-way between two integers may go either way
        in another order of summation, and what follows it would differ for good."""
        if not self._quantizes_rows:
            return PROMPTS
        return [self._prompt_without_ties(length) for length in (9, 5)]

    def _prompt_without_ties(self, length: int) -> list[int]:
        for seed in range(400):
            ids = random_prompts(40, [length], seed)[0]
            self.logprobs([ids])
            if self._margin > CLEAR_MARGIN:
                return ids
        raise AssertionError(f"no prompt of {length} tokens without a tie")

    def logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        """Log-probabilities of each prompt's tokens except the first."""
        self._margin = 0.5
        results = []
        for ids in prompts:
            with torch.inference_mode():
                logprobs = self._model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            results.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
        return results

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        steps = x / (x.abs().amax(-1, keepdim=True) / 127)
        self._margin = min(self._margin, (steps - steps.floor() - 0.5).abs().min().item())
        return rounded_rows(x)


CLEAR_MARGIN = 1e-4  # of a step between two integers; float32 sums in another order differ by less


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    scales = x.abs().amax(-1, keepdim=True) / 127
    return (x / scales).round() * scales


def engine_logprobs(model_dir: str, prompts: list[list[int]] | None = None, **options: Any) -> list[list[float]]:
    prompts = PROMPTS if prompts is None else prompts
    with Engine(model_path=model_dir, max_total_tokens=512, log_level="error", **options) as engine:
        results = engine.generate(
            input_ids=prompts, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
        )
    return [[entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]] for result in results]


def assert_close(ours: list[list[float]], expected: list[list[float]], tolerance: float) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=tolerance)


@pytest.mark.parametrize("stored", [pytest.param(stored, id=stored.name) for stored in FORMATS])
def test_answers_are_those_of_the_integers(stored: Format, model_dir: str, tmp_path: Path) -> None:
    plain, packed_dir = quantized.quantize(model_dir, tmp_path, stored, is_quantized)
    reference = PlainModel(plain, stored.quantizes_rows)
    prompts = reference.prompts()
    assert_close(engine_logprobs(packed_dir, prompts), reference.logprobs(prompts), 1e-3)


@pytest.mark.usefixtures("warm_processes")
def test_two_ranks_share_a_quantized_model(model_dir: str, tmp_path: Path) -> None:
    stored = FORMATS[1]
    _, packed_dir = quantized.quantize(model_dir, tmp_path, stored, is_quantized)
    assert_close(engine_logprobs(packed_dir, tp_size=2), engine_logprobs(packed_dir), 1e-3)


@pytest.mark.parametrize("stored", [pytest.param(stored, id=stored.name) for stored in FORMATS if not stored.shuffled])
def test_ranks_hold_their_parts(stored: Format) -> None:
    """Inputs are shared: the sum over ranks is the product with the whole."""
    generator = torch.Generator().manual_seed(5)
    integers = quantized.integers_of(
        torch.randn(24, 64, generator=generator), stored.bits, stored.group_size, stored.symmetric
    )
    x = torch.randn(3, 64, generator=generator)
    total, expected = torch.zeros(3, 24), torch.zeros(3, 24)
    for rank in range(2):
        part = slice(32 * rank, 32 * rank + 32)
        inputs = rounded_rows(x[:, part]) if stored.quantizes_rows else x[:, part]
        expected += inputs @ integers.dequantized()[:, part].T
        total += part_of_rank(stored, integers, rank)(x[:, part])[0]
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def part_of_rank(stored: Format, integers: quantized.Integers, rank: int) -> RowParallelLinear:
    scheme = quantization_config(stored.settings["quant_method"], QuantizedModel(settings=stored.settings))
    layer = RowParallelLinear(
        64,
        24,
        bias=False,
        reduce_results=False,
        quant_config=scheme,
        prefix="layers.0.o_proj",
        tp_group=RankGroup(rank, 2),
    )
    for name, tensor in stored.write(integers).items():
        if name != "weight_shape":
            param = layer.get_parameter(name)
            param.weight_loader(param, tensor)  # type: ignore[attr-defined]
    process_weights(layer)
    assert not list(layer.parameters())
    return layer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GPTQ | {"group_size": 24}, "o_proj: 64 inputs in groups of 24 cannot be shared by 2 ranks, since 32 are not"),
        (GPTQ | {"desc_act": True}, "o_proj: groups of inputs that are not neighbours .*use --tp-size 1"),
    ],
)
def test_what_ranks_cannot_share_is_refused(settings: dict[str, Any], message: str) -> None:
    scheme = quantization_config("gptq", QuantizedModel(settings=settings))
    with pytest.raises(ValueError, match=message):
        layer = RowParallelLinear(
            64, 24, quant_config=scheme, prefix="layers.0.o_proj", tp_group=RankGroup(0, 2), reduce_results=False
        )
        g_idx = layer.get_parameter("g_idx")
        g_idx.weight_loader(g_idx, torch.arange(64).flip(0) // 16)  # type: ignore[attr-defined]


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
        assert_close(ours, PlainModel(plain).logprobs(PROMPTS), 1e-3)


@pytest.mark.parametrize("name", ["gptq-zeros", "awq", "packed-zeros"])
def test_projections_stored_by_heads(name: str, tmp_path: Path) -> None:
    """Whichever dimension outputs are in, and if several are in a word."""
    config = dict(new_decoder_architecture=True, hidden_size=64, num_kv_heads=2, num_hidden_layers=2)
    model_dir = make_tiny("FalconForCausalLM", tmp_path / "model", **config)
    stored = next(stored for stored in FORMATS if stored.name == name)
    plain, packed_dir = quantized.quantize(
        model_dir, tmp_path, stored, lambda name: bool(re.search(r"(query_key_value|dense\w*)\.weight$", name))
    )
    assert_close(engine_logprobs(packed_dir), PlainModel(plain).logprobs(PROMPTS), 1e-3)


# What is wrong is named


def refused(settings: dict[str, Any], model_dir: str, tmp_path: Path, quantization: str | None = None) -> str:
    """The error that loading the model with these settings ends in."""
    config = ModelConfig.from_pretrained(model_dir, json_model_override_args={"quantization_config": settings})
    with pytest.raises(ValueError) as caught:
        load_model(config, model_dir, quantization=quantization)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitnet"}, r"quantized by 'bitnet', which is not supported; have gptq, awq, "),
        (GPTQ | {"bits": 3}, r"bits must be one of \[4, 8\], not 3"),
        (GPTQ | {"group_size": 0}, "group_size must be a positive number or -1, not 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format must be one of \['gptq', 'gptq_v2'\]"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "gives layers '.*down.*' a bits of 8"),
        (AWQ | {"version": "gemv"}, r"version must be one of \['gemm'\], not 'gemv'"),
        (AWQ | {"zero_point": False}, "zero_point: false"),
        (compressed("float-quantized", type="float", num_bits=6, strategy="tensor"), "type 'float' with 6 bits"),
        (compressed("marlin-24", num_bits=4, strategy="channel"), "format 'marlin-24' is not supported"),
        (packed(group_size=16) | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not supported"),
        (compressed("int-quantized", ROWS | {"dynamic": False}, **CHANNEL), "input_activations must be"),
        (packed(group_size=16) | {"ignore": ["re:.*q_proj"]}, "qkv_proj: the checkpoint quantizes some of .*k_proj"),
        (packed(group_size=16) | {"config_groups": {}}, "must have `config_groups`"),
    ],
)
def test_what_is_not_supported_is_named(settings: dict[str, Any], message: str, model_dir: str, tmp_path: Path) -> None:
    assert re.search(message, refused(settings, model_dir, tmp_path))


def test_flag_and_checkpoint_must_agree(model_dir: str, tmp_path: Path) -> None:
    assert "'int8' was asked for, but the checkpoint is quantized by 'gptq'" in refused(
        GPTQ, model_dir, tmp_path, "int8"
    )
    assert "for any checkpoint there are int8, fp8, int4" in refused({}, model_dir, tmp_path, "awq")
    assert "unknown quantization 'int2'; have int8, fp8, int4" in refused({}, model_dir, tmp_path, "int2")


def test_missing_and_misshapen_tensors_are_named(model_dir: str, tmp_path: Path) -> None:
    def spoil(tensors: quantized.Tensors) -> None:
        del tensors["model.layers.0.self_attn.k_proj.scales"]
        tensors["model.layers.1.mlp.down_proj.scales"] = tensors["model.layers.1.mlp.down_proj.scales"][:2].clone()

    spoiled = Format("spoiled", GPTQ, quantized.gptq, edit=spoil)
    _, packed_dir = quantized.quantize(model_dir, tmp_path, spoiled, is_quantized)
    with pytest.raises(WeightLoadError) as caught:
        load_model(ModelConfig.from_pretrained(packed_dir), packed_dir, quantization="gptq")
    assert re.search(r"qkv_proj.scales \[128, 4\], made of .*k_proj.scales", str(caught.value))
    assert re.search(r"down_proj.scales \[2, 64\] into .*: .*\(64, 6\), the checkpoint has", str(caught.value))


def test_early_gptq_checkpoints_have_biases_of_zeros(tmp_path: Path) -> None:
    def add_biases(tensors: quantized.Tensors) -> None:
        tensors["model.layers.0.mlp.down_proj.bias"] = torch.full((64,), bias)

    model_dir = make_tiny("LlamaForCausalLM", tmp_path / "model", **SIZES)
    for bias in (0.0, 1.0):
        stored = Format("biases", GPTQ, quantized.gptq, edit=add_biases)
        _, packed_dir = quantized.quantize(model_dir, tmp_path / str(bias), stored, is_quantized)
        config = ModelConfig.from_pretrained(packed_dir)
        if bias:
            with pytest.raises(WeightLoadError, match=r"have no place in the model:\n  .*down_proj.bias"):
                load_model(config, packed_dir)
        else:
            load_model(config, packed_dir)


def test_layers_that_are_not_converted_stay_as_they_are(model_dir: str, tmp_path: Path) -> None:
    settings = AWQ | {"modules_to_not_convert": ["self_attn"]}
    stored = Format("partly", settings, quantized.awq, symmetric=False)
    plain, packed_dir = quantized.quantize(
        model_dir, tmp_path, stored, lambda name: is_quantized(name) and "self_attn" not in name
    )
    assert_close(engine_logprobs(packed_dir), PlainModel(plain).logprobs(PROMPTS), 1e-3)
