"""Plain torch: the documentation of what each kernel computes, the oracle of its tests, and the fallback."""
# long: what kernels compute is looked up here, and read side by side

import torch
import torch.nn.functional as F

from rtp_llm.srt.kernels.paged import PagedRows, first_visible


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    q_start: int,
    window: int | None = None,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    visible_ends: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence: a softmax in float32 whatever the input dtype.

    Query i stands at position ``q_start + i`` and sees keys ``j <= q_start + i``; with a window only those with
    ``j > q_start + i - window``, so ``window`` counts visible tokens, the query's own included.

    Args:
        q: [n, num_heads, head_dim].
        k: [L, num_kv_heads, head_dim], keys of positions 0 .. L-1; num_kv_heads divides num_heads, and query head h
            reads key head ``h // (num_heads // num_kv_heads)``.
        v: [L, num_kv_heads, v_head_dim].
        logit_cap: c > 0 replaces each score s by ``c * tanh(s / c)`` (Gemma 2, 2024).
        sinks: [num_heads]: a score that takes part in the softmax and carries no value (GPT-OSS, 2025).
        visible_ends: [n] int64: query i sees later keys too, all before position ``visible_ends[i]`` (the image blocks
            of Gemma 3, 2025); a window still bounds it from below.
        alibi_slopes: [num_heads]: ``alibi_slopes[h] * (j - q_start - i)`` is added to the score of query i and key j,
            after the cap (ALiBi; Press et al., 2022).
        chunk: a query sees keys of its own chunk alone; position 0 of the keys begins one (Llama 4, 2025).

    Returns:
        [n, num_heads, v_head_dim] in q's dtype.
    """
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, v_head_dim = v.shape
    grouped_q = q.float().view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("nkgd,lkd->kgnl", grouped_q, k.float()) * scaling
    if logit_cap > 0:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    if alibi_slopes is not None:
        queries = torch.arange(q_start, q_start + num_queries, device=q.device)
        distances = torch.arange(num_keys, device=q.device) - queries[:, None]
        scores = scores + alibi_slopes.float().view(num_kv_heads, -1, 1, 1) * distances
    visible = _visible(num_queries, num_keys, q_start, window, visible_ends, chunk, q.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink_scores = sinks.float().view(num_kv_heads, -1, 1, 1).expand(-1, -1, num_queries, 1)
        scores = torch.cat([scores, sink_scores], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :num_keys]
    output = torch.einsum("kgnl,lkd->nkgd", weights, v.float())
    return output.reshape(num_queries, num_heads, v_head_dim).to(q.dtype)


def _visible(
    num_queries: int,
    num_keys: int,
    q_start: int,
    window: int | None,
    visible_ends: torch.Tensor | None,
    chunk: int | None,
    device: torch.device,
) -> torch.Tensor:
    """[n, L] bool: whether the query sees the key."""
    query_positions = torch.arange(q_start, q_start + num_queries, device=device)[:, None]
    key_positions = torch.arange(num_keys, device=device)[None, :]
    visible = key_positions <= query_positions
    if visible_ends is not None:
        visible = visible | (key_positions < visible_ends[:, None])
    if chunk is not None:
        visible = visible & (key_positions >= query_positions // chunk * chunk)
    return visible if window is None else visible & (key_positions > query_positions - window)


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    rows: PagedRows,
    scaling: float,
    window: int | None = None,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    visible_ends: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Compute ``attention`` of each row over its sequence's part of the cache. A token's slot is
    ``page_table[row, position // page_size] * page_size + position % page_size``.

    Args:
        q: [T, num_heads, head_dim].
        keys: [slots, num_kv_heads, head_dim]; values: [slots, num_kv_heads, v_head_dim], perhaps a view of the keys.
        page_table: [rows, pages] int32.
        visible_ends: [T] int64, positions.
        key_scales, value_scales: [slots, num_kv_heads] float32, the factors of the numbers of an int8 cache.

    Returns:
        [T, num_heads, v_head_dim] in q's dtype.
    """
    outputs, first_token = [q.new_empty(0, q.shape[1], values.shape[2])], 0
    for row, start, count in zip(rows.table_rows.tolist(), rows.starts.tolist(), rows.counts.tolist(), strict=True):
        tokens = slice(first_token, first_token + count)
        first = first_visible(start, window, chunk)
        positions = torch.arange(first, start + count, device=q.device)
        slots = page_table[row, positions // page_size].long() * page_size + positions % page_size
        k, v = keys[slots].float(), values[slots].float()
        if key_scales is not None and value_scales is not None:
            k, v = k * key_scales[slots, :, None], v * value_scales[slots, :, None]
        ends = None if visible_ends is None else visible_ends[tokens] - first
        options = (window, logit_cap, sinks, ends, alibi_slopes, chunk)
        outputs.append(attention(q[tokens], k, v, scaling, start - first, *options))
        first_token += count
    return torch.cat(outputs)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Store k [T, num_kv_heads, head_dim] in keys [slots, num_kv_heads, head_dim] at slots [T], and v likewise.

    If keys are int8, each head's numbers are divided by a scale, so that the largest is 127, and rounded; scales go
    to ``key_scales`` and ``value_scales`` [slots, num_kv_heads] float32. ``v`` is None if values are a view of keys.
    """
    for x, stored, scales in ((k, keys, key_scales), (v, values, value_scales)):
        if x is None:
            continue
        if scales is None:
            stored.index_copy_(0, slots, x.to(stored.dtype))
            continue
        scale = x.float().abs().amax(-1) / 127
        numbers = (x.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round().clamp(-127, 127)
        stored.index_copy_(0, slots, numbers.nan_to_num().to(torch.int8))
        scales.index_copy_(0, slots, scale)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019).

    The normalisation is done in float32, the product with ``weight`` in x's dtype, as in transformers' Llama.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def gemma_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``rms_norm`` times ``1 + weight``, all in float32 and rounded once (Gemma, 2024)."""
    return rms_norm(x.float(), 1.0 + weight.float(), eps).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Mean zero, variance one, times ``weight``, plus ``bias`` (Ba et al., 2016), in float32 and rounded once."""
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias, eps).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)``; the sum is rounded to x's dtype before it is normed."""
    added = residual + x
    return rms_norm(added, weight, eps), added


def add_gemma_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(gemma_rms_norm(x + residual), x + residual)``."""
    added = residual + x
    return gemma_rms_norm(added, weight, eps), added


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(layer_norm(x + residual), x + residual)``."""
    added = residual + x
    return layer_norm(added, weight, bias, eps), added


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """[..., 2 * size] -> [..., size]: ``silu(first half) * second half`` (SwiGLU; Shazeer, 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """[..., 2 * size] -> [..., size]: ``gelu(first half) * second half`` (GEGLU; Shazeer, 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``gelu_and_mul`` with the approximation by a hyperbolic tangent (Hendrycks and Gimpel, 2016)."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def swiglu_oai_and_mul(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """[..., 2 * size] -> [..., size]: ``(up + 1) * gate * sigmoid(alpha * gate)`` (GPT-OSS, 2025).

    ``gate``, at even places, is cut at ``limit`` from above; ``up``, at odd places, from both sides.
    """
    gate = x[..., 0::2].clamp(max=limit)
    up = x[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, rows_per_group: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply a linear layer to each group of consecutive rows of x, another one for each group.

    Args:
        x: [N, inputs], sorted by group.
        weight: [groups, outputs, inputs]; bias: [groups, outputs].
        rows_per_group: [groups] int64, summing to N; some may be 0.

    Returns:
        [N, outputs].
    """
    output = x.new_empty(x.shape[0], weight.shape[1])
    end = 0
    for group, num_rows in enumerate(rows_per_group.tolist()):
        if num_rows:
            start, end = end, end + num_rows
            output[start:end] = F.linear(x[start:end], weight[group], None if bias is None else bias[group])
    return output


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer with weights of 8 bits and a scale per output; activations are quantized too, row by row.

    Products are summed exactly, as integers; scales and bias are applied in float32.

    Args:
        x: [..., K]; see ``quantize_rows``.
        weight: [N, K] int8; the weight of output n is ``weight[n] * scales[n]``.
        scales: [N] float32; bias: [N].

    Returns:
        [..., N] in x's dtype.
    """
    rows, row_scales = quantize_rows(x)
    output = _integer_products(rows, weight).float() * row_scales * scales
    return (output if bias is None else output + bias.float()).to(x.dtype)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] -> values [..., K] int8 and scales [..., 1] float32; ``x`` is about ``values * scales``.

    Symmetric: a scale is the row's largest magnitude over 127, and values are rounded half to even. A row with a NaN
    has the scale NaN.
    """
    scales = x.float().abs().amax(dim=-1, keepdim=True) / 127
    values = (x.float() / torch.where(scales == 0, 1.0, scales)).round()
    return values.nan_to_num(0.0).to(torch.int8), scales


def _integer_products(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[..., K] and [N, K] int8 -> [..., N] int32. Sums of 1,024 products of int8 are exact in float32."""
    pieces = zip(rows.split(1024, dim=-1), weight.split(1024, dim=-1), strict=True)
    return torch.stack([F.linear(x.float(), w.float()).int() for x, w in pieces]).sum(dim=0, dtype=torch.int32)


def linear_int4(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with weights of 4 bits in groups; see ``dequantize_int4``. Sums are in float32.

    Args:
        x: [..., K]; weight: [N, K / 2] uint8; scales: [N, K / group_size] float32; zeros: uint8, as scales; bias: [N].

    Returns:
        [..., N] in x's dtype.
    """
    return _linear_float(x, dequantize_int4(weight, scales, zeros, group_size), bias)


def dequantize_int4(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """[N, K] float32: ``(value - zero) * scale``; ``group_size`` neighbours along K have the same zero and scale.

    Args:
        weight: [N, K / 2] uint8: values 0 .. 15, two in a byte, the one of even index in the low half.
        scales: [N, ceil(K / group_size)]: the last group may be shorter.
        zeros: as scales, uint8; None: 8 everywhere.
    """
    return _dequantize(unpack_int4(weight), scales, zeros, group_size, middle=8)


def unpack_int4(weight: torch.Tensor) -> torch.Tensor:
    """[N, K / 2] uint8 of two values each -> [N, K] uint8 of 0 .. 15."""
    return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2)


def linear_uint8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``linear_int4``, with weights of 8 bits in groups, [N, K] uint8; see ``dequantize_uint8``."""
    return _linear_float(x, dequantize_uint8(weight, scales, zeros, group_size), bias)


def dequantize_uint8(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """As ``dequantize_int4``, for values 0 .. 255, one in a byte; ``zeros`` None: 128 everywhere."""
    return _dequantize(weight, scales, zeros, group_size, middle=128)


def _dequantize(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int, middle: int
) -> torch.Tensor:
    columns = values.shape[-1]
    offsets = middle if zeros is None else _by_column(zeros, group_size, columns)
    return (values.float() - offsets) * _by_column(scales, group_size, columns)


def _by_column(of_groups: torch.Tensor, group_size: int, num_columns: int) -> torch.Tensor:
    """[N, groups] -> [N, num_columns] float32."""
    return of_groups.float().repeat_interleave(group_size, dim=-1)[..., :num_columns]


def dequantize_fp8(weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, K] float32: each number times its group's scale; scales: [N, ceil(K / group_size)]."""
    return weight.float() * _by_column(scales, group_size, weight.shape[-1])


def quantize_rows_fp8(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] -> values [..., K] float8_e4m3fn and scales [..., ceil(K / group_size)] float32.

    A scale is the group's largest magnitude over 448, the largest number of the format (as DeepSeek-V3's, 2024, of
    groups of 128). A group with a NaN has the scale NaN.
    """
    size = x.shape[-1]
    groups = F.pad(x.float(), (0, -size % group_size)).unflatten(-1, (-1, group_size))
    scales = groups.abs().amax(dim=-1) / 448
    values = (groups / torch.where(scales == 0, 1.0, scales)[..., None]).nan_to_num(0.0).clamp(-448, 448)
    return values.flatten(-2)[..., :size].to(torch.float8_e4m3fn), scales


def linear_fp8(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """[..., K] -> [..., N] float32: products of fp8 with fp8, in groups of inputs that both have scales for.

    Args:
        weight: [N, K] float8_e4m3fn; scales: [N, ceil(K / group_size)].
    """
    values, row_scales = quantize_rows_fp8(x, group_size)
    rows = values.float() * _by_column(row_scales, group_size, x.shape[-1])
    return F.linear(rows, dequantize_fp8(weight, scales, group_size))


def dequantize_table(weight: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, K] float32: ``table[code]`` times its group's scale.

    Args:
        weight: [N, K / 2] uint8: codes 0 .. 15, two in a byte as in ``dequantize_int4``.
        table: [16] float32; scales: [N, ceil(K / group_size)].
    """
    codes = unpack_int4(weight)
    return table.float()[codes.int()] * _by_column(scales, group_size, codes.shape[-1])


def _linear_float(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer computed in float32, with the result in x's dtype."""
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def route(
    logits: torch.Tensor,
    top_k: int,
    is_sigmoid: bool = False,
    renormalize: bool = False,
    correction_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    num_best_groups: int = 1,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts for each token by logits [T, num_experts]; ``layers.routing.TopK`` says how.

    Returns:
        Weights [T, top_k] float32 and ids [T, top_k] int64.
    """
    scores = logits.float().sigmoid() if is_sigmoid else logits.softmax(dim=-1, dtype=torch.float32)
    if correction_bias is None and num_groups <= num_best_groups:
        topk_weights, topk_ids = scores.topk(top_k, dim=-1)
    else:
        topk_ids = _best_experts(scores, top_k, correction_bias, num_groups, num_best_groups)
        topk_weights = scores.gather(-1, topk_ids)
    if renormalize:
        total = topk_weights.sum(dim=-1, keepdim=True)
        topk_weights = topk_weights / (total + 1e-20 if is_sigmoid else total)
    return topk_weights if factor == 1.0 else topk_weights * factor, topk_ids


def _best_experts(
    scores: torch.Tensor, top_k: int, correction_bias: torch.Tensor | None, num_groups: int, num_best_groups: int
) -> torch.Tensor:
    choice = scores if correction_bias is None else scores + correction_bias.float()
    if num_groups > num_best_groups:
        groups = choice.unflatten(-1, (num_groups, -1))
        num_counted = 1 if correction_bias is None else min(2, groups.shape[-1])
        group_scores = groups.topk(num_counted, dim=-1).values.sum(dim=-1)
        choice = choice.masked_fill(~in_top_groups(group_scores, num_best_groups, choice.shape[-1]), float("-inf"))
    return choice.topk(top_k, dim=-1).indices


def in_top_groups(group_scores: torch.Tensor, num_best_groups: int, num_experts: int) -> torch.Tensor:
    """[T, groups] -> [T, num_experts] bool: whether the expert is in one of the token's best groups."""
    best = group_scores.topk(num_best_groups, dim=-1).indices
    is_best = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, best, True)
    return is_best.repeat_interleave(num_experts // group_scores.shape[-1], dim=-1)


def group_rows(ids: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort ids, [n] int64 in [0, num_groups), by group; the sort is stable.

    Returns:
        rows_per_group: [num_groups]; order: [n], the element in each sorted place; places: [n], the sorted place of
        each element.
    """
    sorted_ids, order = ids.sort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return sorted_ids.bincount(minlength=num_groups), order, places


def gather_rows(x: torch.Tensor, order: torch.Tensor, repeats: int) -> torch.Tensor:
    """Gather rows of x [N, size] by ``order`` [N * repeats], as if each row were repeated ``repeats`` times."""
    return x[order // repeats]


def sum_rows(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return for each token the sum of ``weights[token, j] * rows[places[token * top_k + j]]``.

    Args:
        rows: [tokens * top_k, size]; places: [tokens * top_k]; weights: [tokens, top_k], cast to the dtype of rows.

    Returns:
        [tokens, size].
    """
    by_token = rows[places].view(*weights.shape, rows.shape[1])
    return torch.bmm(weights.to(rows.dtype)[:, None], by_token)[:, 0]


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    """Rotate pairs of the first ``2 * half`` components of each head; keep the rest (RoFormer; Su et al., 2021).

    Pair i is components ``(i, i + half)`` in NeoX style, ``(2i, 2i + 1)`` in interleaved style.

    Args:
        x: [T, num_heads, head_size], with ``2 * half <= head_size``.
        cos, sin: [T, half], in x's dtype.
    """
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    if is_neox_style:
        first, second = rotated.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, passed), dim=-1) if passed.shape[-1] else rotated


def rotary_pair(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply ``rotary`` to queries and keys, [T, heads, head_size] each; their numbers of heads may differ."""
    return rotary(q, cos, sin, is_neox_style), rotary(k, cos, sin, is_neox_style)


def norm_rotary_pair(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox_style: bool,
    is_gemma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply ``rms_norm``, or ``gemma_rms_norm``, to each head of queries and keys, then ``rotary_pair``."""
    norm = gemma_rms_norm if is_gemma else rms_norm
    return rotary_pair(norm(q, weights[0], eps), norm(k, weights[1], eps), cos, sin, is_neox_style)


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index of each row's first largest logit, and whether the row's logits are bad.

    Returns:
        [S] int64 ids; [S] bool: the row has a NaN, a +inf, or only -inf.
    """
    return logits.argmax(dim=-1), ~torch.isfinite(logits.amax(dim=-1))


def mask_tokens(logits: torch.Tensor, lines: torch.Tensor, words: torch.Tensor) -> None:
    """Set to -inf, in place, what ``words`` of ``plan.TokenMasks`` do not allow in rows ``lines`` ([R] int64) of
    logits [S, vocab_size]."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    allowed = bits.flatten(1)[:, : logits.shape[1]].bool()
    logits[lines] = logits[lines].masked_fill(~allowed, -torch.inf)
