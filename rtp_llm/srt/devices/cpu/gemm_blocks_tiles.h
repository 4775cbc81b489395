// A tile of rows times a panel of blocks, and rows of the weight.
#pragma once

#include "gemm_blocks_rows.h"
#include "gemm_blocks_types.h"

#include <utility>

namespace {

constexpr int UNITS = RUN / 4;            // of a run
// Rows, and registers of outputs, whose products are computed in turn: there are registers for their sums, and with
// WIDE_FILE for the weights of a run as well, which otherwise lie in the nearest cache.
constexpr bool WIDE_FILE = LANES == 16;
constexpr int ROWS_TOGETHER = 4, TOGETHER = WIDE_FILE ? 1 : 2;
constexpr int LEAST_AHEAD = 4096;         // bytes: distance of the prefetch, but at least a block

// ---- a run of the weights

// Of one register of outputs.
template <class T>
struct Weights {
    static constexpr int PARTS = T::HALVES ? 2 : 1;  // of a run, with a scale each
    static constexpr bool SHIFTED = T::SIGNED && HAVE_DOT && !DOT_OF_SIGNED;  // by 128, to be unsigned
    static constexpr int OFFSET = SHIFTED ? 128 : T::OFFSET;

    ivec units[UNITS], magnitudes[UNITS];
    vec scales[PARTS], minima[PARTS];

    INLINE void read(const uint8_t* block, int run, int v) {
        for (int u = 0; u < UNITS; u++) {
            units[u] = T::unit(block, run, u, v);
            if (T::SIGNED && !HAVE_DOT) magnitudes[u] = magnitudes_of(units[u]);
            if (SHIFTED) units[u] ^= int32_t(0x80808080);
        }
        for (int part = 0; part < PARTS; part++) {
            scales[part] = T::scale(block, run, part, v);
            if constexpr (T::MINIMA) minima[part] = T::minimum(block, run, part, v);
        }
    }
};

// Runs of x, a whole block's, that have one scale, so that their products are added as whole numbers. Blocks of 256 inputs
// have more scales than one.
template <class T>
constexpr int RUNS_TOGETHER = T::INPUTS < 256 ? T::INPUTS / RUN : 1;

// sum + COUNT units of weights from u on times those of a row.
template <class T, int COUNT>
INLINE ivec add_units(ivec sum, const Weights<T>& w, const Run& x, int u) {
    if constexpr (HAVE_DOT) {
        for (int i = u; i < u + COUNT; i++) sum = add_bytes(sum, w.units[i], x.unit(i));
        return sum;
    }
    svec pair = pairs<T::SIGNED>(w.units[u], w.magnitudes[u], x.unit(u));
    for (int i = u + 1; i < u + COUNT; i++) pair += pairs<T::SIGNED>(w.units[i], w.magnitudes[i], x.unit(i));
    return sum + widened(pair);
}

// Units whose sums are of 16 bits.
template <class T>
constexpr int units_that_fit(int most) {
    int fit = 32767 / (T::LARGEST * 127 * 2);
    return HAVE_DOT || fit >= most ? most : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

// products[r][v][part] += bytes of weights times those of row r.
template <class T, int R, int V>
INLINE void add_products(const Weights<T>* w, const Run* x, ivec (&products)[R][V][Weights<T>::PARTS]) {
    constexpr int PARTS = Weights<T>::PARTS, EACH = UNITS / PARTS, FIT = units_that_fit<T>(EACH);
    if constexpr (WIDE_FILE || V == 1) {
        constexpr int STEP = HAVE_DOT ? 1 : FIT;
        for (int u = 0; u < UNITS; u += STEP)
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++)
                    products[r][v][u / EACH] = add_units<T, STEP>(products[r][v][u / EACH], w[v], x[r], u);
        return;
    }
    // Unrolled, loops would have more values in use than there are registers.
    if constexpr (HAVE_DOT || FIT <= 2) {
        constexpr int STEP = HAVE_DOT ? 1 : FIT;
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
            ivec sums[R][V];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) sums[r][v] = products[r][v][part];
#pragma GCC unroll 1
            for (int u = part * EACH; u < (part + 1) * EACH; u += STEP)
                for (int r = 0; r < R; r++)
                    for (int v = 0; v < V; v++) sums[r][v] = add_units<T, STEP>(sums[r][v], w[v], x[r], u);
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) products[r][v][part] = sums[r][v];
        }
    } else {
#pragma GCC unroll 2
        for (int first = 0; first < UNITS; first += FIT) {
            svec sums[R][V];
            for (auto& row : sums)
                for (svec& sum : row) sum = svec{};
#pragma GCC unroll 1
            for (int u = first; u < first + FIT; u++)
                for (int v = 0; v < V; v++)
                    for (int r = 0; r < R; r++)
                        sums[r][v] += pairs<T::SIGNED>(w[v].units[u], w[v].magnitudes[u], x[r].unit(u));
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) products[r][v][first / EACH] += widened(sums[r][v]);
        }
    }
}

// The sums of a tile: [rows][VECS]. `whole` are those of a block's earlier runs, if runs of x have a scale together.
struct Sums {
    vec (*sums)[VECS];
    ivec (*whole)[VECS];
};

