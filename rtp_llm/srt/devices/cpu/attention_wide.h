// Wide items: a block of queries by one key head.
#pragma once

#include "attention_results.h"

#include <climits>

namespace {

// acc[r][v] += sum over k of (unit k of row r of a) * (vector v of row k of b)
template <class C, int VECS>
INLINE void multiply_tile(
    const uint32_t* a, int64_t row, int64_t step, const float* b, int64_t depth, vec (&acc)[TILE_ROWS][VECS]
) {
    for (int64_t k = 0; k < depth; k++, a += step, b += VECS * LANES) {
        vec x[VECS];
        for (int v = 0; v < VECS; v++) x[v] = load(b + v * LANES);
        for (int r = 0; r < TILE_ROWS; r++) {
            vec unit = broadcast(a + r * row);
            for (int v = 0; v < VECS; v++) acc[r][v] = multiply_add<C>(unit, x[v], acc[r][v]);
        }
    }
}

// scores [num_keys, VECS * LANES] of keys [num_keys, row units] and queries [depth, VECS * LANES]
template <class C, int VECS>
void multiply_panel(
    const C* keys, int64_t row, const float* queries, int64_t depth, int num_keys, float* scores, Ahead& ahead
) {
    for (int j = 0; j < num_keys; j += TILE_ROWS) {
        ahead.ask();
        vec acc[TILE_ROWS][VECS] = {};
        multiply_tile<C, VECS>(reinterpret_cast<const uint32_t*>(keys) + j * row, row, 1, queries, depth, acc);
        for (int r = 0; r < TILE_ROWS; r++)
            for (int v = 0; v < VECS; v++) store(scores + ((j + r) * VECS + v) * LANES, acc[r][v]);
    }
}

// weighted [size, VECS * LANES] = itself times factors, and values [tile][num_units or more][TILE_ROWS] times weights
// [num_units, VECS * LANES].
template <class C, int VECS>
void add_panel(
    const uint32_t* values, int64_t tile_size, const float* weights, int num_units, const float* factors, int64_t size,
    float* weighted
) {
    for (int64_t d = 0; d < size; d += TILE_ROWS, values += tile_size) {
        vec acc[TILE_ROWS][VECS];
        for (int v = 0; v < VECS; v++) {
            vec factor = load(factors + v * LANES);
            for (int r = 0; r < TILE_ROWS; r++) acc[r][v] = load(weighted + ((d + r) * VECS + v) * LANES) * factor;
        }
        multiply_tile<C, VECS>(values, 1, TILE_ROWS, weights, num_units, acc);
        for (int r = 0; r < TILE_ROWS; r++)
            for (int v = 0; v < VECS; v++) store(weighted + ((d + r) * VECS + v) * LANES, acc[r][v]);
    }
}

// Columns that are computed in the tiles together, and their state.
struct Panel {
    int vecs;
    float* queries;  // [depth, vecs * LANES] units
    float* weighted;  // [padded v_head_dim, vecs * LANES]
    float *maxima, *totals;  // [vecs * LANES]
    int32_t *from, *to;  // visible keys of each column
    float *slopes, *positions;  // ALiBi's factors of distances, for exponents of two, and where the queries stand
    int32_t all_from, all_to, some_from, some_to;  // keys that all columns see, and that some do
};

template <class C>
INLINE void store_weights(float* to, vec even, vec odd) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(C) == 2) {
        alignas(64) static constexpr auto order = [] {
            struct { uint16_t at[32]; } result{};
            for (int i = 0; i < 32; i++) result.at[i] = uint16_t(i / 2 + i % 2 * 16);
            return result;
        }();
        __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(&order), pairs));
        return;
    }
#endif
    store(to, even);
}

