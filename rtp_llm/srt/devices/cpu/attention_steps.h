// A step's attention and writes to the cache, for one pair of types.
#pragma once

#include "attention_narrow.h"
#include "attention_wide.h"

namespace {

// ---- a step

// Query-key pairs, and numbers of partial results: for fewer, starting threads costs more than it saves.
constexpr int64_t WORTH_THREADS = 1 << 11, MERGES_WORTH_THREADS = 1 << 15;

template <class T, class S>
void attend(const Attention& a) {
    static thread_local Step step;
    static thread_local Arena memory;
    plan(a, step);
    Partials partials{nullptr, round_up(a.v_head_dim, LANES) + LANES, a.num_heads};
    int64_t floats = step.total_partials * a.num_heads * partials.size;
    memory.reserve(Arena::bytes<float>(floats));
    partials.base = memory.take<float>(floats);
    const Step& todo = step;  // this thread's; other threads read it
    int64_t num_items = int64_t(todo.items.size());
#pragma omp parallel for schedule(dynamic, 1) if (todo.total_cost > WORTH_THREADS && num_items > 1)
    for (int64_t i = 0; i < num_items; i++) {
        const Item& item = todo.items[size_t(i)];
        if (item.kind == NARROW) run_narrow<T, S>(a, todo, item, partials);
        else run_wide<T, S>(a, todo, item, partials);
    }
    if (todo.total_partials == 0) return;
    int64_t pairs = a.num_rows * a.num_heads;
#pragma omp parallel for schedule(static) if (floats > MERGES_WORTH_THREADS)
    for (int64_t i = 0; i < pairs; i++) {
        size_t row = size_t(i / a.num_heads);
        if (todo.num_partials[row] > 1)
            merge<T>(a, partials, todo.tokens[row], todo.first_partial[row], todo.num_partials[row], i % a.num_heads);
    }
}

// ---- writing

// Writes one row of the cache: converted numbers, or int8 with a scale.
template <class T, class S>
INLINE void write_row(const T* from, int64_t size, S* to, float*) {
    if constexpr (std::is_same<T, S>::value) std::memcpy(to, from, size_t(size) * sizeof(T));
    else {
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) store(to + i, load(from + i));
        for (; i < size; i++) to[i] = from_float<S>(to_float(from[i]));
    }
}

template <class T>
INLINE void write_row(const T* from, int64_t size, int8_t* to, float* scale) {
    float largest_of = 0, broken = 0;
    for (int64_t i = 0; i < size; i++) {
        float x = to_float(from[i]);
        largest_of = std::max(largest_of, std::fabs(x));
        broken += x * 0.0f;  // NaN if x is not finite
    }
    *scale = largest_of / 127.0f + broken;
    float factor = largest_of > 0 ? 127.0f / largest_of : 0.0f;
    for (int64_t i = 0; i < size; i++) to[i] = int8_t(std::nearbyint(std::min(127.0f, std::max(-127.0f, to_float(from[i]) * factor))));
}

template <class T, class S>
void write(const Write& w) {
    int64_t numbers = w.num_tokens * w.num_kv_heads * (w.head_dim + (w.v ? w.v_head_dim : 0));
#pragma omp parallel for schedule(static) if (numbers > 1 << 17)
    for (int64_t t = 0; t < w.num_tokens; t++) {
        for (int64_t head = 0; head < w.num_kv_heads; head++) {
            int64_t at = w.slots[t] * w.num_kv_heads + head;
            const T* k = static_cast<const T*>(w.k) + t * w.k_token + head * w.k_head;
            write_row(k, w.head_dim, static_cast<S*>(w.keys) + at * w.head_dim, w.key_scales + at);
            if (!w.v) continue;
            const T* v = static_cast<const T*>(w.v) + t * w.v_token + head * w.v_head;
            write_row(v, w.v_head_dim, static_cast<S*>(w.values) + at * w.v_head_dim, w.value_scales + at);
        }
    }
}

}  // namespace
