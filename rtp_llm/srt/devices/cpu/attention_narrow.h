// Narrow items: one token, few query heads per key head (decode).
//
// Keys and values are read in the order of memory, or nearly: a strip of tokens at a time, of these one head after the other,
// while the next strip is asked for, line by line. Processors follow one run of memory by themselves; a head's rows of
// many tokens, each a small piece of a page, took twice as long.
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

// Up to NARROW_KEYS tokens of a sequence: their rows at an item's first head. Rows after the last are the last one's,
// since keys are multiplied four at a time.
template <class S>
struct Block {
    int count = 0;
    int64_t slots[NARROW_KEYS];
    const S *keys[NARROW_KEYS + 4], *values[NARROW_KEYS + 4];

    void find(const Attention& a, const Item& item, int32_t begin) {
        count = std::max(0, std::min(NARROW_KEYS, item.end - begin));
        if (count == 0) return;
        find_slots(a, item.table, begin, count, slots);
        const S* first_key = static_cast<const S*>(a.keys) + item.head * a.key_head;
        const S* first_value = static_cast<const S*>(a.values) + item.head * a.value_head;
        for (int j = 0; j < (count + 3) / 4 * 4; j++) {
            int64_t slot = slots[std::min(j, count - 1)];
            keys[j] = first_key + slot * a.key_slot;
            values[j] = first_value + slot * a.value_slot;
        }
    }
};

// Lines of rows that will be read next, asked for in the order of memory.
class Upcoming {
  public:
    template <class S>
    void set(const S* const* rows, int count, int64_t row_bytes) {
        rows_ = reinterpret_cast<const char* const*>(rows);
        count_ = count;
        row_bytes_ = row_bytes;
        row_ = 0;
        at_ = 0;
    }

    INLINE void ask(int64_t lines) {
        for (; lines > 0 && row_ < count_; lines--) {
            __builtin_prefetch(rows_[row_] + at_, 0, 2);
            at_ += 64;
            if (at_ >= row_bytes_) {
                at_ = 0;
                row_++;
            }
        }
    }

    void ask_for_all() { ask(count_ * ((row_bytes_ + 63) / 64)); }

  private:
    const char* const* rows_ = nullptr;
    int64_t row_bytes_ = 0, at_ = 0;
    int count_ = 0, row_ = 0;
};

// Rows of a strip at one head, in place or converted: where other numbers are stored, or rows end within a vector.
template <class C, class S>
struct Strip {
    const S* stored[NARROW_KEYS];
    const C* converted[NARROW_KEYS];
    C* buffer;

