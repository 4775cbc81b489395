"""float16: a model's answers by kernels of that type, unquantized and in 8 bits, beside float32's."""

from pathlib import Path

import pytest
import torch

from rtp_llm import Engine
from rtp_llm.srt.devices.cpu import linear
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.devices.cpu.moe import ExpertPanels
from rtp_llm.srt.kernels.packed import PackedExperts
from rtp_llm.srt.layers.moe import Experts
from tiny_models import TINY_MODELS, make_tiny, random_prompts, tiny_model

NEW_TOKENS = 9  # the last of these decode steps are replayed


def logprobs(model: str, dtype: str, quantization: str | None = None) -> torch.Tensor:
    """Return those of the prompts' tokens, and of the new tokens in float32's place."""
    prompts = random_prompts(TINY_MODELS[model].vocab_size, (40, 17, 31))
    options = {"quantization": quantization} if quantization else {}
    with Engine(
        model_path=tiny_model(model),
        dtype=dtype,
        device="cpu",
        skip_tokenizer_init=True,
        max_total_tokens=512,
        **options,
    ) as engine:
        results = engine.generate(
            input_ids=prompts,
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0,
        )
    assert all(len(result["output_ids"]) == NEW_TOKENS for result in results)
    return torch.tensor([entry[0] for result in results for entry in result["meta_info"]["input_token_logprobs"][1:]])


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_nearer_to_float32_than_bfloat16(quantization: str | None) -> None:
    """In 8 bits, where rows are quantized, too, about as near."""
    whole, half, brain = (
        logprobs("qwen3-default", dtype, quantization) for dtype in ("float32", "float16", "bfloat16")
    )
    error, other = (half - whole).abs().mean(), (brain - whole).abs().mean()
    assert error < (1.5 * other + 1e-2 if quantization else 0.5 * other)


@pytest.mark.skipif(not kernels_work(), reason="there is no C++ compiler")
def test_weights_stay_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    pack = linear.Float16Panels.__init__

    def noted(self: linear.Float16Panels, weight: torch.Tensor) -> None:
        pack(self, weight)
        packed.append(self.packed.dtype)

    monkeypatch.setattr(linear.Float16Panels, "__init__", noted)
    logprobs("qwen3-default", "float16")
    assert packed and set(packed) == {torch.float16}


@pytest.mark.skipif(not kernels_work(), reason="there is no C++ compiler")
def test_experts_have_kernels(tmp_path: Path) -> None:
    """A mixture's log-probabilities are nearer to float32's than those of bfloat16, and its experts are packed."""
    model_dir, found = make_tiny("Qwen3MoeForCausalLM", tmp_path), {}
    for dtype in ("float32", "float16", "bfloat16"):
        with Engine(
            model_path=model_dir, dtype=dtype, device="cpu", skip_tokenizer_init=True, inline=True, max_total_tokens=512
        ) as engine:
            model = engine._runner.core.executor.worker.runner.model
            packed = [each for module in model.modules() if isinstance(module, Experts) for each in packed_of(module)]
            results = engine.generate(
                input_ids=random_prompts(90, (40, 17, 31)),
                sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
                return_logprob=True,
                logprob_start_len=0,
            )
        assert packed and all(isinstance(each, ExpertPanels) == (dtype != "float32") for each in packed)
        told = [entry[0] for result in results for entry in result["meta_info"]["input_token_logprobs"][1:]]
        found[dtype] = torch.tensor(told)
    errors = [(found[dtype] - found["float32"]).abs().median() for dtype in ("float16", "bfloat16")]
    assert errors[0] < 0.5 * errors[1]


def packed_of(module: Experts) -> list[PackedExperts]:
    return list(module.packed.values())
