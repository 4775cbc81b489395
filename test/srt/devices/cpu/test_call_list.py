"""Calls of kernels from a list, without Python between them."""

import gc

import pytest
import torch

from rtp_llm.srt.devices.cpu.attention import write_kv
from rtp_llm.srt.devices.cpu.binding import FLOAT, INT, INT64, POINTER, address, bind, noted_calls
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.devices.cpu.call_list import CallList, listed

pytestmark = pytest.mark.skipif(not kernels_work(), reason="needs compiled kernels")

NORM = (*(POINTER,) * 6, *(INT64,) * 6, FLOAT)


def recorded(function, *args):
    """The call of a kernel as a step's recording notes it."""
    calls = []
    with noted_calls(lambda name, function, args, result: calls.append((function, args, result))):
        function(*args)
    return calls[0]


def norm_call(x, y):
    """RMSNorm of the rows of x [rows, size] into y, with an epsilon that is seen in the result."""
    weight = torch.ones(x.shape[-1])
    norm_call.kept.append(weight)
    rows, size = x.shape
    norm = bind("elementwise_f32", "rms_norm_f32", *NORM)
    return recorded(norm, address(x), None, address(weight), None, address(y), None, rows, 1, size, 0, 0, size, 0.5)


norm_call.kept = []


def group_call(ids, counts):
    order, places = torch.empty_like(ids), torch.empty_like(ids)
    norm_call.kept += [order, places]
    group = bind("moe", "group_rows", POINTER, INT64, INT64, POINTER, POINTER, POINTER, result=INT)
    return recorded(group, address(ids), len(ids), len(counts), address(counts), address(order), address(places))


def test_a_list_makes_its_calls_with_all_their_arguments():
    x, y, z = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)), torch.zeros(3, 40), torch.zeros(3, 40)
    calls = [norm_call(x, y), norm_call(y, z)]
    expected = z.clone()
    y.zero_(), z.zero_()
    CallList(calls)()
    torch.testing.assert_close(z, expected, rtol=0, atol=0)
    torch.testing.assert_close(y, x * (x.square().mean(-1, keepdim=True) + 0.5).rsqrt())


def test_calls_read_what_is_in_memory_when_the_list_is_run():
    ids, counts = torch.tensor([2, 0, 2]), torch.zeros(3, dtype=torch.int64)
    calls = CallList([group_call(ids, counts)])
    ids.copy_(torch.tensor([1, 1, 0]))
    calls()
    assert counts.tolist() == [1, 2, 0]


def test_a_list_keeps_the_structures_that_kernels_take_by_reference():
    k, slots = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 1])
    keys, values = torch.zeros(4, 1, 8), torch.zeros(4, 1, 8)
    joined = listed([recorded(write_kv, k, k, keys, values, slots)] * 2)
    assert [isinstance(function, CallList) for function, _, _ in joined] == [True]
    keys.zero_(), gc.collect()
    joined[0][0]()
    torch.testing.assert_close(keys[slots], k, rtol=0, atol=0)


def test_a_list_ends_at_a_result_that_is_not_the_recorded_one():
    ids, counts = torch.tensor([2, 0, 2]), torch.zeros(3, dtype=torch.int64)
    x, y = torch.ones(1, 40), torch.zeros(1, 40)
    calls = CallList([group_call(ids, counts), norm_call(x, y)])
    ids[0] = 3  # there are three groups: refused
    y.zero_()
    with pytest.raises(RuntimeError, match="group_rows of a replayed step returned another result than 1"):
        calls()
    assert not y.any()


def test_other_calls_stay_between_lists():
    x, y = torch.ones(1, 40), torch.zeros(1, 40)
    kernel, other = norm_call(x, y), (torch.Tensor.zero_, (y,), y)
    joined = listed([kernel, kernel, other, kernel])
    assert [isinstance(function, CallList) for function, _, _ in joined] == [True, False, True]
    assert joined[1] is other


def test_kernels_of_a_decode_step_are_called_from_lists():
    """Every kernel that models of common forms use in each layer says REPLAYED in its source."""
    names = {
        "gemm": ("gemm_bf16", "grouped_gemm_bf16"),
        "gemm_int8": ("gemm_int8", "grouped_gemm_int8"),
        "gemm_codes": ("gemm_codes",),
        "gemm_blocks": ("gemm_blocks", "grouped_gemm_blocks"),
        "attention": ("paged_attention", "write_kv"),
        "elementwise": ("rms_norm_bf16", "layer_norm_bf16", "rotary_bf16", "rms_norm_rotary_bf16", "silu_and_mul_bf16"),
        "gemm_f16": ("gemm_f16",),
        "gemm_f32": ("gemm_f32",),
        "attention_f16": ("paged_attention", "write_kv"),
        "elementwise_f16": ("rms_norm_f16", "layer_norm_f16", "rotary_f16", "silu_and_mul_f16"),
        "moe": ("group_rows", "gather_rows", "sum_rows_bf16", "sum_rows_f16"),
        "recurrent": ("causal_conv1d_bf16", "delta_gates_bf16", "gated_rms_norm_bf16", "sigmoid_gate_bf16"),
        "state_matrix": ("gated_delta_rule_bf16", "linear_attention_bf16", "ssd_bf16"),
    }
    alone = [
        f"{file}.{name}" for file, all_of in names.items() for name in all_of if not bind(file, name)._function.in_lists
    ]
    assert alone == []


def test_types_of_one_binding_do_not_change_another():
    first = bind("moe", "group_rows", POINTER, INT64, INT64, POINTER, POINTER, POINTER, result=INT)
    bind("moe", "group_rows")
    assert first._function.restype is INT and len(first._function.argtypes) == 6
