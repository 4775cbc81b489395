// A tile of rows times a panel of blocks, and rows of the weight.
#pragma once

#include "gemm_blocks_rows.h"
#include "gemm_blocks_types.h"

namespace {

constexpr int UNITS = RUN / 4;            // of a run
constexpr int ROWS_TOGETHER = LANES == 16 ? 4 : 2;  // whose products are computed in turn: the registers have room for them
constexpr int LEAST_AHEAD = 4096;         // bytes: distance of the prefetch, but at least a block

// ---- a run of the weights

// Of one register of outputs.
template <class T>
struct Weights {
    static constexpr int PARTS = T::HALVES ? 2 : 1;  // of a run, with a scale each
    static constexpr int OFFSET = T::SIGNED && HAVE_DOT ? 128 : T::OFFSET;

    ivec units[UNITS], magnitudes[UNITS];
    vec scales[PARTS], minima[PARTS];

    INLINE Weights(const uint8_t* block, int run, int v) {
        for (int u = 0; u < UNITS; u++) {
            units[u] = T::unit(block, run, u, v);
            if (T::SIGNED && !HAVE_DOT) magnitudes[u] = magnitudes_of(units[u]);
            if (T::SIGNED && HAVE_DOT) units[u] ^= int32_t(0x80808080);
        }
        for (int part = 0; part < PARTS; part++) {
            scales[part] = T::scale(block, run, part, v);
            if constexpr (T::MINIMA) minima[part] = T::minimum(block, run, part, v);
        }
    }
};

// products[r][part] += bytes of weights times those of row r.
template <class T, int R>
INLINE void add_products(const Weights<T>& w, const Run* x, ivec (&products)[R][Weights<T>::PARTS]) {
    constexpr int EACH = UNITS / Weights<T>::PARTS;
    if constexpr (HAVE_DOT) {
        for (int u = 0; u < UNITS; u++)
            for (int r = 0; r < R; r++)
                products[r][u / EACH] = add_bytes(products[r][u / EACH], w.units[u], x[r].unit(u));
        return;
    }
    constexpr int FIT = 32767 / (T::LARGEST * 127 * 2);  // units whose sums are of 16 bits
    constexpr int STEP = FIT >= EACH ? EACH : FIT >= 4 ? 4 : FIT >= 2 ? 2 : 1;
    for (int first = 0; first < UNITS; first += STEP) {
        svec sums[R];
        for (int u = first; u < first + STEP; u++)
            for (int r = 0; r < R; r++) {
                svec pair = pairs<T::SIGNED>(w.units[u], w.magnitudes[u], x[r].unit(u));
                sums[r] = u == first ? pair : sums[r] + pair;
            }
        for (int r = 0; r < R; r++) products[r][first / EACH] += widened(sums[r]);
    }
}

// sums[r * VECS] += weights times row r.
template <class T, int R>
INLINE void add_rows(const Weights<T>& w, const Run* x, vec* sums) {
    constexpr int PARTS = Weights<T>::PARTS;
    ivec products[R][PARTS];
    for (int r = 0; r < R; r++)
        for (int part = 0; part < PARTS; part++)
            products[r][part] = ivec{} + (Weights<T>::OFFSET ? x[r].starts[part] : 0);
    add_products<T, R>(w, x, products);
    for (int r = 0; r < R; r++) {
        vec sum = as_float(products[r][0]) * w.scales[0];
        if constexpr (PARTS == 2) sum += as_float(products[r][1]) * w.scales[1];
        if constexpr (T::MINIMA && PARTS == 1) sum -= w.minima[0] * splat(x[r].totals[0]);
        if constexpr (T::MINIMA && PARTS == 2)
            for (int part = 0; part < 2; part++) sum -= w.minima[part] * splat(x[r].totals[part]);
        sums[r * VECS] += sum * splat(x[r].scale);
    }
}

// ---- tiles

// blocks: of one output. sums: [rows].
template <class T>
void tile_blocks(const Run* x, int rows, const uint8_t* panel, int64_t blocks, vec (*sums)[VECS]) {
    constexpr int BLOCK_BYTES = T::BYTES * PANEL, RUNS = T::INPUTS / RUN, RUN_BYTES = BLOCK_BYTES / RUNS;
    constexpr int AHEAD = BLOCK_BYTES > LEAST_AHEAD ? BLOCK_BYTES : LEAST_AHEAD;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECS; v++) sums[r][v] = vec{};
    for (int64_t b = 0; b < blocks; b++, panel += BLOCK_BYTES)
        for (int run = 0; run < RUNS; run++, x += rows) {
            for (int at = 0; at < RUN_BYTES; at += 64) __builtin_prefetch(panel + run * RUN_BYTES + AHEAD + at, 0, 2);
            for (int v = 0; v < VECS; v++) {
                const Weights<T> w(panel, run, v);
                int r = 0;
                for (; r + ROWS_TOGETHER <= rows; r += ROWS_TOGETHER)
                    add_rows<T, ROWS_TOGETHER>(w, x + r, &sums[r][v]);
                if (ROWS_TOGETHER > 2 && r + 2 <= rows) add_rows<T, 2>(w, x + r, &sums[r][v]), r += 2;
                if (r < rows) add_rows<T, 1>(w, x + r, &sums[r][v]);
            }
        }
}

// Output `n` of a panel -> [blocks * T::INPUTS].
template <class T>
void row_of_blocks(const uint8_t* panel, int n, int64_t blocks, float* out) {
    const int v = n / LANES, lane = n % LANES;
    for (int64_t b = 0; b < blocks; b++, panel += T::BYTES * PANEL)
        for (int run = 0; run < T::INPUTS / RUN; run++)
            for (int u = 0; u < UNITS; u++, out += 4) {
                int half = T::HALVES ? u / (UNITS / 2) : 0;
                int32_t bytes = T::unit(panel, run, u, v)[lane];
                float scale = T::scale(panel, run, half, v)[lane], minimum = 0;
                if constexpr (T::MINIMA) minimum = T::minimum(panel, run, half, v)[lane];
                for (int i = 0; i < 4; i++, bytes >>= 8) {
                    int value = T::SIGNED ? int8_t(bytes) : int(uint8_t(bytes)) - T::OFFSET;
                    out[i] = scale * float(value) - minimum;  // the product of a MINIMA type is exact in float32
                }
            }
}

// ---- the types by ggml's numbers

struct BlockType {
    int number, inputs, bytes, offset;
    bool halves;
    int num_fields;
    const Field* fields;
    void (*tile)(const Run*, int, const uint8_t*, int64_t, vec (*)[VECS]);
    void (*row)(const uint8_t*, int, int64_t, float*);
};

template <class T>
constexpr BlockType type_of(int number) {
    return {number,    T::INPUTS,      T::BYTES,        Weights<T>::OFFSET, T::HALVES, std::extent<decltype(T::FIELDS)>::value,
            T::FIELDS, tile_blocks<T>, row_of_blocks<T>};
}

constexpr BlockType TYPES[] = {
    type_of<Q4_0>(2),   type_of<Q4_1>(3),    type_of<Q5_0>(6),    type_of<Q5_1>(7),   type_of<Q8_0>(8),
    type_of<Q2_K>(10),  type_of<Q3_K>(11),   type_of<Q4_K>(12),   type_of<Q5_K>(13),  type_of<Q6_K>(14),
    type_of<IQ4_NL>(20), type_of<IQ4_XS>(23), type_of<MXFP4>(39),
};

inline const BlockType* type_numbered(int number) {
    for (const BlockType& type : TYPES)
        if (type.number == number) return &type;
    return nullptr;
}

}  // namespace
