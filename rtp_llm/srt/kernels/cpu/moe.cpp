// What mixtures of experts do around their products: sorting rows by expert, and the weighted sum back.
#include "common.h"

#include <vector>

// A stable counting sort of n ids below `groups`. starts [groups + 1]: where each group's rows begin; order [n]: which
// element is in a sorted place; places [n]: in which place an element is. Returns whether all ids are in range.
KERNEL int group_rows(const int64_t* ids, int64_t n, int64_t groups, int64_t* starts, int64_t* order, int64_t* places) {
    for (int64_t g = 0; g <= groups; g++) starts[g] = 0;
    for (int64_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= groups) return 0;
        starts[ids[i] + 1]++;
    }
    for (int64_t g = 0; g < groups; g++) starts[g + 1] += starts[g];
    std::vector<int64_t> next(starts, starts + groups);
    for (int64_t i = 0; i < n; i++) {
        places[i] = next[ids[i]]++;
        order[places[i]] = i;
    }
    return 1;
}

constexpr int64_t WORTH_THREADS = 32768;  // elements from which a parallel region saves more than it costs

// Row i of y [n, size] = row order[i] / repeats of x.
KERNEL void gather_rows(const bf16* x, int64_t x_stride, const int64_t* order, int64_t n, int64_t repeats, int64_t size,
                        bf16* y) {
#pragma omp parallel for schedule(static) if (n * size >= WORTH_THREADS)
    for (int64_t i = 0; i < n; i++) std::memcpy(y + i * size, x + order[i] / repeats * x_stride, size * sizeof(bf16));
}

// Row t of y [tokens, size] = the sum of weights[t][j] times row places[t][j] of x, in float32 and rounded once; weights
// are rounded before.
KERNEL void sum_rows(const bf16* x, const int64_t* places, const float* weights, int64_t tokens, int64_t top_k,
                     int64_t size, bf16* y) {
#pragma omp parallel for schedule(static) if (tokens * top_k * size >= WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        auto add_up = [&](int64_t i, auto load_from) {
            vec sum{};
            for (int64_t j = 0; j < top_k; j++) {
                float weight = to_float(from_float<bf16>(weights[t * top_k + j]));
                sum += load_from(x + places[t * top_k + j] * size + i) * weight;
            }
            return sum;
        };
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) store(y + t * size + i, add_up(i, [](const bf16* p) { return load(p); }));
        if (i == size) continue;
        int rest = int(size - i);
        store_part(y + t * size + i, add_up(i, [&](const bf16* p) { return load_part(p, rest); }), rest);
    }
}
