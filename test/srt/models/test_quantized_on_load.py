"""``quantization=`` of any checkpoint: the engine answers as transformers does on weights rounded the same way."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rtp_llm import Engine
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import DEMO_MODEL, QUANTIZATIONS, ServerArgs
from rtp_llm.srt.kernels.reference import dequantize_int4, quantize_rows
from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.quantization.base import stored_bytes
from rtp_llm.srt.layers.quantization.int4 import GROUP_SIZES, quantize_int4
from rtp_llm.srt.layers.quantization.on_load import OnLoadLinearMethod, quantize_int8
from rtp_llm.srt.layers.quantization.registry import SCHEMES
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.worker.worker import Worker, WorkerConfig
from tiny_models import make_tiny, random_prompts
from tiny_seeing import make_seeing

SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=172, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
)
ROUTERS = ("gate", "kv_b_proj")  # what stays as it is
PROMPTS = [random_prompts(40, [30])[0], random_prompts(41, [9])[0]]


def rounded(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    if scheme == "int8":
        values, scales = quantize_rows(weight)
        return values.float() * scales
    if scheme == "fp8":
        scales = weight.abs().amax(dim=1, keepdim=True) / 448
        return (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales
    group_size = next(size for least, size in GROUP_SIZES.items() if weight.shape[1] >= least)
    return dequantize_int4(*quantize_int4(weight, group_size), group_size)


def round_rows(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    values, scales = quantize_rows(args[0])
    return (values.float() * scales,)


def quantized_twin(model_dir: str, scheme: str) -> nn.Module:
    """Transformers' model with every weight rounded as the scheme does, and activations where it rounds those."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            if name == "lm_head":
                module.weight.copy_(rounded(module.weight, "int8"))
                module.register_forward_pre_hook(round_rows)
            elif isinstance(module, (nn.Linear, Conv1D)) and last not in ROUTERS:
                weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
                weight.copy_(rounded(weight, scheme))
                if scheme == "int8":
                    module.register_forward_pre_hook(round_rows)
            elif last == "experts":
                for weights in (module.gate_up_proj, module.down_proj):
                    for weight in weights:
                        weight.copy_(rounded(weight, scheme))
    return model


def logprobs_of(model: nn.Module) -> list[torch.Tensor]:
    results = []
    for ids in PROMPTS:
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        results.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return results


@pytest.mark.parametrize(
    ("architecture", "scheme", "config"),
    [
        ("Qwen3ForCausalLM", "int8", {"tie_word_embeddings": True, "head_dim": 16}),
        ("Qwen3ForCausalLM", "int4", {"tie_word_embeddings": True, "head_dim": 16}),
        ("Qwen2ForCausalLM", "int8", {"tie_word_embeddings": False}),
        ("Qwen2ForCausalLM", "fp8", {"tie_word_embeddings": False}),
        ("Qwen3MoeForCausalLM", "fp8", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}),
        ("Phi3ForCausalLM", "int4", {"hidden_size": 256}),
        ("GPT2LMHeadModel", "int4", {}),
        ("Qwen3MoeForCausalLM", "int4", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}),
        ("DeepseekV2ForCausalLM", "int4", {}),
        ("FalconForCausalLM", "int4", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("OPTForCausalLM", "int4", {"word_embed_proj_dim": 32}),
        ("PhiForCausalLM", "int4", SIZES),
    ],
)
def test_answers_are_those_of_rounded_weights(
    architecture: str, scheme: str, config: dict[str, Any], tmp_path: Path
) -> None:
    sizes = SIZES if architecture.startswith(("Qwen", "Phi3")) else {}
    model_dir = make_tiny(architecture, tmp_path, **sizes | config)
    expected = logprobs_of(quantized_twin(model_dir, scheme))
    with Engine(model_path=model_dir, quantization=scheme, max_total_tokens=512, log_level="error") as engine:
        results = engine.generate(
            input_ids=PROMPTS, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
        )
    # An activation that lies between two integers may be rounded either way.
    for result, theirs in zip(results, expected, strict=True):
        ours = torch.tensor([entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)


@pytest.fixture(scope="module")
def demo_texts() -> Iterator[dict[str | None, list[str]]]:
    questions = [f"What is {a} + {b}?" for a, b in ((17, 25), (3, 9), (120, 45), (88, 12))]
    questions += [f"What is the capital of {country}?" for country in ("France", "Italy", "Japan", "Egypt")]
    questions += [f"How many r's are in {word}?" for word in ("strawberry", "mirror", "carrot", "river")]
    prompts = [f"<|user|>{question}<|end|><|assistant|>" for question in questions]
    texts: dict[str | None, list[str]] = {}
    for scheme in (None, "int8", "fp8", "int4"):
        with Engine(model_path=DEMO_MODEL, quantization=scheme, max_total_tokens=2048, log_level="error") as engine:
            results = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 32})
        texts[scheme] = [result["text"] for result in results]
    yield texts


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4"])
def test_the_demo_model_answers_as_before(scheme: str, demo_texts: dict[str | None, list[str]]) -> None:
    same = [ours == theirs for ours, theirs in zip(demo_texts[scheme], demo_texts[None], strict=True)]
    assert sum(same) >= len(same) - 2, demo_texts


