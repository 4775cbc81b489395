// Narrow items: one token, few query heads per key head (decode).
#pragma once

#include "attention_results.h"

namespace {

// Products of HEADS queries and four keys, over `size` numbers.
template <class C, class R, int HEADS>
INLINE void multiply_keys(const C* q, int64_t q_size, const R* const* keys, int64_t size, float* out) {
    vec acc[HEADS][4] = {};
    for (int64_t d = 0; d < size; d += STEP<C>) {
        vec k[4];
        for (int j = 0; j < 4; j++) k[j] = units<C>(keys[j] + d);
        for (int h = 0; h < HEADS; h++) {
            vec x = units<C>(q + h * q_size + d);
            for (int j = 0; j < 4; j++) acc[h][j] = multiply_add<C>(x, k[j], acc[h][j]);
        }
    }
    for (int h = 0; h < HEADS; h++) sums(acc[h], out + h * NARROW_KEYS);
}

// weighted[h] += the sum over keys of p[h][key] * values[key], for VECS vectors of it. With bfloat16 pairs, the even
// quarters come first in each STEP; `natural_order` restores the order.
template <class C, class R, int HEADS, int VECS>
INLINE void add_values(const C* p, const R* const* values, int64_t d, int num_keys, float* weighted, int64_t size) {
    vec acc[HEADS][VECS];
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < VECS; v++) acc[h][v] = load(weighted + h * size + d + v * LANES);
    for (int j = 0; j < num_keys; j += PACK<C>) {
        vec x[VECS];
#if defined(__AVX512BF16__)
        if constexpr (sizeof(C) == 2) {
            for (int v = 0; v < VECS; v += 2) {
                __m512i even = (__m512i)units<C>(values[j] + d + v * LANES);
                __m512i odd = (__m512i)units<C>(values[j + 1] + d + v * LANES);
                x[v] = (vec)_mm512_unpacklo_epi16(even, odd);
                x[v + 1] = (vec)_mm512_unpackhi_epi16(even, odd);
            }
        } else
#endif
        {
            for (int v = 0; v < VECS; v++) x[v] = units<C>(values[j] + d + v * LANES);
        }
        for (int h = 0; h < HEADS; h++) {
            vec weight = broadcast(reinterpret_cast<const uint32_t*>(p + h * NARROW_KEYS + j));
            for (int v = 0; v < VECS; v++) acc[h][v] = multiply_add<C>(weight, x[v], acc[h][v]);
        }
    }
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < VECS; v++) store(weighted + h * size + d + v * LANES, acc[h][v]);
}

template <class C>
INLINE void natural_order(float* weighted, int64_t size) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(C) == 2) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        for (int64_t d = 0; d < size; d += 32) {
            __m512 low = _mm512_loadu_ps(weighted + d), high = _mm512_loadu_ps(weighted + d + 16);
            _mm512_storeu_ps(weighted + d, _mm512_permutex2var_ps(low, first, high));
            _mm512_storeu_ps(weighted + d + 16, _mm512_permutex2var_ps(low, second, high));
        }
    }
#endif
}

template <class C, class R, int HEADS>
INLINE void add_all_values(const C* p, const R* const* values, int num_keys, float* weighted, int64_t size) {
    constexpr int VECS = HEADS <= 2 ? 4 : 2 * PACK<C>;  // registers have room for the sums of all heads
    int64_t d = 0;
    for (; d + VECS * LANES <= size; d += VECS * LANES) add_values<C, R, HEADS, VECS>(p, values, d, num_keys, weighted, size);
    for (; d < size; d += STEP<C>) add_values<C, R, HEADS, PACK<C>>(p, values, d, num_keys, weighted, size);
}

// Products of all query heads of a key head, up to four at a time.
template <class C, class R>
void multiply_group(const C* q, int64_t q_size, const R* const* keys, int64_t size, int num_heads, float* out) {
    while (num_heads > 0) {
        int taken = std::min(num_heads, 4);
        if (taken == 1) multiply_keys<C, R, 1>(q, q_size, keys, size, out);
        if (taken == 2) multiply_keys<C, R, 2>(q, q_size, keys, size, out);
        if (taken == 3) multiply_keys<C, R, 3>(q, q_size, keys, size, out);
        if (taken == 4) multiply_keys<C, R, 4>(q, q_size, keys, size, out);
        q += taken * q_size;
        out += taken * NARROW_KEYS;
        num_heads -= taken;
    }
}