// Converts one vector of columns of scores to weights, and returns the factor of earlier sums. PLAIN: a score is only
// the product times to_scores.factor. BIASED: it also has `slopes` times the key's distance from `positions`.
template <class C, bool MASKS, bool PLAIN, bool SCALES, bool BIASED>
INLINE vec soften(
    const Scores& to_scores, float* scores, int64_t stride, int num_keys, int32_t begin, const float* key_scales,
    const float* value_scales, const int32_t* from, const int32_t* to, const float* slopes, const float* positions,
    float* weights, float* maxima, float* totals
) {
    static_assert(!(PLAIN && BIASED), "a biased score is more than a product");
    vec before = load(maxima), top = PLAIN ? splat(MASKED_PRODUCT) : before;
    vec factor = splat(PLAIN ? to_scores.factor : 1.0f);
    vec slope = {}, position = {};
    if (BIASED) slope = load(slopes), position = load(positions);
    ivec first, last;
    if (MASKS) {
        std::memcpy(&first, from, sizeof(first));
        std::memcpy(&last, to, sizeof(last));
    }
    for (int j = 0; j < num_keys; j++) {
        vec x = load(scores + j * stride);
        if (!PLAIN) x = to_scores(x, SCALES ? key_scales[j] : 1.0f);
        if (BIASED) x += slope * (float(begin + j) - position);
        if (MASKS) {
            int32_t position = begin + j;
            ivec seen = (first <= position) & (last > position);
            x = seen ? x : splat(PLAIN ? MASKED_PRODUCT : MASKED);
        }
        if (!PLAIN || MASKS) store(scores + j * stride, x);
        top = max(x, top);
    }
    if (PLAIN) top = max(top * factor, before);
    vec total = {};
    for (int j = 0; j < num_keys; j += PACK<C>) {
        vec p[2] = {};
        for (int i = 0; i < PACK<C>; i++) {
            if (j + i >= num_keys) break;
            vec x = load(scores + (j + i) * stride);
            p[i] = exp2<sizeof(C) == 4>(PLAIN ? x * factor - top : x - top);
            total += p[i];
            if (SCALES) p[i] *= value_scales[j + i];
        }
        store_weights<C>(weights + j / PACK<C> * stride, p[0], p[1]);
    }
    vec scale = exp2<true>(before - top);
    store(maxima, top);
    store(totals, load(totals) * scale + total);
    return scale;
}

// Values of a block in the layout of `add_panel`.
template <class C, class S>
void pack_values(const S* base, int64_t stride, const int64_t* slots, int num_keys, int64_t size, int64_t padded, C* row, uint32_t* to) {
    int num_units = (num_keys + PACK<C> - 1) / PACK<C>;
    for (int j = 0; j < num_units; j++) {
        const C* sources[2] = {};
        for (int i = 0; i < PACK<C>; i++) {
            C* copy = row + i * padded;
            sources[i] = copy;
            if (j * PACK<C> + i >= num_keys) {
                std::fill(copy, copy + padded, C{});
                continue;
            }
            const S* source = base + slots[j * PACK<C> + i] * stride;
            if constexpr (std::is_same<C, S>::value)
                if (size == padded) {
                    sources[i] = source;
                    continue;
                }
            convert(source, size, copy, padded);
        }
        uint32_t* unit = to + j * TILE_ROWS;
        int64_t next = int64_t(num_units) * TILE_ROWS;
#if defined(__AVX512BF16__)
        if constexpr (sizeof(C) == 2) {
            for (int64_t d = 0; d < padded; d += 32) {
                __m512i even = (__m512i)units<C>(sources[0] + d), odd = (__m512i)units<C>(sources[1] + d);
                __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
                // Quarters of low have d .. d+3, d+8 .. d+11, and so on; those of high have the values between.
                for (int i = 0; i < 4; i++) {
                    __m128i a = i == 0 ? _mm512_extracti32x4_epi32(low, 0) : i == 1 ? _mm512_extracti32x4_epi32(low, 1)
                              : i == 2 ? _mm512_extracti32x4_epi32(low, 2) : _mm512_extracti32x4_epi32(low, 3);
                    __m128i b = i == 0 ? _mm512_extracti32x4_epi32(high, 0) : i == 1 ? _mm512_extracti32x4_epi32(high, 1)
                              : i == 2 ? _mm512_extracti32x4_epi32(high, 2) : _mm512_extracti32x4_epi32(high, 3);
                    uint32_t* tile = unit + (d / TILE_ROWS + i) * next;
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile), a);
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + 4), b);
                }
            }
            continue;
        }
#endif
        for (int64_t d = 0; d < padded; d += TILE_ROWS) std::memcpy(unit + d / TILE_ROWS * next, sources[0] + d, TILE_ROWS * 4);
    }
}

