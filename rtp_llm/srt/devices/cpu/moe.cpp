// Mixtures of experts, without their products: the sort of rows by expert, and the weighted sum.
#include "common.h"
#include "replay.h"

#include <vector>

// A stable counting sort of n ids below `groups`. counts [groups]: rows of each; order [n]: the element in each sorted
// place; places [n]: the sorted place of each element. Returns whether all ids are in range.
KERNEL int group_rows(const int64_t* ids, int64_t n, int64_t groups, int64_t* counts, int64_t* order, int64_t* places) {
    for (int64_t g = 0; g < groups; g++) counts[g] = 0;
    for (int64_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= groups) return 0;
        counts[ids[i]]++;
    }
    std::vector<int64_t> next(groups);
    for (int64_t g = 1; g < groups; g++) next[g] = next[g - 1] + counts[g - 1];
    for (int64_t i = 0; i < n; i++) {
        places[i] = next[ids[i]]++;
        order[places[i]] = i;
    }
    return 1;
}

constexpr int64_t WORTH_THREADS = 32768;  // elements from which a parallel region saves more than it costs

// Row i of y = row order[i] / repeats of x; sizes and x_stride are in bytes.
KERNEL void gather_rows(const char* x, int64_t x_stride, const int64_t* order, int64_t n, int64_t repeats,
                        int64_t bytes, char* y) {
#pragma omp parallel for schedule(static) if (n * bytes >= 2 * WORTH_THREADS)
    for (int64_t i = 0; i < n; i++) std::memcpy(y + i * bytes, x + order[i] / repeats * x_stride, bytes);
}

// Row t of y [tokens, size] = the sum of weights[t][j] times row places[t][j] of x, in float32 and rounded once; weights
// are rounded before.
template <class T>
static void add_rows(const T* x, const int64_t* places, const float* weights, int64_t tokens, int64_t top_k, int64_t size,
                     T* y) {
#pragma omp parallel for schedule(static) if (tokens * top_k * size >= WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        auto add_up = [&](int64_t i, auto load_from) {
            vec sum{};
            for (int64_t j = 0; j < top_k; j++) {
                float weight = to_float(from_float<T>(weights[t * top_k + j]));
                sum += load_from(x + places[t * top_k + j] * size + i) * weight;
            }
            return sum;
        };
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) store(y + t * size + i, add_up(i, [](const T* p) { return load(p); }));
        if (i == size) continue;
        int rest = int(size - i);
        store_part(y + t * size + i, add_up(i, [&](const T* p) { return load_part(p, rest); }), rest);
    }
}

KERNEL void sum_rows_bf16(const bf16* x, const int64_t* places, const float* weights, int64_t tokens, int64_t top_k,
                          int64_t size, bf16* y) {
    add_rows(x, places, weights, tokens, top_k, size, y);
}

KERNEL void sum_rows_f16(const f16* x, const int64_t* places, const float* weights, int64_t tokens, int64_t top_k,
                         int64_t size, f16* y) {
    add_rows(x, places, weights, tokens, top_k, size, y);
}

// ---- calls from a list

REPLAYED(group_rows)
REPLAYED(gather_rows)
REPLAYED(sum_rows_bf16)
REPLAYED(sum_rows_f16)