template <class C, class R>
void add_group(const C* p, const R* const* values, int num_keys, int num_heads, float* weighted, int64_t size) {
    while (num_heads > 0) {
        int taken = std::min(num_heads, 4);
        if (taken == 1) add_all_values<C, R, 1>(p, values, num_keys, weighted, size);
        if (taken == 2) add_all_values<C, R, 2>(p, values, num_keys, weighted, size);
        if (taken == 3) add_all_values<C, R, 3>(p, values, num_keys, weighted, size);
        if (taken == 4) add_all_values<C, R, 4>(p, values, num_keys, weighted, size);
        p += taken * NARROW_KEYS;
        weighted += taken * size;
        num_heads -= taken;
    }
}

// Rows of some slots, in place or converted. The last is repeated up to a multiple of four.
template <class C, class S>
struct Rows {
    const S* stored[NARROW_KEYS + 4];
    const C* converted[NARROW_KEYS + 4];
    bool direct;

    void find(const S* base, int64_t stride, const int64_t* slots, int count, int64_t size, int64_t padded, C* buffer) {
        int padded_count = (count + 3) / 4 * 4;
        for (int j = 0; j < padded_count; j++) {
            int key = std::min(j, count - 1);
            stored[j] = base + slots[key] * stride;
            if (direct) continue;
            converted[j] = buffer + key * padded;
            if (j < count) convert(stored[j], size, buffer + j * padded, padded);
        }
    }
};

// Converts the products of a query and NARROW_KEYS keys, of which `count` exist, to exponents of two. `slope` and
// `distance` (of the first key from the query, 0 or less) are used if BIASED. Returns the largest in each lane.
template <bool SCALES, bool BIASED>
INLINE vec to_exponents(
    const Scores& to_scores, float* row, const float* key_scales, int count, float slope, float distance
) {
    vec top = splat(LOWEST);
    for (int j = 0; j < NARROW_KEYS; j += LANES) {
        vec x = SCALES ? to_scores(load(row + j), load(key_scales + j)) : to_scores(load(row + j), 1.0f);
        if (BIASED) x += slope * (lane_numbers() + (distance + float(j)));
        if (j + LANES > count)
            for (int lane = std::max(0, count - j); lane < LANES; lane++) x[lane] = MASKED;
        store(row + j, x);
        top = max(x, top);
    }
    return top;
}