// Adds weights times R rows to V registers from v on.
template <class T, int R, int V = TOGETHER>
INLINE void add_rows(const Weights<T>* w, const Run* x, int run, const Sums& to, int row, int first) {
    constexpr int PARTS = Weights<T>::PARTS;
    ivec products[R][V][PARTS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            for (int part = 0; part < PARTS; part++)
                if (RUNS_TOGETHER<T> > 1 && run > 0)
                    products[r][v][part] = to.whole[row + r][first + v];
                else
                    products[r][v][part] = ivec{} + (Weights<T>::OFFSET ? x[row + r].starts[part] : 0);
    add_products<T, R, V>(w, x + row, products);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            if (RUNS_TOGETHER<T> > 1 && run < RUNS_TOGETHER<T> - 1) {
                to.whole[row + r][first + v] = products[r][v][0];
                continue;
            }
            const Run& of_row = x[row + r];
            vec sum = as_float(products[r][v][0]) * w[v].scales[0];
            if constexpr (PARTS == 2) sum += as_float(products[r][v][1]) * w[v].scales[1];
            if constexpr (T::MINIMA)
                for (int part = 0; part < PARTS; part++) sum -= w[v].minima[part] * splat(of_row.totals[part]);
            to.sums[row + r][first + v] += sum * splat(of_row.scale);
        }
}

// ---- tiles

template <class T>
INLINE void add_run(const Run* x, int rows, const uint8_t* block, int run, const Sums& sums) {
    for (int v = 0; v < VECS; v += TOGETHER) {
        Weights<T> w[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) w[i].read(block, run, v + i);
        int r = 0;
        for (; r + ROWS_TOGETHER <= rows; r += ROWS_TOGETHER) add_rows<T, ROWS_TOGETHER>(w, x, run, sums, r, v);
        if (r + 2 <= rows) add_rows<T, 2>(w, x, run, sums, r, v), r += 2;
        if (r < rows) add_rows<T, 1>(w, x, run, sums, r, v);
    }
}

// Asks for the bytes of a run of the weights that is needed later.
template <class T>
INLINE void ahead_of(const uint8_t* block, int run) {
    constexpr int BLOCK_BYTES = T::BYTES * PANEL, RUN_BYTES = BLOCK_BYTES * RUN / T::INPUTS;
    constexpr int AHEAD = BLOCK_BYTES > LEAST_AHEAD ? BLOCK_BYTES : LEAST_AHEAD;
    for (int at = 0; at < RUN_BYTES; at += 64) __builtin_prefetch(block + run * RUN_BYTES + AHEAD + at, 0, 2);
}

// A block times a single row: unpacking takes most of the time. Runs are unrolled, so that shifts are by constants.
template <class T, int... RUNS>
INLINE void add_block_to_row(const Run* x, const uint8_t* block, const Sums& sums, std::integer_sequence<int, RUNS...>) {
    auto add = [&](auto run) __attribute__((always_inline)) {
        ahead_of<T>(block, run);
#pragma GCC unroll 1
        for (int v = 0; v < VECS; v++) {
            Weights<T> w;
            w.read(block, run, v);
            add_rows<T, 1, 1>(&w, x + run, run, sums, 0, v);
        }
        asm volatile("" : : : "memory");  // otherwise all runs' bytes would be asked for and read first
    };
    (add(std::integral_constant<int, RUNS>{}), ...);
}

// blocks: of one output.
template <class T>
void tile_blocks(const Run* x, int rows, const uint8_t* panel, int64_t blocks, const Sums& given) {
    constexpr int BLOCK_BYTES = T::BYTES * PANEL, RUNS = T::INPUTS / RUN;
    const Sums sums = given;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECS; v++) sums.sums[r][v] = vec{};
    if (rows == 1) {
        for (int64_t b = 0; b < blocks; b++, panel += BLOCK_BYTES, x += RUNS)
            add_block_to_row<T>(x, panel, sums, std::make_integer_sequence<int, RUNS>{});
        return;
    }
    for (int64_t b = 0; b < blocks; b++, panel += BLOCK_BYTES)
        for (int run = 0; run < RUNS; run++, x += rows) {
            ahead_of<T>(panel, run);
            add_run<T>(x, rows, panel, run, sums);
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

// ---- the types by their numbers: ggml's, and from 1000 on our own

struct BlockType {
    int number, inputs, bytes, offset;
    bool halves;
    int num_fields;
    const Field* fields;
    int together;  // runs of x that have one scale
    void (*tile)(const Run*, int, const uint8_t*, int64_t, const Sums&);
    void (*row)(const uint8_t*, int, int64_t, float*);
};

template <class T>
constexpr BlockType type_of(int number) {
    return {number,      T::INPUTS,      T::BYTES,        Weights<T>::OFFSET, T::HALVES, std::extent<decltype(T::FIELDS)>::value,
            T::FIELDS,   RUNS_TOGETHER<T>, tile_blocks<T>, row_of_blocks<T>};
}

constexpr BlockType TYPES[] = {
    type_of<Q4_0>(2),   type_of<Q4_1>(3),    type_of<Q5_0>(6),    type_of<Q5_1>(7),   type_of<Q8_0>(8),
    type_of<Q2_K>(10),  type_of<Q3_K>(11),   type_of<Q4_K>(12),   type_of<Q5_K>(13),  type_of<Q6_K>(14),
    type_of<IQ4_NL>(20), type_of<IQ4_XS>(23), type_of<MXFP4>(39), type_of<Int4<16, true>>(1000),
    type_of<Int4<32, true>>(1001), type_of<Int4<128, false>>(1002), type_of<Int4<128, true>>(1003),
};

inline const BlockType* type_numbered(int number) {
    for (const BlockType& type : TYPES)
        if (type.number == number) return &type;
    return nullptr;
}

}  // namespace