#if defined(__AVX512F__)
// [16, from_step] -> [16, to_step], transposed
INLINE void transpose(const float* from, int64_t from_step, float* to, int64_t to_step) {
    __m512 x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_ps(from + i * from_step);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // quarter q of x[i + j] is column 4 q + j of rows i to i + 3
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)y[i + j], (__m512d)y[i + 2 + j]);
            x[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)y[i + j], (__m512d)y[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) {
        __m512 even_upper = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88), odd_upper = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
        __m512 even_lower = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
        __m512 odd_lower = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
        _mm512_storeu_ps(to + j * to_step, _mm512_shuffle_f32x4(even_upper, even_lower, 0x88));
        _mm512_storeu_ps(to + (4 + j) * to_step, _mm512_shuffle_f32x4(odd_upper, odd_lower, 0x88));
        _mm512_storeu_ps(to + (8 + j) * to_step, _mm512_shuffle_f32x4(even_upper, even_lower, 0xdd));
        _mm512_storeu_ps(to + (12 + j) * to_step, _mm512_shuffle_f32x4(odd_upper, odd_lower, 0xdd));
    }
}
#endif

// LANES rows, `step` apart, as columns.
void give_columns(const float* rows, int64_t step, int64_t size, float* columns, int64_t width) {
    int64_t d = 0;
#if defined(__AVX512F__)
    for (; d + LANES <= size; d += LANES) transpose(rows + d, step, columns + d * width, width);
#endif
    for (; d < size; d++)
        for (int c = 0; c < LANES; c++) columns[d * width + c] = rows[c * step + d];
}

// `rows` has room for LANES rows of `step` units.
template <class T, class C>
void fill_panel(const Columns& columns, int first, Panel& panel, float* rows, int64_t step) {
    const Attention& a = columns.a;
    int width = panel.vecs * LANES, count = std::min(width, columns.count() - first);
    int64_t depth = (a.head_dim + PACK<C> - 1) / PACK<C>;
    std::fill(rows, rows + LANES * step, 0.0f);
    if (count < width) std::fill(panel.queries, panel.queries + depth * width, 0.0f);
    panel.all_from = panel.some_to = 0;
    panel.all_to = panel.some_from = INT_MAX;
    for (int c = 0; c < width; c++) {
        panel.maxima[c] = LOWEST;
        panel.totals[c] = panel.slopes[c] = panel.positions[c] = 0;
        if (c >= count) {
            panel.from[c] = 0;
            panel.to[c] = INT_MAX;
            continue;
        }
        columns.visible(first + c, panel.from[c], panel.to[c]);
        panel.all_from = std::max(panel.all_from, panel.from[c]);
        panel.some_from = std::min(panel.some_from, panel.from[c]);
        panel.all_to = std::min(panel.all_to, panel.to[c]);
        panel.some_to = std::max(panel.some_to, panel.to[c]);
        int64_t head = columns.head(first + c, columns.item.head);
        if (a.alibi_slopes) {
            panel.slopes[c] = a.alibi_slopes[head] * LOG2E;
            panel.positions[c] = float(columns.position(first + c));
        }
        const T* q = static_cast<const T*>(a.q) + columns.token(first + c) * a.q_token + head * a.q_head;
        convert(q, a.head_dim, reinterpret_cast<C*>(rows + c % LANES * step), step * PACK<C>);
        if (c % LANES == LANES - 1 || c == count - 1) give_columns(rows, step, depth, panel.queries + c / LANES * LANES, width);
    }
}

