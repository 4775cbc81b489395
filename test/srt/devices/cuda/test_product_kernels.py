"""Products with quantized weights, and experts, in Triton's interpreter against plain torch, and compiled."""

from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch

from closeness import check_close
from rtp_llm.srt.kernels import packed, reference
from triton_compile import check_compiled, launches_of
from triton_process import compiled, interpreted

FORMS = ["int8", "int4", "int4-zeros", "uint8", "uint8-zeros", "fp8", "fp8-block", "table"]
FP8_ROWS = ["fp8-rows", "fp8-rows-block"]  # rows are in fp8 as well


def module(name: str) -> Any:
    return import_module(f"rtp_llm.srt.devices.cuda.{name}")


def weights(form: str, outputs: int, inputs: int, group_size: int) -> tuple[Any, Any]:
    """The same random weight as Triton's and as the plain one."""
    ours = module("packed")
    if form == "int8":
        numbers, scales = torch.randint(-127, 128, (outputs, inputs)).to(torch.int8), torch.rand(outputs) / 100
        return ours.TritonInt8(numbers, scales), packed.PlainInt8(numbers, scales)
    scales = torch.rand(outputs, -(-inputs // group_size)) / 50
    if form.startswith(("int4", "uint8")):
        bits = 4 if form.startswith("int4") else 8
        numbers = torch.randint(0, 256, (outputs, inputs * bits // 8)).to(torch.uint8)
        zeros = torch.randint(0, 1 << bits, scales.shape).to(torch.uint8) if form.endswith("zeros") else None
        args = (numbers, scales, zeros, group_size, bits)
        return ours.TritonGroups(*args), packed.PlainGroups(*args)
    if form == "table":
        codes, table = torch.randint(0, 256, (outputs, inputs // 2)).to(torch.uint8), torch.randn(16).half().float()
        return ours.TritonCodes(codes, scales, group_size, table), packed.PlainCodes(codes, scales, group_size, table)
    if form.startswith("fp8-rows"):
        numbers = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
        return ours.TritonFp8(numbers, scales, group_size), RoundedInputs(numbers, scales, group_size)
    numbers = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    numbers[0, :3] = torch.tensor([448.0, 2.0**-9, -0.0]).to(torch.float8_e4m3fn)
    return ours.TritonCodes(numbers, scales, group_size), packed.PlainCodes(numbers, scales, group_size)


class RoundedInputs(packed.PlainCodes):
    """``reference.linear_fp8``."""

    def apply(self, x: torch.Tensor, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:
        product = reference.linear_fp8(x, self.weight, self.scales, self.group_size)
        return (product if bias is None else product + bias.float()).to(out_dtype or x.dtype)


def sizes(form: str) -> tuple[int, int, int]:
    """Outputs, inputs and the group size."""
    if form in ("int8", "fp8", "fp8-rows"):
        return 70, 330, 330
    return (70, 384, 128) if form.endswith("-block") else (70, 352, 32)


def quick_if(is_quick: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=[] if is_quick else [pytest.mark.slow])


@interpreted
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        quick_if(dtype == torch.float32 or form in ("int4-zeros", "fp8-rows"), form, dtype)
        for form in (*FORMS, *FP8_ROWS)
        for dtype in (torch.float32, torch.float16)
    ],
)
def test_quantized_products(form: str, dtype: torch.dtype) -> None:
    outputs, inputs, group_size = sizes(form)
    ours, plain = weights(form, outputs, inputs, group_size)
    bias = torch.randn(outputs, dtype=dtype)
    for num_rows in (0, 1, 5, 67):
        x = torch.randn(num_rows, inputs, dtype=dtype)
        for of_outputs in (None, bias):
            check_close(ours.apply(x, of_outputs), plain.apply(x, of_outputs))
    x = torch.randn(2, 3, inputs, dtype=dtype)
    check_close(ours.apply(x, bias, torch.float32), plain.apply(x, bias, torch.float32), float32=1e-3)
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(ours.rows(ids), plain.rows(ids))


@interpreted
@pytest.mark.parametrize("form", ["int8", "int4-zeros", "fp8", *FP8_ROWS])
def test_inputs_are_split(form: str) -> None:
    """Few outputs and many inputs: several programs share the inputs."""
    ours, plain = weights(form, 40, 4096, {"int4-zeros": 64, "fp8-rows-block": 128}.get(form, 4096))
    x, bias = torch.randn(3, 4096), torch.randn(40)
    linear = module("kernels.linear")
    assert linear._num_splits(1, 4096 // 64) > 1
    check_close(ours.apply(x, bias), plain.apply(x, bias), float32=3e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantized_rows(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 5000, dtype=dtype)
    x[0, 1], x[1, 2, 7] = 0.0, torch.nan
    for ours, expected in zip(module("kernels.linear").quantize_rows(x), reference.quantize_rows(x), strict=True):
        assert torch.equal(ours.nan_to_num(5.0), expected.nan_to_num(5.0))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "group_size"), [(330, 330), (5000, 5000), (330, 128), (4608, 128), (64, 64)])
def test_rows_in_fp8_are_those_of_plain_torch(size: int, group_size: int, dtype: torch.dtype) -> None:
    """To the last bit: numbers between two of the format, subnormal ones, and those that are none."""
    x = torch.randn(9, size, dtype=dtype) * torch.logspace(-3, 2, 9, dtype=dtype)[:, None]
    x[0, :60] = torch.linspace(-8e-4, 8e-4, 60, dtype=dtype)
    x[1], x[2, 7], x[3, 5] = 0.0, torch.nan, torch.inf
    x[4, :50], x[4, 50] = torch.arange(50) / 16, 448.0
    values, scales = module("kernels.linear").quantize_rows_fp8(x, group_size)
    expected, expected_scales = reference.quantize_rows_fp8(x, group_size)
    assert torch.equal(scales.nan_to_num(5.0), expected_scales.nan_to_num(5.0))
    is_finite = expected_scales.isfinite().repeat_interleave(group_size, 1)[:, :size]
    assert torch.equal(values.float()[is_finite], expected.float()[is_finite])


@interpreted
def test_which_weights_in_fp8_multiply_rows_in_fp8() -> None:
    """Those of checkpoints that are made for it, on GPUs that have such products."""
    numbers, (ours, provider) = torch.zeros(16, 256).to(torch.float8_e4m3fn), (module("packed"), module("provider"))

    def form(rounds: bool, group_size: int) -> Any:
        scales = torch.ones(16, 256 // group_size)
        return type(provider.CudaProvider("cuda").pack_fp8(numbers, scales, group_size, rounds))

    assert form(True, 256) is form(True, 128) is form(True, 64) is ours.TritonFp8
    assert form(False, 256) is form(False, 128) is form(True, 32) is ours.TritonCodes
    with patch.object(module("kernels.gpu"), "multiplies_fp8", lambda: False):
        assert form(True, 128) is ours.TritonCodes


QUICK_EXPERTS = ("dense", "int8", "int4-zeros", "table", "fp8-block", "fp8-rows-block")


@interpreted
@pytest.mark.parametrize("form", [quick_if(form in QUICK_EXPERTS, form) for form in ("dense", *FORMS, *FP8_ROWS)])
def test_experts(form: str) -> None:
    ours_module, (outputs, inputs, group_size) = module("packed"), sizes(form)
    if form == "dense":
        weight = torch.randn(5, outputs, inputs)
        ours, plain = ours_module.TritonDenseExperts(weight), packed.PlainExperts(weight)
    else:
        inputs = -(-inputs // 16) * 16
        group_size = inputs if form in ("int8", "fp8", "fp8-rows") else group_size
        pairs = [weights(form, 80, inputs, group_size) for _ in range(5)]
        outputs = 80
        if form == "table":
            table = pairs[0][0].table
            pairs = [tuple(type(w)(w.weight, w.scales, group_size, table) for w in pair) for pair in pairs]
        assert ours_module.TritonExperts.are_alike([ours for ours, _ in pairs])
        ours = ours_module.TritonExperts([ours for ours, _ in pairs])
        plain = packed.OneByOne([plain for _, plain in pairs])
    bias = torch.randn(5, outputs)
    for counts in ([1, 0, 3, 0, 0], [0, 0, 0, 0, 1], [40, 17, 0, 1, 100]):
        x, rows = torch.randn(sum(counts), inputs), torch.tensor(counts)
        for of_outputs in (None, bias):
            check_close(ours.apply(x, rows, of_outputs), plain.apply(x, rows, of_outputs), float32=3e-5)


@interpreted
def test_experts_of_several_forms_are_not_alike() -> None:
    are_alike = module("packed").TritonExperts.are_alike
    a, b = weights("int4", 16, 64, 32)[0], weights("int4-zeros", 16, 64, 32)[0]
    assert are_alike([a, a]) and not are_alike([a, b]) and not are_alike([a, weights("int4", 16, 64, 32)[1]])
    narrow = weights("int4", 16, 64, 8)
    assert module("packed").or_plain(*narrow) is narrow[1]
    assert module("packed").or_plain(a, b) is a


@interpreted
@pytest.mark.parametrize(
    ("is_sigmoid", "dtype"),
    [
        (False, torch.float32),
        (True, torch.float16),
        quick_if(False, False, torch.float16),
        quick_if(False, True, torch.float32),
    ],
)
def test_routing(is_sigmoid: bool, dtype: torch.dtype) -> None:
    for num_experts, top_k, groups, best_groups in [(1, 1, 1, 1), (12, 3, 1, 1), (60, 4, 6, 2), (40, 9, 5, 5)]:
        logits = torch.stack([torch.randperm(num_experts) for _ in range(5)]).to(dtype) / 7 - 2  # no two equal
        for bias in (None, torch.randn(num_experts)):
            for renormalize in (False, True):
                args = (logits, top_k, is_sigmoid, renormalize, bias, groups, best_groups, 2.5)
                (weights, ids), expected = module("kernels.routing").route(*args), reference.route(*args)
                assert torch.equal(ids, expected[1])
                check_close(weights, expected[0])


@interpreted
def test_routing_of_what_is_not_finite_stays_among_experts() -> None:
    logits = torch.full((2, 6), torch.nan)
    logits[1], logits[1, 3] = -torch.inf, 1.0
    weights, ids = module("kernels.routing").route(logits, 4)
    assert sorted(ids[0].tolist()) == [0, 1, 2, 3] and sorted(ids[1].tolist()) == [0, 1, 2, 3]
    assert weights[0].isnan().all() and weights[1].tolist() == [1.0, 0.0, 0.0, 0.0]


@interpreted
@pytest.mark.parametrize("few_ids", [0, 2048])
def test_rows_by_expert(few_ids: int) -> None:
    moe = module("kernels.moe")
    with patch.object(moe, "FEW_IDS", few_ids):
        for num_ids, num_groups in [(0, 3), (1, 1), (130, 5), (700, 130), (300, 64)]:
            ids = torch.randint(0, num_groups, (num_ids,))
            results = moe.group_rows(ids, num_groups)
            for ours, expected in zip(results, reference.group_rows(ids, num_groups), strict=True):
                assert torch.equal(ours, expected)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_gathered_and_summed(dtype: torch.dtype) -> None:
    moe, x, order = module("kernels.moe"), torch.randn(7, 1100, dtype=dtype), torch.randperm(21)
    assert torch.equal(moe.gather_rows(x, order, 3), reference.gather_rows(x, order, 3))
    rows, weights = torch.randn(21, 1100, dtype=dtype), torch.rand(7, 3)
    check_close(moe.sum_rows(rows, order, weights), reference.sum_rows(rows, order, weights))


def launch_form(form: str, dtype: torch.dtype) -> None:
    """Products of one row, of a batch, and of a long prompt, with a weight of [4096, 4096]; and experts."""
    ours = module("packed")
    inputs, group_size = 4096, 4096 if form in ("int8", "fp8", "fp8-rows") else 128
    weight = weights(form, 512, inputs, group_size)[0]
    for num_rows in (1, 32, 64, 4096):
        weight.apply(torch.zeros(num_rows, inputs, dtype=dtype), torch.zeros(512, dtype=dtype))
    experts = ours.TritonExperts([weight] * 8)
    for num_rows in (16, 4096):
        experts.apply(torch.zeros(num_rows, inputs, dtype=dtype), torch.zeros(8, dtype=torch.int64))


def launch_dense(dtype: torch.dtype) -> None:
    experts = module("packed").TritonDenseExperts(torch.zeros(8, 512, 2048, dtype=dtype))
    for num_rows in (16, 256, 4096):
        experts.apply(torch.zeros(num_rows, 2048, dtype=dtype), torch.zeros(8, dtype=torch.int64))


def instruction(launch: Any, capability: int) -> str | None:
    """What a product must use: the tensor cores."""
    if launch.kernel.fn.__name__ != "product_kernel":
        return None
    return {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: None}[capability]


@compiled
def test_experts_of_16_bits_compile() -> None:
    launches = launches_of(lambda: launch_dense(torch.bfloat16))
    check_compiled(launches[-1], 90, "wgmma")


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("form", ["dense", *FORMS])
def test_products_compile(form: str, capability: int) -> None:
    dtype = torch.bfloat16
    with patch.object(module("kernels.linear"), "generation", lambda: capability // 10):
        launches = launches_of(lambda: launch_dense(dtype) if form == "dense" else launch_form(form, dtype))
    assert len(launches) > 2
    for launch in launches:
        check_compiled(launch, capability, instruction(launch, capability))


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("capability", [89, 90, 100])
@pytest.mark.parametrize("form", FP8_ROWS)
def test_products_of_fp8_with_fp8_compile(form: str, capability: int) -> None:
    with patch.object(module("kernels.linear"), "generation", lambda: capability // 10):
        launches = launches_of(lambda: launch_form(form, torch.bfloat16))
    assert len(launches) > 3
    for launch in launches:
        made = check_compiled(launch, capability, instruction(launch, capability))
        if launch.kernel.fn.__name__ == "product_kernel" and capability < 100:
            assert ".e4m3.e4m3" in made.ptx, "both factors are in fp8"


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_sorting_compiles(capability: int) -> None:
    moe, column, route = module("kernels.moe"), torch.zeros(256, dtype=torch.int64), module("kernels.routing").route
    rows = torch.zeros(256, 2048, dtype=torch.bfloat16)

    def call() -> None:
        route(torch.zeros(8, 128, dtype=torch.bfloat16), 8, renormalize=True)
        route(torch.zeros(8, 256), 8, True, True, torch.zeros(256), 8, 4)
        moe.group_rows(column, 128)
        moe.group_rows(torch.zeros(65536, dtype=torch.int64), 128)
        moe.gather_rows(rows, column, 8)
        moe.sum_rows(rows, column, torch.zeros(32, 8))

    for launch in launches_of(call):
        check_compiled(launch, capability)
