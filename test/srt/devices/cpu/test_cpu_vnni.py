"""Products of bytes by AVX-VNNI, on processors that have the same instructions as a part of AVX-512."""

import pytest
import torch

from emulated import compile_quickly
from rtp_llm.srt.devices.cpu import blocks, build, linear
from rtp_llm.srt.devices.cpu.blocks import LAYOUTS, BlockPanels
from rtp_llm.srt.devices.cpu.linear import Int8Panels, PanelWeight
from rtp_llm.srt.platform import cpu_flags

FUNCTIONS = (build.load, linear._function, blocks._function)
HIDDEN = ("AVX512F", "AVX512BW", "AVX512BF16", "AVX512VBMI")  # kernels take registers of 256 bits
FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mavx512vl", "-mavx512vnni", *(f"-U__{name}__" for name in HIDDEN))


def use(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setattr(build, "isa", lambda: isa)
    for function in FUNCTIONS:
        function.cache_clear()


@pytest.mark.skipif(
    build.compiler() is None or not cpu_flags() >= {"avx512_vnni", "avx512vl"},
    reason="there is no compiler, or no AVX-512 with VNNI",
)
def test_products_are_those_of_avx2(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(build.ISAS, "avx2_vnni", ((), FLAGS))
    compile_quickly(("avx2", "avx2_vnni"), request.config, monkeypatch)
    use(monkeypatch, "avx2")
    weights: dict[str, PanelWeight] = {
        "int8": Int8Panels(torch.randint(-128, 128, (70, 300), dtype=torch.int8), torch.rand(70))
    }
    for name in ("Q4_0", "Q8_0", "Q2_K", "Q6_K", "IQ4_NL", "INT4_128", "INT4_128_ZEROS"):
        row_bytes = -(-300 // LAYOUTS[name].num_values) * LAYOUTS[name].num_bytes
        weights[name] = BlockPanels(torch.randint(8, 56, (70, row_bytes), dtype=torch.uint8), name, 300)
    rows = [torch.randn(count, 300).bfloat16() for count in (1, 2, 3, 4, 6, 7, 40)]
    results = [[weight.apply(x, out_dtype=torch.float32) for x in rows] for weight in weights.values()]
    use(monkeypatch, "avx2_vnni")
    try:
        for name, weight, expected in zip(weights, weights.values(), results, strict=True):
            for x, result in zip(rows, expected, strict=True):
                difference = (weight.apply(x, out_dtype=torch.float32) - result).abs().max() / result.abs().max()
                assert difference < 1e-6, (name, len(x))
    finally:
        for function in FUNCTIONS:
            function.cache_clear()