def test_weights_take_less_memory() -> None:
    def weight_bytes(scheme: str | None) -> int:
        """Bytes of the language model's weights: the tower stays as it is."""
        config = ModelConfig.from_pretrained(DEMO_MODEL)
        worker = Worker(WorkerConfig(ServerArgs(model_path=DEMO_MODEL, quantization=scheme), config))
        tower = [module for name, module in worker.runner.model.named_modules() if ".visual." in f".{name}."]
        own = {id(module): stored_bytes(module, recurse=False) for module in tower}
        return worker.loaded().weight_bytes - sum(own.values())

    plain, int8, fp8, int4 = (weight_bytes(scheme) for scheme in (None, "int8", "fp8", "int4"))
    assert max(int8, fp8) < 0.6 * plain
    assert int4 < 0.45 * plain


def test_models_that_run_through_transformers_are_not_quantized(tmp_path: Path) -> None:
    model_dir = make_tiny("OlmoForCausalLM", tmp_path, **SIZES)
    with pytest.raises(Exception, match=r"run through transformers are not quantized \(by int8\)"):
        Engine(model_path=model_dir, quantization="int8", model_impl="transformers", log_level="error")


def test_models_that_see_keep_their_encoders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_dir = make_seeing(tmp_path)
    with caplog.at_level("INFO"):
        model = load_model(ModelConfig.from_pretrained(model_dir), model_dir, quantization="int8")
    assert re.search(r"quantized by int8: \d+ layers; \d+ linear ones are not: .*visual\.blocks\.\*\.", caplog.text)
    names = [name for name, module in model.named_modules() if isinstance(module, LinearBase)]
    quantized = [name for name in names if isinstance(model.get_submodule(name).quant_method, OnLoadLinearMethod)]
    assert quantized == [name for name in names if "language_model" in name]
    assert len(quantized) < len(names)


@pytest.mark.parametrize("group_size", [8, 32])
def test_four_bits_are_met_as_well_as_can_be(group_size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 70, generator=generator) * torch.rand(40, 1, generator=generator)
    weight[3] = 0
    weight[5] = 0.25
    values, scales, zeros = quantize_int4(weight, group_size)
    assert scales.shape == zeros.shape == (40, -(-70 // group_size))
    assert torch.equal(scales, scales.bfloat16().float())
    error = dequantize_int4(values, scales, zeros, group_size) - weight
    assert not error[3].any()
    torch.testing.assert_close(error[5], torch.zeros(70), rtol=0, atol=1e-3)
    for start in range(0, 70, group_size):
        group = weight[:, start : start + group_size]
        if group_size == 32:  # the extreme in -8 steps
            steps = group.gather(1, group.abs().argmax(1, keepdim=True)) / -8
            steps, zero = torch.where(steps == 0, 1e-9, steps), torch.tensor(8)
        else:
            low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
            steps = ((high - low) / 15).clamp(min=1e-9)
            zero = (-low / steps).round()
        plain = ((group / steps + zero).round().clamp(0, 15) - zero) * steps  # the whole range in 15 steps
        assert error[:, start : start + group_size].square().sum() < 1.001 * (plain - group).square().sum()


def test_a_weight_that_is_not_a_number_stays_so() -> None:
    weight = torch.ones(2, 64)
    weight[1, 5] = torch.nan
    assert dequantize_int4(*quantize_int4(weight, 32), 32)[1, 5].isnan()
    _, scales = quantize_int8(weight)
    assert scales.isnan().tolist() == [False, True]


def test_the_flag_has_all_schemes() -> None:
    assert set(QUANTIZATIONS) == set(SCHEMES)
