"""Kernels that keep a state, in plain torch: convolutions, delta rules, scans, linear attention; and gated norms.

Beside ``reference.py``: the documentation of what each computes, the oracle of tests, and the fallback.

A kernel takes the tokens of all rows of a step, [P, ...], and the pool of one state, [slots, ...]. Piece n of the
tokens begins with the state of slot ``rows.load[n]``, and the state after its last token goes to slot
``rows.store[n]``. Recurrent states are float32, whatever the tokens' dtype. A sequence's result does not depend on
where it was cut into pieces, but for rounding.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F

CHUNK = 64  # tokens that are computed by products of matrices, instead of one after the other
CHUNK_OF_CHANNELS = 16  # the same with a gate for each channel, which makes [chunk, chunk, channels] numbers
L2_EPS = 1e-6


class StateRows(Protocol):
    """Pieces of rows, at least one token each. No slot is stored that another piece loads."""

    load: torch.Tensor  # [N] int64
    store: torch.Tensor  # [N] int64, no two equal
    cu_seqlens: torch.Tensor  # [N + 1] int64: piece n is tokens [cu_seqlens[n], cu_seqlens[n + 1])


# (initial states [N, ...], tokens [N, L, ...]...) -> (results [N, L, ...], final states [N, ...])
Batched = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _by_length(batched: Batched, states: torch.Tensor, rows: StateRows, *tokens: torch.Tensor) -> torch.Tensor:
    """Compute pieces of equal length together; load and store their states. Returns [P, ...]."""
    num_tokens, num_pieces = len(tokens[0]), len(rows.load)
    if num_tokens == num_pieces:  # a token each; known from shapes alone, so that a step can be recorded
        result, final = batched(states[rows.load], *(x[:, None] for x in tokens))
        states[rows.store] = final.to(states.dtype)
        return result[:, 0]
    bounds = rows.cu_seqlens.tolist()
    by_length: dict[int, list[int]] = {}
    for piece, (start, end) in enumerate(pairwise(bounds)):
        by_length.setdefault(end - start, []).append(piece)
    initial = states[rows.load]
    output: torch.Tensor | None = None
    for length, pieces in by_length.items():
        starts = torch.tensor([bounds[piece] for piece in pieces], device=states.device)
        places = (starts[:, None] + torch.arange(length, device=states.device)).flatten()
        part, final = batched(initial[pieces], *(x[places].unflatten(0, (len(pieces), length)) for x in tokens))
        states[rows.store[pieces]] = final.to(states.dtype)
        if output is None:
            output = part.new_empty(num_tokens, *part.shape[2:])
        output[places] = part.flatten(0, 1)
    assert output is not None, "there is at least one piece"
    return output


# Convolution


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    rows: StateRows,
    activation: str | None = None,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve each channel with its own filter over this token and those before it; computed in float32.

    Args:
        x: [P, channels].
        before, after: [P, channels]: factors of the inputs, and of the results after the activation. Both products are
            rounded to x's dtype; the state has inputs that are multiplied already.
        weight: [kernel_size, channels]: the last row is the factor of a token's own input.
        bias: [channels].
        states: [slots, kernel_size - 1, channels]: the last inputs, oldest first, in x's dtype.
        activation: ``"silu"``, or None for none.

    Returns:
        [P, channels] in x's dtype.
    """
    kernel_size = len(weight)

    def batched(state: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.cat([state.to(x.dtype), x], dim=1)
        length = x.shape[1]
        y = torch.zeros_like(x, dtype=torch.float32) if bias is None else bias.float().expand_as(x)
        for i in range(kernel_size):
            y = y + seen[:, i : i + length].float() * weight[i].float()
        return activate(y, activation).to(x.dtype), seen[:, length:]

    y = _by_length(batched, states, rows, x if before is None else before * x)
    return y if after is None else after * y


def activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Apply the function of a kernel's argument ``activation``."""
    if activation is None:
        return x
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
    if activation not in functions:
        raise ValueError(f"unknown activation {activation!r}; have {sorted(functions)}, and None")
    return functions[activation](x)


# The delta rule


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    states: torch.Tensor,
    rows: StateRows,
    normalize: bool = True,
) -> torch.Tensor:
    """Linear attention whose state is corrected by each token (Gated DeltaNet; Yang et al., 2024), by chunks.

    With ``exp(g)`` for each channel of the keys it is Kimi Delta Attention (2025). The definition is
    ``recurrent_delta_rule``; within a chunk all corrections are found by solving a triangular system.

    Args:
        q, k: [P, num_k_heads, k_dim]; value head h reads key head ``h // (num_v_heads // num_k_heads)``.
        v: [P, num_v_heads, v_dim].
        g: [P, num_v_heads], or [P, num_v_heads, k_dim]: logarithms of decays, at most 0.
        beta: [P, num_v_heads]: how much of a token's value is written.
        states: [slots, num_v_heads, k_dim, v_dim] float32.
        normalize: whether queries and keys are divided by their lengths.

    Returns:
        [P, num_v_heads, v_dim] in v's dtype.
    """

    def batched(
        state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        compute = delta_rule_step if v.shape[1] == 1 else delta_rule_chunks
        return compute(state, q, k, v, g, beta, normalize)

    return _by_length(batched, states, rows, q, k, v, g, beta)


def delta_rule_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the delta rule token by token, which defines it: the state S, [k_dim, v_dim] for each head, becomes
    ``S' = exp(g) S``, then ``S = S' + k (beta (v - S'ᵀ k))ᵀ``; the result is ``Sᵀ q / sqrt(k_dim)``.

    Args:
        state: [N, num_v_heads, k_dim, v_dim] float32.
        q, k, v, g, beta: as in ``gated_delta_rule``, [N, L, ...] in place of [P, ...].

    Returns:
        [N, L, num_v_heads, v_dim] in v's dtype, and the state after the last token.
    """
    q32, k32 = _queries_and_keys(q, k, v.shape[2], normalize)
    decay = (g if g.dim() == 4 else g[..., None]).float().exp()
    outputs = []
    for t in range(v.shape[1]):
        state = state * decay[:, t, :, :, None]
        correction = beta[:, t, :, None].float() * (v[:, t].float() - torch.einsum("nhkv,nhk->nhv", state, k32[:, t]))
        state = state + k32[:, t, :, :, None] * correction[:, :, None]
        outputs.append(torch.einsum("nhkv,nhk->nhv", state, q32[:, t]))
    return torch.stack(outputs, dim=1).to(v.dtype), state


def delta_rule_chunks(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute as ``delta_rule_step``, chunk by chunk.

    With G the sum of g within the chunk, S the state before it and D the corrections ``beta (v - S'ᵀ k)``: ``(I + A) D
    = beta (V - exp(G) K S)``, where ``A[t, j] = beta[t] k[t] · exp(G[t] - G[j]) k[j]`` for earlier tokens j.
    """
    q32, k32 = (x.transpose(1, 2) for x in _queries_and_keys(q, k, v.shape[2], normalize))
    v32, b32 = v.float().transpose(1, 2), beta.float().transpose(1, 2)[..., None]
    by_channel = g.dim() == 4
    g32 = (g if by_channel else g[..., None]).float().transpose(1, 2)
    outputs = []
    size = CHUNK_OF_CHANNELS if by_channel else CHUNK
    for at in range(0, v.shape[1], size):
        qc, kc, vc, gc, bc = (x[:, :, at : at + size] for x in (q32, k32, v32, g32, b32))
        total = gc.cumsum(dim=2)
        since = _decay_between(total)
        system = (bc * _scores(kc, kc, since)).tril(-1)
        wanted = bc * (vc - (total.exp() * kc) @ state)
        corrections = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outputs.append((total.exp() * qc) @ state + _scores(qc, kc, since) @ corrections)
        to_end = (total[:, :, -1:] - total).exp() * kc
        state = total[:, :, -1].exp()[..., None] * state + to_end.transpose(-1, -2) @ corrections
    return torch.cat(outputs, dim=2).transpose(1, 2).to(v.dtype), state


def _queries_and_keys(
    q: torch.Tensor, k: torch.Tensor, num_heads: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, L, num_k_heads, k_dim] -> [N, L, num_heads, k_dim] float32, normed if asked; queries are scaled."""
    q, k = q.float(), k.float()
    if normalize:
        q, k = (x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + L2_EPS) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    repeats = num_heads // q.shape[2]
    return q.repeat_interleave(repeats, dim=2), k.repeat_interleave(repeats, dim=2)


def _decay_between(total: torch.Tensor) -> torch.Tensor:
    """[..., c, channels] -> [..., c, c, channels]: ``exp(total[t] - total[j])`` for j <= t, else 0."""
    length = total.shape[-2]
    later = torch.ones(length, length, dtype=torch.bool, device=total.device).triu(1)
    between = total.unsqueeze(-2) - total.unsqueeze(-3)
    return between.masked_fill(later[..., None], float("-inf")).exp()


def _scores(q: torch.Tensor, k: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """[..., c, d], [..., c, d], [..., c, c, 1 or d] -> [..., c, c]: ``q[t] · decay[t, j] k[j]``."""
    if decay.shape[-1] == 1:
        return (q @ k.transpose(-1, -2)) * decay.squeeze(-1)
    return torch.einsum("...tc,...tjc,...jc->...tj", q, decay, k)


def delta_gates(
    a: torch.Tensor, b: torch.Tensor, rate: torch.Tensor, dt_bias: torch.Tensor, most_written: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the delta rule's ``g`` and ``beta`` of projections' outputs.

    Args:
        a: [P, num_v_heads], or [P, num_v_heads, k_dim]: of decays; b: [P, num_v_heads].
        rate: [num_v_heads], negative; dt_bias: as many numbers as a token has in ``a``.
        most_written: the factor of a value that ``beta`` never exceeds.

    Returns:
        ``rate * softplus(a + dt_bias)`` in float32, of a's shape, and ``most_written * sigmoid(b)`` in b's dtype.
    """
    rate = rate.float() if a.dim() == 2 else rate.float()[:, None]
    return rate * F.softplus(a.float() + dt_bias.float().view(a.shape[1:])), b.sigmoid() * most_written


# Linear attention with a decay for each head, and Mamba 2, which is one


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    states: torch.Tensor,
    rows: StateRows,
) -> torch.Tensor:
    """Linear attention: ``S = exp(log_decay) S + k vᵀ``, the result ``Sᵀ q`` (lightning attention; MiniMax-01, 2025).

    Args:
        q, k: [P, num_heads, k_dim]; v: [P, num_heads, v_dim].
        log_decay: [num_heads], at most 0.
        states: [slots, num_heads, k_dim, v_dim] float32.

    Returns:
        [P, num_heads, v_dim] in v's dtype.
    """

    def batched(
        state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        decay = log_decay.float().expand(*v.shape[:3])
        output, state = decayed_attention(state, q.float(), k.float(), v.float(), decay)
        return output.to(v.dtype), state

    return _by_length(batched, states, rows, q, k, v)


def decayed_attention(
    state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``S = exp(g) S + k vᵀ``, the result ``Sᵀ q``, chunk by chunk; all float32.

    Args:
        state: [N, H, k_dim, v_dim]; q, k: [N, L, H, k_dim]; v: [N, L, H, v_dim]; g: [N, L, H].

    Returns:
        [N, L, H, v_dim], and the state after the last token.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    g = g.transpose(1, 2)[..., None]
    outputs = []
    for at in range(0, v.shape[2], CHUNK):
        qc, kc, vc, gc = (x[:, :, at : at + CHUNK] for x in (q, k, v, g))
        total = gc.cumsum(dim=2)
        outputs.append((total.exp() * qc) @ state + _scores(qc, kc, _decay_between(total)) @ vc)
        to_end = (total[:, :, -1:] - total).exp() * kc
        state = total[:, :, -1].exp()[..., None] * state + to_end.transpose(-1, -2) @ vc
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    states: torch.Tensor,
    rows: StateRows,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> torch.Tensor:
    """Mamba 2's state-space dual (Dao and Gu, 2024): with ``s = softplus(dt + dt_bias)`` in ``dt_limit``, the state S
    becomes ``exp(s a) S + b (s x)ᵀ``, and the result is ``Sᵀ c + d x``.

    Args:
        x: [P, num_heads, head_dim].
        dt: [P, num_heads]; dt_bias, a, d: [num_heads]; a is negative.
        b, c: [P, num_groups, state_size]; head h reads group ``h // (num_heads // num_groups)``.
        states: [slots, num_heads, state_size, head_dim] float32.

    Returns:
        [P, num_heads, head_dim] in x's dtype.
    """

    def batched(
        state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = _time_step(dt, dt_bias).clamp(*dt_limit)
        b, c = (y.float().repeat_interleave(x.shape[2] // y.shape[2], dim=2) for y in (b, c))
        scaled = step[..., None] * x.float()
        output, final = decayed_attention(state, c, b, scaled, step * a.float())
        if d is not None:
            output = output + d.float()[:, None] * x.float()
        return output.to(x.dtype), final

    return _by_length(batched, states, rows, x, dt, b, c)


def _time_step(dt: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.softplus(dt.float() if bias is None else dt.float() + bias.float())


# Recurrences of single numbers


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    states: torch.Tensor,
    rows: StateRows,
) -> torch.Tensor:
    """Mamba 1's selective scan (Gu and Dao, 2023): with ``s = softplus(dt + dt_bias)``, each channel's state becomes
    ``exp(s a) S + s x b``, and the result is ``S · c + d x``.

    Args:
        x, dt: [P, channels]; dt_bias, d: [channels].
        a: [state_size, channels], negative.
        b, c: [P, state_size].
        states: [slots, state_size, channels] float32.

    Returns:
        [P, channels] in x's dtype.
    """

    def batched(
        state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = _time_step(dt, dt_bias)
        scaled, b, c = step * x.float(), b.float(), c.float()
        outputs = []
        for t in range(x.shape[1]):
            state = (step[:, t, None] * a.float()).exp() * state + scaled[:, t, None] * b[:, t, :, None]
            outputs.append(torch.einsum("nsc,ns->nc", state, c[:, t]))
        output = torch.stack(outputs, dim=1)
        if d is not None:
            output = output + d.float() * x.float()
        return output.to(x.dtype), state

    return _by_length(batched, states, rows, x, dt, b, c)


def linear_recurrence(x: torch.Tensor, log_decay: torch.Tensor, states: torch.Tensor, rows: StateRows) -> torch.Tensor:
    """``h = exp(log_decay) h + x`` for each channel: the recurrence of RG-LRU (Griffin; De et al., 2024).

    Args:
        x, log_decay: [P, channels].
        states: [slots, channels] float32.

    Returns:
        [P, channels] in x's dtype: h after each token.
    """

    def batched(state: torch.Tensor, x: torch.Tensor, log_decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decay, outputs = log_decay.float().exp(), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + x[:, t].float()
            outputs.append(state)
        return torch.stack(outputs, dim=1).to(x.dtype), state

    return _by_length(batched, states, rows, x, log_decay)


# Gates, and gated norms


def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(gate)``; x: [P, size], gate: the same or [P, heads, size / heads]."""
    return x * gate.reshape(x.shape).sigmoid()


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    gates_first: bool = False,
    activation: str = "silu",
) -> torch.Tensor:
    """``rms_norm(x) * weight * act(gate)``; with ``gates_first``, ``rms_norm(x * act(gate)) * weight``.

    The mean square is of each ``group_size`` neighbours. All in float32, rounded once.

    Args:
        x, gate: [..., size], ``size`` a multiple of ``group_size``; weight: [size].
        activation: ``"silu"`` or ``"sigmoid"``.
    """
    factor = activate(gate.float(), activation)
    x32 = x.float() * factor if gates_first else x.float()
    groups = x32.unflatten(-1, (-1, group_size))
    normed = (groups * torch.rsqrt(groups.square().mean(dim=-1, keepdim=True) + eps)).flatten(-2) * weight.float()
    return (normed if gates_first else normed * factor).to(x.dtype)
