// A token by itself: the matrix is read in the order of memory, a few rows at a time; meanwhile the matrix of the next
// head is asked for.
#pragma once

#include <type_traits>

#include "state_matrix_tokens.h"

constexpr int WIDTH = 4;         // vectors of a row that are computed together
constexpr int ROWS = 8;          // of the matrix, likewise
constexpr int AHEAD = 2 * ROWS;  // distance of the prefetch

template <int VALUE>
using Constant = std::integral_constant<int, VALUE>;

// body(first column, vectors as a constant, whether they are whole as a constant, columns).
template <class F>
static INLINE void by_columns(int64_t columns, F body) {
    int64_t c = 0;
    for (; c + WIDTH * LANES <= columns; c += WIDTH * LANES)
        body(c, Constant<WIDTH>{}, std::true_type{}, WIDTH * LANES);
    for (; c + LANES <= columns; c += LANES) body(c, Constant<1>{}, std::true_type{}, LANES);
    if (c < columns) body(c, Constant<1>{}, std::false_type{}, columns - c);
}

// Some columns of a head's matrix, rows `stride` apart, and of the matrix that this thread computes next, or null.
struct Matrix {
    const float *from, *next;
    float* to;
    int64_t rows, columns, stride;

    // body(first row, end) for a few rows at a time; meanwhile asks for as many of `count` rows that begin at `needed`.
    template <class F>
    INLINE void by_rows(const float* needed, int64_t count, F body) const {
        for (int64_t first = 0; first < rows; first += ROWS) {
            const int64_t end = std::min(first + ROWS, rows);
            for (int64_t r = first; r < std::min(end, count); r++)
                for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(needed + r * stride + c, 1, 2);
            body(first, end);
        }
    }
};

// sums [columns, rounded up to vectors] = what the matrix has for a key.
static void recall(const Matrix& matrix, const float* key, float* sums) {
    matrix.by_rows(matrix.from + AHEAD * matrix.stride, matrix.rows - AHEAD, [&](int64_t first, int64_t end) {
        by_columns(matrix.columns, [&](int64_t c, auto vectors, auto whole, int64_t columns) {
            vec total[vectors] = {};
            if (first > 0) load_columns<true>(sums + c, columns, total);
            for (int64_t r = first; r < end; r++) {
                vec s[vectors];
                load_columns<whole>(matrix.from + r * matrix.stride + c, columns, s);
                for (int j = 0; j < vectors; j++) total[j] += s[j] * key[r];
            }
            store_columns<true>(sums + c, columns, total);
        });
    });
}

// S = decay * S + k * written; sums = S * q. `written` and `sums`: [columns, rounded up to vectors].
template <Kind KIND>
static void update(const Tokens& block, const Matrix& matrix, const float* written, float* sums) {
    matrix.by_rows(matrix.next, matrix.next ? matrix.rows : 0, [&](int64_t first, int64_t end) {
        by_columns(matrix.columns, [&](int64_t c, auto vectors, auto whole, int64_t columns) {
            vec total[vectors] = {}, d[vectors];
            if (first > 0) load_columns<true>(sums + c, columns, total);
            load_columns<true>(written + c, columns, d);
            for (int64_t r = first; r < end; r++) {
                const float decay = KIND == DELTA_OF_CHANNELS ? block.decays[r] : block.decay[0];
                vec s[vectors];
                load_columns<whole>(matrix.from + r * matrix.stride + c, columns, s);
                for (int j = 0; j < vectors; j++) {
                    s[j] = s[j] * decay + d[j] * block.k[r];
                    total[j] += s[j] * block.q[r];
                }
                store_columns<whole>(matrix.to + r * matrix.stride + c, columns, s);
            }
            store_columns<true>(sums + c, columns, total);
        });
    });
}

// memory: [2 * columns, rounded up to vectors, and k_dim].
template <class T, Kind KIND>
static void run_token(const Tokens& block, const Matrix& matrix, const T* values, T* out, float skip, float* memory) {
    constexpr bool IS_DELTA = KIND == DELTA || KIND == DELTA_OF_CHANNELS;
    const int64_t size = (matrix.columns + LANES - 1) / LANES * LANES;
    float *sums = memory, *written = memory + size, *seen = memory + 2 * size;
    if (IS_DELTA) {  // a key times the decay reads the matrix before it decays
        for (int64_t i = 0; i < block.k_dim; i++)
            seen[i] = block.k[i] * (KIND == DELTA ? block.decay[0] : block.decays[i]);
        recall(matrix, seen, sums);
    }
    by_columns(matrix.columns, [&](int64_t c, auto vectors, auto whole, int64_t columns) {
        vec value[vectors], known[vectors] = {};
        load_columns<whole>(values + c, columns, value);
        if (IS_DELTA) load_columns<true>(sums + c, columns, known);
        for (int j = 0; j < vectors; j++) value[j] = (value[j] - known[j]) * block.write[0];
        store_columns<true>(written + c, columns, value);
    });
    update<KIND>(block, matrix, written, sums);
    by_columns(matrix.columns, [&](int64_t c, auto vectors, auto whole, int64_t columns) {
        vec value[vectors], result[vectors];
        load_columns<true>(sums + c, columns, result);
        if (KIND == MAMBA2) {
            load_columns<whole>(values + c, columns, value);
            for (int j = 0; j < vectors; j++) result[j] += value[j] * skip;
        }
        store_columns<whole>(out + c, columns, result);
    });
}