template <class C, int VECS>
void compute_panel(
    const Panel& panel, const Scores& to_scores, bool scaled, bool biased, const C* keys, int64_t k_size, int64_t depth,
    const uint32_t* values, int64_t tile_size, int64_t size, int32_t begin, int num_keys, const float* key_scales,
    const float* value_scales, float* scores, float* weights, Ahead& ahead
) {
    constexpr int WIDTH = VECS * LANES;
    alignas(64) float factors[WIDTH];
    bool masked = panel.all_from > begin || panel.all_to < begin + num_keys;
    multiply_panel<C, VECS>(keys, k_size / PACK<C>, panel.queries, depth, num_keys, scores, ahead);
    for (int v = 0; v < VECS; v++) {
        int at = v * LANES;
        auto softened_as = [&](auto masks, auto plain, auto scales, auto biases) {
            return soften<C, decltype(masks)::value, decltype(plain)::value, decltype(scales)::value, decltype(biases)::value>(
                to_scores, scores + at, WIDTH, num_keys, begin, key_scales, value_scales, panel.from + at, panel.to + at,
                panel.slopes + at, panel.positions + at, weights + at, panel.maxima + at, panel.totals + at);
        };
        std::true_type yes;
        std::false_type no;
        auto softened = [&](auto masks, auto plain, auto scales) { return softened_as(masks, plain, scales, no); };
        vec factor;
        if (biased) factor = scaled ? softened_as(yes, no, yes, yes) : softened_as(yes, no, no, yes);
        else if (scaled) factor = masked ? softened(yes, no, yes) : softened(no, no, yes);
        else if (to_scores.plain) factor = masked ? softened(yes, yes, no) : softened(no, yes, no);
        else factor = masked ? softened(yes, no, no) : softened(no, no, no);
        store(factors + at, factor);
    }
    add_panel<C, VECS>(values, tile_size, weights, (num_keys + PACK<C> - 1) / PACK<C>, factors, size, panel.weighted);
}

// Rows of LANES columns, `step` apart.
void take_columns(const float* weighted, int64_t width, int64_t size, float* rows, int64_t step) {
    int64_t d = 0;
#if defined(__AVX512F__)
    for (; d + LANES <= size; d += LANES) transpose(weighted + d * width, width, rows + d, step);
#endif
    for (; d < size; d++)
        for (int c = 0; c < LANES; c++) rows[c * step + d] = weighted[d * width + c];
}

// `rows` has room for LANES rows of `step` numbers.
template <class T>
void finish_panel(
    const Columns& columns, int first, const Panel& panel, const Partials& partials, float* rows, int64_t step
) {
    const Attention& a = columns.a;
    int width = panel.vecs * LANES, count = std::min(width, columns.count() - first);
    for (int c = 0; c < count; c++) {
        if (c % LANES == 0) take_columns(panel.weighted + c, width, a.v_head_dim, rows, step);
        const float* row = rows + c % LANES * step;
        int64_t token = columns.token(first + c), head = columns.head(first + c, columns.item.head), partial = columns.partial(first + c);
        if (partial < 0) finish<T>(a, token, head, row, panel.maxima[c], panel.totals[c]);
        else leave_partial(a, partials.at(partial, head), partials.size, row, panel.maxima[c], panel.totals[c]);
    }
}

