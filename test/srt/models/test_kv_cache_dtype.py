"""Caches in bfloat16 and int8: half and a quarter of float32, and answers that hardly differ."""

from typing import Any

import pytest
import torch

from rtp_llm import Engine
from rtp_llm.srt.cache.spec import CacheSpec
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.worker.layout import stored_as
from tiny_models import TINY_MODELS, random_prompts, tiny_model

MODELS = ["llama-default", "qwen3-mixed-window7-tied"]
# How far log-probabilities may be off, in units of their own spread: at most, and on average. A key's components are
# off by up to 2^-9 of themselves in bfloat16, and in int8 by 1/254 of the largest one.
TOLERANCE = {"bf16": (0.03, 0.008), "int8": (0.08, 0.02)}
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not kernels_work(), reason="there is no C++ compiler")),
    "torch_native",
]


def engine(name: str, **options: Any) -> Engine:
    return Engine(
        model_path=tiny_model(name), device="cpu", skip_tokenizer_init=True, context_length=256, inline=True, **options
    )


def prompt_logprobs(name: str, **options: Any) -> torch.Tensor:
    """Log-probabilities of prompts computed in chunks, so that most keys are read from the cache."""
    prompts = random_prompts(TINY_MODELS[name].vocab_size, (60, 17))
    options = {"dtype": "float32", "max_total_tokens": 500, **options}
    with engine(name, chunked_prefill_size=8, page_size=4, **options) as ours:
        results = ours.generate(
            input_ids=prompts,
            sampling_params={"temperature": 0, "max_new_tokens": 3, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0,
        )
    return torch.tensor([e[0] for r in results for e in r["meta_info"]["input_token_logprobs"] if e[0] is not None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_cache_dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_answers_hardly_differ(name: str, kv_cache_dtype: str, backend: str) -> None:
    expected = prompt_logprobs(name, attention_backend="torch_native")
    output = prompt_logprobs(name, attention_backend=backend, kv_cache_dtype=kv_cache_dtype)
    difference = (output - expected).abs() / expected.std()
    most, average = TOLERANCE[kv_cache_dtype]
    assert 0 < difference.max() < most and difference.mean() < average


@pytest.mark.skipif(not kernels_work(), reason="there is no C++ compiler")
def test_the_cache_is_smaller() -> None:
    sizes = {}
    for dtype, kv_cache_dtype in (("float32", "auto"), ("float32", "bf16"), ("bfloat16", "auto"), ("bfloat16", "int8")):
        with engine(MODELS[0], dtype=dtype, kv_cache_dtype=kv_cache_dtype, max_total_tokens=500) as ours:
            sizes[dtype, kv_cache_dtype] = ours._runner.core.capacity.cache_bytes
    assert sizes["float32", "bf16"] == sizes["bfloat16", "auto"] == sizes["float32", "auto"] // 2
    # Half, and beside each head of 8 numbers a float: of 16 bytes, 12 are left.
    assert sizes["bfloat16", "int8"] == sizes["bfloat16", "auto"] * 12 // 16


def test_bytes_of_a_token() -> None:
    assert CacheSpec(8, 128, 128, "bfloat16").bytes_per_token == 8 * 256 * 2
    assert CacheSpec(8, 128, 128, "int8").bytes_per_token == 8 * (256 + 8)  # a float for each of keys and values


def test_refusals() -> None:
    latent = CacheSpec(1, 576, 512, "bfloat16", latent=True)
    with pytest.raises(ValueError, match="int8 is not possible for a model with multi-head latent attention"):
        stored_as(latent, "int8", "cpu")
    with pytest.raises(ValueError, match="a latent cache cannot be int8"):
        CacheSpec(1, 576, 512, "int8", latent=True)
    with pytest.raises(ValueError, match="is not for the device cuda, which has auto"):
        stored_as(CacheSpec(1, 8, 8, "bfloat16"), "int8", "cuda")
    with pytest.raises(ValueError, match="saves nothing for a model in float16"):
        stored_as(CacheSpec(1, 8, 8, "float16"), "bf16", "cpu")
    assert stored_as(latent, "bf16", "cpu") is not None and stored_as(latent, "auto", "cuda") is latent
