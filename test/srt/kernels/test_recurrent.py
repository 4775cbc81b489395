"""Kernels that keep a state: against transformers' own functions, and in pieces against the whole."""

import random
from collections.abc import Callable

import pytest
import torch
from recurrent_rows import assert_near, in_pieces, rows_of
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from rtp_llm.srt.kernels import recurrent

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130]
Tokens = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def seed() -> None:
    value = random.randrange(1 << 31)
    print(f"seed {value}")
    torch.manual_seed(value)


def delta_tokens(length: int, by_channel: bool = False) -> Tokens:
    k_heads, v_heads, k_dim, v_dim = (3, 3, 12, 12) if by_channel else (2, 6, 12, 20)
    q, k = (torch.randn(length, k_heads, k_dim) for _ in range(2))
    gates = (length, v_heads, k_dim) if by_channel else (length, v_heads)
    return q, k, torch.randn(length, v_heads, v_dim), -2 * torch.rand(gates), torch.rand(length, v_heads)


def apply_delta(states: torch.Tensor, rows: object, *tokens: torch.Tensor) -> torch.Tensor:
    return recurrent.gated_delta_rule(*tokens, states, rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", LENGTHS)
def test_delta_rule(length: int) -> None:
    tokens = delta_tokens(length)
    batched = [x[None] for x in tokens]
    initial = torch.randn(1, 6, 12, 20)
    options = {"initial_state": initial, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for theirs in (qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule):
        expected, final = theirs(*batched, **options)
        states = torch.cat([torch.zeros_like(initial), initial, torch.zeros_like(initial)])
        assert_near(apply_delta(states, rows_of([length], [1], [2]), *tokens), expected[0])
        assert_near(states[2:], final)
        assert torch.equal(states[1:2], initial)
    step, state = recurrent.delta_rule_step(initial, *batched)
    assert_near(step, expected)
    assert_near(state, final)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_delta_rule_with_gates_of_channels(length: int) -> None:
    tokens = delta_tokens(length, by_channel=True)
    initial = torch.randn(1, 3, 12, 12)
    batched = [x[None] for x in tokens]
    expected, final = kimi.recurrent_kimi_delta_attention(
        *batched, initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    states = torch.cat([torch.zeros_like(initial), initial])
    assert_near(apply_delta(states, rows_of([length], [1], [1]), *tokens), expected[0])
    assert_near(states[1:], final)
    closed, _ = kimi.chunk_kimi_delta_attention(*batched, initial_state=initial, use_qk_l2norm_in_kernel=True)
    assert_near(closed, expected)


def test_decays_to_nothing_make_no_infinities() -> None:
    q, k, v, g, beta = delta_tokens(70)
    states = torch.zeros(2, 6, 12, 20)
    for gates in (g * 200, (g * 200)[..., None].expand(-1, -1, 12)):
        result = apply_delta(states, rows_of([70], [0], [1]), q, k, v, gates, beta)
        assert result.isfinite().all() and states.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_convolution(length: int, bias: bool) -> None:
    before, x, weight = torch.randn(3, 7), torch.randn(length, 7), torch.randn(4, 7)
    own_bias = torch.randn(7) if bias else None
    seen = torch.cat([before, x])
    expected = qwen.causal_conv1d_fn(seen.t()[None], weight.t(), own_bias, "silu")[0].t()[3:]
    states = torch.stack([torch.zeros(3, 7), before])
    rows = rows_of([length], [1], [1])
    assert_near(recurrent.causal_conv1d(x, weight, own_bias, states, rows, "silu"), expected)
    assert torch.equal(states[1], seen[-3:])
    plain = qwen.causal_conv1d_fn(x.t()[None], weight.t(), own_bias)[0].t()
    assert_near(recurrent.causal_conv1d(x, weight, own_bias, states, rows_of([length], [0], [1])), plain)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'relu'; have"):
        recurrent.activate(torch.ones(1), "relu")


def ssd_tokens(length: int) -> Tokens:
    return torch.randn(length, 6, 5), torch.randn(length, 6), torch.randn(length, 2, 9), torch.randn(length, 2, 9)


@pytest.mark.parametrize("dt_limit", [(0.0, float("inf")), (0.3, 1.1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_ssd(length: int, dt_limit: tuple[float, float]) -> None:
    x, dt, b, c = ssd_tokens(length)
    a, d, dt_bias, initial = -torch.rand(6) * 4, torch.randn(6), torch.randn(6), torch.randn(1, 6, 9, 5)
    expected, final = mamba2.mamba2_chunk_scan(
        x[None], dt[None], a, b[None], c[None], chunk_size=16, D=d, dt_bias=dt_bias,
        initial_states=initial.transpose(-1, -2),
        dt_softplus=True, dt_limit=dt_limit, return_final_states=True,
    )  # fmt: skip
    states = torch.cat([torch.zeros_like(initial), initial])
    rows = rows_of([length], [1], [1])
    assert_near(recurrent.ssd(x, dt, a, b, c, d, dt_bias, states, rows, dt_limit), expected[0])
    assert_near(states[1:].transpose(-1, -2), final)


@pytest.mark.parametrize("length", [1, 2, 33])
def test_selective_scan(length: int) -> None:
    x, dt, b, c = torch.randn(length, 7), torch.randn(length, 7), torch.randn(length, 5), torch.randn(length, 5)
    a, d, dt_bias = -torch.rand(5, 7) * 4, torch.randn(7), torch.randn(7)
    expected, final = mamba.mamba_selective_scan(
        x.t()[None], dt.t()[None], a.t(), b.t()[None], c.t()[None], D=d, delta_bias=dt_bias, delta_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    states = torch.zeros(2, 5, 7)
    result = recurrent.selective_scan(x, dt, a, b, c, d, dt_bias, states, rows_of([length], [0], [1]))
    assert_near(result, expected[0].t())
    assert_near(states[1:].transpose(-1, -2), final)


def linear_tokens(length: int) -> Tokens:
    return torch.randn(length, 3, 8), torch.randn(length, 3, 8), torch.randn(length, 3, 6)


LOG_DECAY = torch.tensor([-0.5, -0.01, -3.0])
A_SCAN, D_SCAN = -torch.rand(5, 7) * 4, torch.randn(7)


def scan_tokens(length: int) -> Tokens:
    return torch.randn(length, 7), torch.randn(length, 7), torch.randn(length, 5), torch.randn(length, 5)


# name -> (states' shape, tokens, kernel of states, rows and tokens)
KERNELS: dict[str, tuple[tuple[int, ...], Callable[[int], Tokens], Callable[..., torch.Tensor]]] = {
    "conv": (
        (3, 7),
        lambda length: (torch.randn(length, 7),),
        lambda states, rows, x: recurrent.causal_conv1d(x, torch.ones(4, 7) / 4, None, states, rows, "silu"),
    ),
    "delta": ((6, 12, 20), delta_tokens, apply_delta),
    "kda": ((3, 12, 12), lambda length: delta_tokens(length, True), apply_delta),
    "linear": (
        (3, 8, 6),
        linear_tokens,
        lambda states, rows, q, k, v: recurrent.linear_attention(q, k, v, LOG_DECAY, states, rows),
    ),
    "ssd": (
        (6, 9, 5),
        ssd_tokens,
        lambda states, rows, x, dt, b, c: recurrent.ssd(x, dt, -torch.arange(1.0, 7), b, c, None, None, states, rows),
    ),
    "scan": (
        (5, 7),
        scan_tokens,
        lambda states, rows, x, dt, b, c: recurrent.selective_scan(x, dt, A_SCAN, b, c, D_SCAN, None, states, rows),
    ),
    "recurrence": (
        (7,),
        lambda length: (torch.randn(length, 7), -torch.rand(length, 7)),
        lambda states, rows, x, g: recurrent.linear_recurrence(x, g, states, rows),
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_pieces_give_what_the_whole_gives(name: str) -> None:
    shape, make, compute = KERNELS[name]
    tokens = make(90)
    whole_states, states = torch.zeros(2, *shape), torch.zeros(2, *shape)
    whole = in_pieces(compute, whole_states, [90], tokens)
    cut = sorted(random.sample(range(1, 90), 3))
    pieces = [end - start for start, end in zip([0, *cut], [*cut, 90], strict=True)]
    assert_near(in_pieces(compute, states, pieces, tokens), whole)
    assert_near(states, whole_states)
    states.zero_()
    assert_near(in_pieces(compute, states, [1] * 90, tokens), whole)
    assert_near(states, whole_states)


@pytest.mark.parametrize("name", KERNELS)
def test_rows_do_not_see_each_other(name: str) -> None:
    """Ragged rows, some alike; slots in any order, one loaded twice; others stay as they are."""
    shape, make, compute = KERNELS[name]
    lengths, load, store = [5, 1, 5, 70, 1], [3, 0, 7, 3, 2], [5, 1, 7, 4, 2]
    tokens = make(sum(lengths))
    states = torch.randn(9, *shape)
    states[0] = 0
    before = states.clone()
    result = compute(states, rows_of(lengths, load, store), *tokens)
    start = 0
    for length, source, target in zip(lengths, load, store, strict=True):
        own = before[[source, 8]].clone()
        alone = compute(own, rows_of([length], [0], [1]), *(x[start : start + length] for x in tokens))
        assert_near(result[start : start + length], alone)
        assert_near(states[target], own[1])
        start += length
    untouched = [slot for slot in range(9) if slot not in store]
    assert torch.equal(states[untouched], before[untouched])


def test_gated_norms() -> None:
    x, gate, weight = torch.randn(4, 3, 12), torch.randn(4, 3, 12), torch.randn(12)
    for theirs, options in [
        (qwen.Qwen3NextRMSNormGated(12, eps=1e-3), (12,)),
        (kimi.KimiLinearRMSNormGated(12, eps=1e-3), (12, False, "sigmoid")),
        (mamba2.MambaRMSNormGated(12, group_size=4, eps=1e-3), (4, True)),
    ]:
        theirs.weight.data.copy_(weight)
        with torch.no_grad():
            expected = theirs(x, gate)
        assert_near(recurrent.gated_rms_norm(x, gate, weight, 1e-3, *options), expected)
