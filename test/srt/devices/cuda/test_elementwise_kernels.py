"""Norms, gates, rotations and writes to the cache: in Triton's interpreter against plain torch, and compiled."""

from importlib import import_module
from typing import Any

import pytest
import torch

from closeness import check_close
from rtp_llm.srt.kernels import recurrent, reference
from triton_compile import check_compiled, launches_of
from triton_process import compiled, interpreted

HALVES = [torch.float32, torch.float16]


def kernels(module: str) -> Any:
    return import_module(f"rtp_llm.srt.devices.cuda.kernels.{module}")


def strided(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers in a part of a wider tensor's last dimension."""
    return torch.randn(*shape[:-1], shape[-1] + 5, dtype=dtype)[..., 2:-3] * 3


@interpreted
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["rms_norm", "gemma_rms_norm", "layer_norm"])
def test_norms(name: str, dtype: torch.dtype) -> None:
    norms = kernels("norms")
    for shape in [(1, 1), (3, 100), (2, 5, 33), (1, 2500), (0, 8)]:
        x, residual = strided(*shape, dtype=dtype), strided(*shape, dtype=dtype)
        weight, bias = torch.randn(2, shape[-1], dtype=dtype)
        for last in [(weight, bias, 1e-5), (weight, None, 1e-5)] if name == "layer_norm" else [(weight, 1e-5)]:
            check_close(getattr(norms, name)(x, *last), getattr(reference, name)(x, *last))
            results = getattr(norms, f"add_{name}")(x, residual, *last)
            for result, expected in zip(results, getattr(reference, f"add_{name}")(x, residual, *last), strict=True):
                check_close(result, expected)


@interpreted
@pytest.mark.parametrize("dtype", HALVES)
def test_gated_norms(dtype: torch.dtype) -> None:
    norms = kernels("norms")
    x, gate, weight = strided(3, 60, dtype=dtype), torch.randn(3, 60, dtype=dtype), torch.randn(60, dtype=dtype)
    for group_size, first, act in [(60, False, "silu"), (20, True, "silu"), (12, False, "sigmoid")]:
        args = (x, gate, weight, 1e-5, group_size, first, act)
        check_close(norms.gated_rms_norm(*args), recurrent.gated_rms_norm(*args))


@interpreted
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "swiglu_oai_and_mul"])
def test_gated_activations(name: str, dtype: torch.dtype) -> None:
    gates, last = kernels("gates"), (1.702, 4.0) if name == "swiglu_oai_and_mul" else ()
    for shape in [(1, 2), (3, 74), (2, 2, 2060), (0, 8)]:
        x = strided(*shape, dtype=dtype)
        check_close(getattr(gates, name)(x, *last), getattr(reference, name)(x, *last))
    x[..., :1] = torch.nan
    check_close(getattr(gates, name)(x, *last), getattr(reference, name)(x, *last))


@interpreted
@pytest.mark.parametrize("dtype", HALVES)
def test_sigmoid_gates(dtype: torch.dtype) -> None:
    x, gate = strided(3, 60, dtype=dtype), torch.randn(3, 4, 15, dtype=dtype)
    check_close(kernels("gates").sigmoid_gate(x, gate), recurrent.sigmoid_gate(x, gate))


@interpreted
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("is_neox_style", [True, False])
def test_rotations(is_neox_style: bool, dtype: torch.dtype) -> None:
    rotary = kernels("rotary")
    for num_tokens, q_heads, k_heads, size, half in [(3, 5, 2, 64, 32), (1, 4, 4, 80, 20), (2, 33, 1, 48, 24)]:
        wide = strided(num_tokens, (q_heads + k_heads) * size, dtype=dtype)
        q, k = (x.unflatten(1, (-1, size)) for x in wide.split([q_heads * size, k_heads * size], dim=1))
        angles = torch.rand(num_tokens, half) * 6
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        weights = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
        pairs = [
            (rotary.rotary_pair(q, k, cos, sin, is_neox_style), reference.rotary_pair(q, k, cos, sin, is_neox_style))
        ]
        for is_gemma in (True, False):
            args = (q, k, weights, 1e-6, cos, sin, is_neox_style, is_gemma)
            pairs.append((rotary.norm_rotary_pair(*args), reference.norm_rotary_pair(*args)))
        for results, expected in pairs:
            check_close(results[0], expected[0])
            check_close(results[1], expected[1])