// long: one pass over the keys; parts of it would each need a dozen buffers and counters as arguments
template <class T, class S>
void run_wide(const Attention& a, const Step& step, const Item& item, const Partials& partials) {
    using C = Computed<T>;
    constexpr bool CONVERTS = std::is_same<S, int8_t>::value;
    const Columns columns{a, step, item};
    int vecs = (columns.count() + LANES - 1) / LANES, num_panels = (vecs + PANEL_VECS - 1) / PANEL_VECS;
    int64_t k_size = round_up(a.head_dim, STEP<C>), v_size = round_up(a.v_head_dim, STEP<C>);
    int64_t depth = (a.head_dim + PACK<C> - 1) / PACK<C>, size = round_up(a.v_head_dim, TILE_ROWS);
    int64_t width = PANEL_VECS * LANES;
    scratch.reserve(Arena::bytes<C>(WIDE_KEYS * k_size) + Arena::bytes<C>(2 * v_size) + Arena::bytes<float>(LANES * std::max(k_size, v_size)) +
                    Arena::bytes<uint32_t>(WIDE_KEYS / PACK<C> * v_size) + 2 * Arena::bytes<float>(WIDE_KEYS * width) +
                    2 * Arena::bytes<float>(WIDE_KEYS) + Arena::bytes<int64_t>(2 * WIDE_KEYS) +
                    size_t(num_panels) * (Arena::bytes<float>(depth * width) + Arena::bytes<float>(size * width) +
                                          6 * Arena::bytes<float>(width)));
    C* keys = scratch.take<C>(WIDE_KEYS * k_size);
    C* value_rows = scratch.take<C>(2 * v_size);
    float* rows = scratch.take<float>(LANES * std::max(k_size, v_size));
    uint32_t* values = scratch.take<uint32_t>(WIDE_KEYS / PACK<C> * v_size);
    float* scores = scratch.take<float>(WIDE_KEYS * width);
    float* weights = scratch.take<float>(WIDE_KEYS * width);
    float* key_scales = scratch.take<float>(WIDE_KEYS);
    float* value_scales = scratch.take<float>(WIDE_KEYS);
    int64_t* slots = scratch.take<int64_t>(2 * WIDE_KEYS);
    Panel panels[WIDE_COLUMNS];
    int firsts[WIDE_COLUMNS];
    for (int p = 0, first = 0; p < num_panels; p++) {
        Panel& panel = panels[p];
        panel.vecs = vecs / num_panels + (p < vecs % num_panels);
        panel.queries = scratch.take<float>(depth * width);
        panel.weighted = scratch.take<float>(size * width);
        panel.maxima = scratch.take<float>(width);
        panel.totals = scratch.take<float>(width);
        panel.from = scratch.take<int32_t>(width);
        panel.to = scratch.take<int32_t>(width);
        panel.slopes = scratch.take<float>(width);
        panel.positions = scratch.take<float>(width);
        std::fill(panel.weighted, panel.weighted + size * panel.vecs * LANES, 0.0f);
        fill_panel<T, C>(columns, first, panel, rows, k_size / PACK<C>);
        firsts[p] = first;
        first += panel.vecs * LANES;
    }
    const Scores to_scores(a);
    const S* key_base = static_cast<const S*>(a.keys) + item.head * a.key_head;
    const S* value_base = static_cast<const S*>(a.values) + item.head * a.value_head;
    int64_t* next_slots = slots + WIDE_KEYS;
    int count = std::min(WIDE_KEYS, item.end - item.begin);
    find_slots(a, item.table, item.begin, count, slots);
    Ahead ahead{reinterpret_cast<const char*>(key_base), reinterpret_cast<const char*>(value_base),
                a.key_slot * int64_t(sizeof(S)), a.value_slot * int64_t(sizeof(S)),
                a.head_dim * int64_t(sizeof(S)), a.v_head_dim * int64_t(sizeof(S)), slots, count, count};
    ahead.ask();
    for (int32_t begin = item.begin; begin < item.end; begin += WIDE_KEYS) {
        int next_count = std::max(0, std::min(WIDE_KEYS, item.end - begin - WIDE_KEYS));
        find_slots(a, item.table, begin + WIDE_KEYS, next_count, next_slots);
        ahead.slots = next_slots, ahead.count = next_count, ahead.next = 0;
        ahead.at_a_time = (TILE_ROWS * next_count + WIDE_KEYS * num_panels - 1) / (WIDE_KEYS * num_panels);
        for (int j = 0; j < count; j++) {
            convert(key_base + slots[j] * a.key_slot, a.head_dim, keys + j * k_size, k_size);
            if (CONVERTS) {
                key_scales[j] = a.key_scales[slots[j] * a.num_kv_heads + item.head];
                value_scales[j] = a.value_scales[slots[j] * a.num_kv_heads + item.head];
            }
        }
        pack_values(value_base, a.value_slot, slots, count, a.v_head_dim, v_size, value_rows, values);
        for (int p = 0; p < num_panels; p++) {
            const Panel& panel = panels[p];
            if (panel.some_to <= begin || panel.some_from >= begin + count) continue;
            auto compute = [&](auto vecs_of) {
                compute_panel<C, decltype(vecs_of)::value>(
                    panel, to_scores, CONVERTS, a.alibi_slopes != nullptr, keys, k_size, depth, values, (count + PACK<C> - 1) / PACK<C> * TILE_ROWS, size,
                    begin, std::min(count, panel.some_to - begin), key_scales, value_scales, scores, weights, ahead);
            };
            if (panel.vecs == 1) compute(std::integral_constant<int, 1>());
            if (panel.vecs == 2) compute(std::integral_constant<int, 2>());
            if (panel.vecs == 3) compute(std::integral_constant<int, 3>());
        }
        std::swap(slots, next_slots);
        count = next_count;
    }
    for (int p = 0; p < num_panels; p++) finish_panel<T>(columns, firsts[p], panels[p], partials, rows, v_size);
}

}  // namespace