    void find(const S* const* rows, int count, int64_t offset) {
        for (int j = 0; j < (count + 3) / 4 * 4; j++) stored[j] = rows[j] + offset;
    }
    void convert_rows(int count, int64_t size, int64_t padded) {
        for (int j = 0; j < (count + 3) / 4 * 4; j++) {
            converted[j] = buffer + std::min(j, count - 1) * padded;
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

// One item: queries of all its heads, their scores of a block of keys, and their weighted sums.
template <class T, class S>
class Narrow {
    using C = Computed<T>;
    static constexpr bool CONVERTS = std::is_same<S, int8_t>::value;

  public:
    Narrow(const Attention& a, const Step& step, const Item& item)
        : a_(a), item_(item), columns_{a, step, item}, to_scores_(a), group_(columns_.count()),
          k_size_(round_up(a.head_dim, STEP<C>)), v_size_(round_up(a.v_head_dim, STEP<C>)),
          queries_(int64_t(item.num_heads) * group_),
          size_(int(std::min<int64_t>(NARROW_KEYS, std::max<int64_t>(8, STRIP_BYTES / key_bytes() / 4 * 4)))) {
        int64_t pairs = queries_ * NARROW_KEYS, converted = size_ * std::max(k_size_, v_size_);
        scratch.reserve(Arena::bytes<C>(queries_ * k_size_) + Arena::bytes<float>(queries_ * v_size_) +
                        2 * Arena::bytes<float>(queries_) + Arena::bytes<float>(pairs) + Arena::bytes<C>(pairs) +
                        Arena::bytes<C>(converted));
        q_ = scratch.take<C>(queries_ * k_size_);
        weighted_ = scratch.take<float>(queries_ * v_size_);
        maxima_ = scratch.take<float>(queries_);
        totals_ = scratch.take<float>(queries_);
        scores_ = scratch.take<float>(pairs);
        weights_ = scratch.take<C>(pairs);
        strip_.buffer = scratch.take<C>(converted);
        for (int64_t h = 0; h < queries_; h++) {
            const T* from = static_cast<const T*>(a.q) + token_of(h) * a.q_token + head_of(h) * a.q_head;
            convert(from, a.head_dim, q_ + h * k_size_, k_size_);
            maxima_[h] = LOWEST;
            totals_[h] = 0;
        }
        std::fill(weighted_, weighted_ + queries_ * v_size_, 0.0f);
    }

    void run() {
        Block<S> blocks[2];
        blocks[0].find(a_, item_, item_.begin);
        upcoming_.set(blocks[0].keys, std::min(size_, blocks[0].count), key_bytes());
        upcoming_.ask_for_all();
        int now = 0;
        for (int32_t begin = item_.begin; begin < item_.end; begin += NARROW_KEYS, now = 1 - now) {
            blocks[1 - now].find(a_, item_, begin + NARROW_KEYS);
            multiply(blocks[now]);
            for (int head = 0; head < item_.num_heads; head++) weigh(blocks[now], head, begin);
            add(blocks[now], blocks[1 - now]);
        }
    }

    void finish_all(const Partials& partials) {
        for (int64_t h = 0; h < queries_; h++) {
            float* sums_of = weighted_ + h * v_size_;
            natural_order<C>(sums_of, v_size_);
            int64_t partial = columns_.partial(int(h % group_));
            if (partial < 0) finish<T>(a_, token_of(h), head_of(h), sums_of, maxima_[h], totals_[h]);
            else leave_partial(a_, partials.at(partial, head_of(h)), partials.size, sums_of, maxima_[h], totals_[h]);
        }
    }

  private:
    int64_t token_of(int64_t h) const { return columns_.token(int(h % group_)); }
    int64_t head_of(int64_t h) const { return columns_.head(int(h % group_), item_.head + h / group_); }
    int64_t key_bytes() const { return ((item_.num_heads - 1) * a_.key_head + a_.head_dim) * int64_t(sizeof(S)); }
    int64_t value_bytes() const { return ((item_.num_heads - 1) * a_.value_head + a_.v_head_dim) * int64_t(sizeof(S)); }
    // Lines of a strip for each of its heads.
    int64_t lines(int64_t row_bytes) const { return (size_ * ((row_bytes + 63) / 64) + item_.num_heads - 1) / item_.num_heads; }

    // Scores of all heads, before they are scaled.
    void multiply(const Block<S>& block) {
        const bool in_place = !CONVERTS && a_.head_dim % STEP<C> == 0;
        for (int at = 0; at < block.count; at += size_) {
            int count = std::min(size_, block.count - at), next = at + size_;
            if (next < block.count) upcoming_.set(block.keys + next, std::min(size_, block.count - next), key_bytes());
            else upcoming_.set(block.values, std::min(size_, block.count), value_bytes());
            for (int head = 0; head < item_.num_heads; head++) {
                strip_.find(block.keys + at, count, head * a_.key_head);
                upcoming_.ask(lines(key_bytes()));
                const C* q = q_ + head * group_ * k_size_;
                float* scores = scores_ + head * group_ * NARROW_KEYS + at;
                if (!in_place) strip_.convert_rows(count, a_.head_dim, k_size_);
                for (int j = 0; j < count; j += 4) {
                    if constexpr (!CONVERTS)
                        if (in_place) {
                            multiply_group(q, k_size_, strip_.stored + j, k_size_, group_, scores + j);
                            continue;
                        }
                    multiply_group(q, k_size_, strip_.converted + j, k_size_, group_, scores + j);
                }
            }
            upcoming_.ask_for_all();
        }
    }

    // Weights of a head's keys; what was summed with a smaller maximum is made smaller.
    void weigh(const Block<S>& block, int head, int32_t begin) {
        alignas(64) float key_scales[NARROW_KEYS] = {}, value_scales[NARROW_KEYS] = {};
        int64_t kv_head = item_.head + head;
        if (CONVERTS)
            for (int j = 0; j < block.count; j++) {
                key_scales[j] = a_.key_scales[block.slots[j] * a_.num_kv_heads + kv_head];
                value_scales[j] = a_.value_scales[block.slots[j] * a_.num_kv_heads + kv_head];
            }
        for (int g = 0; g < group_; g++) {
            int64_t h = head * group_ + g;
            float* row = scores_ + h * NARROW_KEYS;
            vec top;
            if (a_.alibi_slopes) {
                float slope = a_.alibi_slopes[head_of(h)] * LOG2E, distance = float(begin - columns_.position(g));
                top = to_exponents<CONVERTS, true>(to_scores_, row, key_scales, block.count, slope, distance);
            } else top = to_exponents<CONVERTS, false>(to_scores_, row, key_scales, block.count, 0, 0);
            float maximum = std::max(maxima_[h], largest(top));
            if (maximum > maxima_[h]) {
                float factor = exp2_of(maxima_[h] - maximum);
                totals_[h] *= factor;
                float* sum_of = weighted_ + h * v_size_;
                for (int64_t d = 0; d < v_size_; d += LANES) store(sum_of + d, load(sum_of + d) * factor);
                maxima_[h] = maximum;
            }
            vec total = {};
            for (int j = 0; j < NARROW_KEYS; j += LANES) {
                vec p = exp2<sizeof(C) == 4>(load(row + j) - maximum);
                total += p;
                if (CONVERTS) p *= load(value_scales + j);
                store(weights_ + h * NARROW_KEYS + j, p);
            }
            totals_[h] += sum(total);
        }
    }

    // Adds the weighted values of all heads.
    void add(const Block<S>& block, const Block<S>& following) {
        const bool in_place = !CONVERTS && a_.v_head_dim % STEP<C> == 0;
        for (int at = 0; at < block.count; at += size_) {
            int count = std::min(size_, block.count - at), next = at + size_;
            if (next < block.count) upcoming_.set(block.values + next, std::min(size_, block.count - next), value_bytes());
            else upcoming_.set(following.keys, std::min(size_, following.count), key_bytes());
            for (int head = 0; head < item_.num_heads; head++) {
                strip_.find(block.values + at, count, head * a_.value_head);
                upcoming_.ask(lines(value_bytes()));
                const C* weights = weights_ + head * group_ * NARROW_KEYS + at;
                float* sums_of = weighted_ + head * group_ * v_size_;
                if constexpr (!CONVERTS)
                    if (in_place) {
                        add_group(weights, strip_.stored, count, group_, sums_of, v_size_);
                        continue;
                    }
                strip_.convert_rows(count, a_.v_head_dim, v_size_);
                add_group(weights, strip_.converted, count, group_, sums_of, v_size_);
            }
            upcoming_.ask_for_all();
        }
    }

    const Attention& a_;
    const Item& item_;
    const Columns columns_;
    const Scores to_scores_;
    const int group_;
    const int64_t k_size_, v_size_, queries_;  // numbers of a row, with zeros up to a vector; all heads' queries
    const int size_;  // tokens of a strip
    C* q_;  // [queries, k_size]
    float *weighted_, *maxima_, *totals_;  // [queries, v_size], [queries], [queries]
    float* scores_;  // [queries, NARROW_KEYS]
    C* weights_;  // [queries, NARROW_KEYS]
    Strip<C, S> strip_;
    Upcoming upcoming_;
};

template <class T, class S>
void run_narrow(const Attention& a, const Step& step, const Item& item, const Partials& partials) {
    Narrow<T, S> narrow(a, step, item);
    narrow.run();
    narrow.finish_all(partials);
}

}  // namespace