@interpreted
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("latent", [False, True])
def test_writes_to_the_cache(stored: torch.dtype, latent: bool) -> None:
    if latent and stored == torch.int8:
        return  # no latent cache is of int8
    k, v = torch.randn(3, 7 * 40).unflatten(1, (7, 40)), None if latent else torch.randn(3, 7, 24)
    if stored == torch.int8:
        k[1, 2], k[0, 1, 3] = 0.0, torch.nan
    caches = []
    for write in (kernels("cache").write_kv, reference.write_kv):
        keys = torch.zeros(9, 7, 40, dtype=stored)
        values = keys[..., :24] if latent else torch.zeros(9, 7, 24, dtype=stored)
        scales = [torch.zeros(9, 7) for _ in "kv"] if stored == torch.int8 else []
        write(k, v, keys, values, torch.tensor([4, 8, 1]), *scales)
        caches.append([keys, values, *scales])
    for ours, expected in zip(*caches, strict=True):
        check_close(ours, expected, float32=1e-6)


def call_all(dtype: torch.dtype) -> None:
    """What a model of 4,096 channels and a head size of 128 launches."""
    norms, gates, rotary, cache = (kernels(name) for name in ("norms", "gates", "rotary", "cache"))
    for size in (128, 4096, 16384):
        x, weight = torch.zeros(8, size, dtype=dtype), torch.zeros(size, dtype=dtype)
        norms.add_rms_norm(x, x, weight, 1e-6)
        norms.gemma_rms_norm(x, weight, 1e-6)
        norms.add_layer_norm(x, x, weight, weight, 1e-6)
        norms.gated_rms_norm(x, x, weight, 1e-6, 128)
    wide = torch.zeros(8, 4096, dtype=dtype)
    for activation in (gates.silu_and_mul, gates.gelu_and_mul, gates.gelu_tanh_and_mul):
        activation(wide)
    gates.swiglu_oai_and_mul(wide, 1.702, 7.0)
    gates.sigmoid_gate(wide, wide)
    q, k = torch.zeros(8, 32, 128, dtype=dtype), torch.zeros(8, 8, 128, dtype=dtype)
    cos, weight = torch.zeros(8, 64, dtype=dtype), torch.zeros(128, dtype=dtype)
    rotary.rotary_pair(q, k, cos, cos, False)
    rotary.norm_rotary_pair(q, k, (weight, weight), 1e-6, cos, cos, True, False)
    keys = torch.zeros(32, 8, 128, dtype=dtype)
    cache.write_kv(k, k, keys, keys, torch.arange(8))
    numbers, scales = keys.to(torch.int8), torch.zeros(32, 8)
    cache.write_kv(k, k, numbers, numbers, torch.arange(8), scales, scales)


@compiled
def test_one_norm_compiles() -> None:
    norms, weight = kernels("norms"), torch.zeros(4096, dtype=torch.bfloat16)
    x = torch.zeros(8, 4096, dtype=torch.bfloat16)
    (launch,) = launches_of(lambda: norms.add_rms_norm(x, x, weight, 1e-6))
    assert "ld.global.v4" in check_compiled(launch, 90).ptx  # 16 bytes at a time


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_everything_compiles(dtype: torch.dtype, capability: int) -> None:
    launches = launches_of(lambda: call_all(dtype))
    assert len(launches) > 18
    for launch in launches:
        check_compiled(launch, capability)


@compiled
def test_the_device_has_these_kernels() -> None:
    from rtp_llm.srt.devices.cuda.triton_provider import KERNELS, TritonProvider

    provider = TritonProvider("cuda")
    for name, module in KERNELS.items():
        assert provider.pick(name, torch.bfloat16) is getattr(kernels(module), name)
    assert provider.pick("rms_norm", torch.float64) is reference.rms_norm