// long: one pass over the keys; parts of it would each need a dozen buffers and counters as arguments
template <class T, class S>
void run_narrow(const Attention& a, const Step& step, const Item& item, const Partials& partials) {
    using C = Computed<T>;
    constexpr bool CONVERTS = std::is_same<S, int8_t>::value;
    const Columns columns{a, step, item};
    int group = columns.count();
    int64_t k_size = round_up(a.head_dim, STEP<C>), v_size = round_up(a.v_head_dim, STEP<C>);
    int64_t queries = int64_t(item.num_heads) * group;
    scratch.reserve(Arena::bytes<C>(queries * k_size) + Arena::bytes<float>(queries * v_size) +
                    2 * Arena::bytes<float>(queries) + Arena::bytes<C>(NARROW_KEYS * std::max(k_size, v_size)));
    C* q = scratch.take<C>(queries * k_size);
    float* weighted = scratch.take<float>(queries * v_size);
    float* maxima = scratch.take<float>(queries);
    float* totals = scratch.take<float>(queries);
    C* buffer = scratch.take<C>(NARROW_KEYS * std::max(k_size, v_size));
    auto token_of = [&](int64_t h) { return columns.token(int(h % group)); };
    auto head_of = [&](int64_t h) { return columns.head(int(h % group), item.head + h / group); };
    for (int64_t h = 0; h < queries; h++) {
        convert(static_cast<const T*>(a.q) + token_of(h) * a.q_token + head_of(h) * a.q_head, a.head_dim, q + h * k_size, k_size);
        maxima[h] = LOWEST;
        totals[h] = 0;
    }
    std::fill(weighted, weighted + queries * v_size, 0.0f);

    const Scores to_scores(a);
    const S* keys = static_cast<const S*>(a.keys);
    const S* values = static_cast<const S*>(a.values);
    Rows<C, S> rows;
    int64_t slots[2][NARROW_KEYS];
    alignas(64) float scores[NARROW_HEADS * NARROW_KEYS];
    alignas(64) C weights[NARROW_HEADS * NARROW_KEYS];
    alignas(64) float key_scales[NARROW_KEYS] = {}, value_scales[NARROW_KEYS] = {};
    int count = std::min(NARROW_KEYS, item.end - item.begin);
    find_slots(a, item.table, item.begin, count, slots[0]);
    int now = 0;
    auto ask_for_keys = [&](const int64_t* of, int number, int64_t head) __attribute__((always_inline)) {
        for (int j = 0; j < number; j++)
            prefetch(keys + of[j] * a.key_slot + head * a.key_head, a.head_dim * int64_t(sizeof(S)));
    };
    auto ask_for_values = [&](const int64_t* of, int number, int64_t head) __attribute__((always_inline)) {
        for (int j = 0; j < number; j++)
            prefetch(values + of[j] * a.value_slot + head * a.value_head, a.v_head_dim * int64_t(sizeof(S)));
    };
    for (int head = 0; head < item.num_heads; head++) {
        ask_for_keys(slots[0], count, item.head + head);
        ask_for_values(slots[0], count, item.head + head);
    }
    for (int32_t begin = item.begin; begin < item.end; begin += NARROW_KEYS, now = 1 - now) {
        int next_count = std::max(0, std::min(NARROW_KEYS, item.end - begin - NARROW_KEYS));
        find_slots(a, item.table, begin + NARROW_KEYS, next_count, slots[1 - now]);
        for (int head = 0; head < item.num_heads; head++) {
            int64_t kv_head = item.head + head;
            ask_for_keys(slots[1 - now], next_count, kv_head);
            if (CONVERTS)
                for (int j = 0; j < count; j++) {
                    key_scales[j] = a.key_scales[slots[now][j] * a.num_kv_heads + kv_head];
                    value_scales[j] = a.value_scales[slots[now][j] * a.num_kv_heads + kv_head];
                }
            rows.direct = !CONVERTS && a.head_dim % STEP<C> == 0;
            rows.find(keys + kv_head * a.key_head, a.key_slot, slots[now], count, a.head_dim, k_size, buffer);
            for (int j = 0; j < count; j += 4) {
                if constexpr (!CONVERTS)
                    if (rows.direct) {
                        multiply_group(q + head * group * k_size, k_size, rows.stored + j, k_size, group, scores + j);
                        continue;
                    }
                multiply_group(q + head * group * k_size, k_size, rows.converted + j, k_size, group, scores + j);
            }
            for (int g = 0; g < group; g++) {
                float* row = scores + g * NARROW_KEYS;
                int64_t h = head * group + g;
                vec top;
                if (a.alibi_slopes) {
                    float slope = a.alibi_slopes[head_of(h)] * LOG2E, distance = float(begin - columns.position(g));
                    top = to_exponents<CONVERTS, true>(to_scores, row, key_scales, count, slope, distance);
                } else top = to_exponents<CONVERTS, false>(to_scores, row, key_scales, count, 0, 0);
                float maximum = std::max(maxima[h], largest(top));
                if (maximum > maxima[h]) {
                    float factor = exp2_of(maxima[h] - maximum);
                    totals[h] *= factor;
                    float* sum_of = weighted + h * v_size;
                    for (int64_t d = 0; d < v_size; d += LANES) store(sum_of + d, load(sum_of + d) * factor);
                    maxima[h] = maximum;
                }
                vec total = {};
                for (int j = 0; j < NARROW_KEYS; j += LANES) {
                    vec p = exp2<sizeof(C) == 4>(load(row + j) - maximum);
                    total += p;
                    if (CONVERTS) p *= load(value_scales + j);
                    store(weights + g * NARROW_KEYS + j, p);
                }
                totals[h] += sum(total);
            }
            ask_for_values(slots[1 - now], next_count, kv_head);
            rows.direct = !CONVERTS && a.v_head_dim % STEP<C> == 0;
            rows.find(values + kv_head * a.value_head, a.value_slot, slots[now], count, a.v_head_dim, v_size, buffer);
            float* sums_of = weighted + head * group * v_size;
            if constexpr (!CONVERTS)
                if (rows.direct) {
                    add_group(weights, rows.stored, count, group, sums_of, v_size);
                    continue;
                }
            add_group(weights, rows.converted, count, group, sums_of, v_size);
        }
        count = next_count;
    }
    for (int64_t h = 0; h < queries; h++) {
        natural_order<C>(weighted + h * v_size, v_size);
        int64_t partial = columns.partial(int(h % group));
        if (partial < 0) finish<T>(a, token_of(h), head_of(h), weighted + h * v_size, maxima[h], totals[h]);
        else leave_partial(a, partials.at(partial, head_of(h)), partials.size, weighted + h * v_size, maxima[h], totals[h]);
    }
}

}  // namespace
