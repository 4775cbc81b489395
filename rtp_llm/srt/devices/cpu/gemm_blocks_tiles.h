// A tile of rows times a panel of blocks, and rows of the weight.
#pragma once

#include "gemm_blocks_rows.h"
#include "gemm_blocks_large.h"

#include <utility>

namespace {

constexpr int UNITS = RUN / 4;            // of a run
// Rows, and registers of outputs, whose products are computed in turn: there are registers for their sums, and with
// WIDE_FILE for the weights of a run as well, which otherwise lie in the nearest cache.
constexpr bool WIDE_FILE = LANES == 16;
constexpr int ROWS_TOGETHER = 4, TOGETHER = WIDE_FILE ? 1 : 2;
constexpr int LEAST_AHEAD = 4096;         // bytes: distance of the prefetch, but at least a block

// ---- a run of the weights

// Scales of one register of outputs.
template <class T>
struct RunScales {
    static constexpr bool WHOLE = T::WHOLE_SCALES && !HAVE_DOT;
    static constexpr int HALVES = T::HALVES ? 2 : 1, PARTS = WHOLE ? 1 : HALVES;  // of a run; sums of it
    static constexpr bool SHIFTED = T::SIGNED && HAVE_DOT && !DOT_OF_SIGNED;  // weights, by 128, to be unsigned
    static constexpr int OFFSET = SHIFTED ? 128 : T::OFFSET;

    vec scales[PARTS], minima[HALVES];
    ivec levels, level[HALVES];  // WHOLE: the whole numbers of both halves together, and each twice, in 16 bits

    INLINE void read_scales(const uint8_t* block, int run, int v) {
        if constexpr (WHOLE) {
            levels = T::levels(block, run, v), level[0] = first_twice(levels), level[1] = second_twice(levels);
            scales[0] = T::common_scale(block, v);
        } else {
            for (int half = 0; half < HALVES; half++) scales[half] = T::scale(block, run, half, v);
        }
        if constexpr (T::MINIMA)
            for (int half = 0; half < HALVES; half++) minima[half] = T::minimum(block, run, half, v);
    }

    // The sum of pairs, times the whole number of a half's scale if WHOLE.
    INLINE ivec sum_of(svec pairs, int half) const {
        if constexpr (WHOLE) return add_shorts(ivec{}, pairs, level[half]);
        return widened(pairs);
    }

    // From which sums of a run start.
    INLINE ivec start(const Run& x, int part) const {
        if constexpr (!OFFSET) return ivec{};
        if constexpr (!WHOLE) return ivec{} + x.starts[part];
        ivec half = add_shorts(ivec{}, (svec)levels, ivec{} + x.starts[0]);
        return half + half;
    }

    INLINE vec scaled(const ivec (&products)[PARTS], const Run& x) const {
        vec sum = as_float(products[0]) * scales[0];
        if constexpr (PARTS == 2) sum += as_float(products[1]) * scales[1];
        if constexpr (T::MINIMA)
            for (int half = 0; half < HALVES; half++) sum -= minima[half] * splat(x.totals[half]);
        return sum;
    }
};

template <class T>
INLINE ivec unit_of(const uint8_t* block, int run, int u, int v) {
    const ivec unit = T::unit(block, run, u, v);
    return RunScales<T>::SHIFTED ? unit ^ int32_t(0x80808080) : unit;
}

// Of one register of outputs.
template <class T>
struct Weights : RunScales<T> {
    ivec units[UNITS], magnitudes[UNITS];

    INLINE void read(const uint8_t* block, int run, int v) {
#pragma GCC unroll 8
        for (int u = 0; u < UNITS; u++) {
            units[u] = unit_of<T>(block, run, u, v);
            if (T::SIGNED && !HAVE_DOT) magnitudes[u] = magnitudes_of(units[u]);
        }
        this->read_scales(block, run, v);
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
    return sum + w.sum_of(pair, u * Weights<T>::HALVES / UNITS);
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
    constexpr int PARTS = Weights<T>::PARTS, EACH = UNITS / PARTS, HALF = UNITS / Weights<T>::HALVES;
    constexpr int FIT = units_that_fit<T>(HALF);
    if constexpr (WIDE_FILE) {
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
        for (int half = 0; half < Weights<T>::HALVES; half++) {
            const int part = PARTS == 2 ? half : 0;
            ivec sums[R][V];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) sums[r][v] = products[r][v][part];
#pragma GCC unroll 1
            for (int u = half * HALF; u < (half + 1) * HALF; u += STEP)
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
                for (int v = 0; v < V; v++) products[r][v][first / EACH] += w[v].sum_of(sums[r][v], first / HALF);
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
                    products[r][v][part] = w[v].start(x[row + r], part);
    add_products<T, R, V>(w, x + row, products);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            if (RUNS_TOGETHER<T> > 1 && run < RUNS_TOGETHER<T> - 1) {
                to.whole[row + r][first + v] = products[r][v][0];
                continue;
            }
            to.sums[row + r][first + v] += w[v].scaled(products[r][v], x[row + r]) * splat(x[row + r].scale);
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

// Asks for the bytes of a run of the weights that is needed later. Not with a single row: all its bytes are read in
// order, so that the processor itself reads ahead, and faster than if it is told to.
template <class T>
INLINE void ahead_of(const uint8_t* block, int run) {
    constexpr int BLOCK_BYTES = T::BYTES * PANEL, RUN_BYTES = BLOCK_BYTES * RUN / T::INPUTS;
    constexpr int AHEAD = BLOCK_BYTES > LEAST_AHEAD ? BLOCK_BYTES : LEAST_AHEAD;
    for (int at = 0; at < RUN_BYTES; at += 64) __builtin_prefetch(block + run * RUN_BYTES + AHEAD + at, 0, 2);
}

// Adds a value here, not later with all others: GCC would keep what it has to add in memory until then.
template <class V>
INLINE void keep_in_order(V& sum) {
#if defined(__AVX2__)
    asm("" : "+x"(sum));
#elif defined(__aarch64__)
    asm("" : "+w"(sum));
#endif
}

constexpr int SINGLE_TOGETHER = VECS < 4 ? VECS : 4;  // registers of outputs, of a single row

// products[v][part] += bytes of weights, from register `first` on, times those of a row. Weights are read in the order in
// which they lie in memory, and unpacked as they are multiplied.
template <class T>
INLINE void add_products_of_row(const uint8_t* block, int run, int first, const RunScales<T>* scales, const Run& x,
                                ivec (&products)[SINGLE_TOGETHER][RunScales<T>::PARTS]) {
    constexpr int V = SINGLE_TOGETHER, HALF = UNITS / RunScales<T>::HALVES, FIT = units_that_fit<T>(HALF);
    constexpr int EACH = UNITS / RunScales<T>::PARTS;
    constexpr bool IN_TURN = !HAVE_DOT && FIT == UNITS && T::LARGEST == 15;  // halves of a byte: one is read for both
#pragma GCC unroll 8
    for (int begin = 0; begin < UNITS; begin += FIT) {
        svec pairs_of[V];
#pragma GCC unroll 8
        for (int i = begin; i < begin + FIT; i++) {
            const int u = IN_TURN ? i % 2 * (UNITS / 2) + i / 2 : i;
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const ivec unit = unit_of<T>(block, run, u, first + v);
                if constexpr (HAVE_DOT) {
                    products[v][u / EACH] = add_bytes(products[v][u / EACH], unit, x.unit(u));
                } else {
                    const svec added = pairs<T::SIGNED>(unit, T::SIGNED ? magnitudes_of(unit) : unit, x.unit(u));
                    pairs_of[v] = i == begin ? added : pairs_of[v] + added;
                    keep_in_order(pairs_of[v]);
                }
            }
        }
        if constexpr (!HAVE_DOT)
            for (int v = 0; v < V; v++) {
                products[v][begin / EACH] += scales[v].sum_of(pairs_of[v], begin / HALF);
                keep_in_order(products[v][begin / EACH]);
            }
    }
}

template <class T>
INLINE void add_run_to_row(const Run& x, const uint8_t* block, int run, const Sums& to) {
    constexpr int V = SINGLE_TOGETHER;
#pragma GCC unroll 1
    for (int first = 0; first < VECS; first += V) {
        ivec products[V][RunScales<T>::PARTS];
        RunScales<T> scales[V];
        for (int v = 0; v < V; v++) {
            scales[v].read_scales(block, run, first + v);
            for (int part = 0; part < RunScales<T>::PARTS; part++)
                products[v][part] =
                    RUNS_TOGETHER<T> > 1 && run > 0 ? to.whole[0][first + v] : scales[v].start(x, part);
        }
        add_products_of_row<T>(block, run, first, scales, x, products);
        for (int v = 0; v < V; v++) {
            if (RUNS_TOGETHER<T> > 1 && run < RUNS_TOGETHER<T> - 1)
                to.whole[0][first + v] = products[v][0];
            else
                to.sums[0][first + v] += scales[v].scaled(products[v], x) * splat(x.scale);
        }
    }
}

// PERIOD runs times a single row. They are unrolled, so that shifts are by constants.
template <class T, int... RUNS>
INLINE void add_runs_to_row(const Run* x, const uint8_t* block, int begin, const Sums& sums,
                            std::integer_sequence<int, RUNS...>) {
    auto add = [&](auto number) __attribute__((always_inline)) {
        const int run = begin + number;
        if (run % T::PERIOD != number) __builtin_unreachable();
        add_run_to_row<T>(x[run], block, run, sums);
        asm volatile("" : : : "memory");  // otherwise the bytes of all would be read first
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
#pragma GCC unroll 1
            for (int begin = 0; begin < RUNS; begin += T::PERIOD)
                add_runs_to_row<T>(x, panel, begin, sums, std::make_integer_sequence<int, T::PERIOD>{});
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
    int number, inputs, bytes;
    void (*arrange)(const uint8_t*, uint8_t*);  // null: the fields of a block are as in its file
    int num_fields;
    const Field* fields;
    RunTotals totals;
    int together;  // runs of x that have one scale
    void (*tile)(const Run*, int, const uint8_t*, int64_t, const Sums&);
    void (*row)(const uint8_t*, int, int64_t, float*);
};

template <class T>
constexpr BlockType type_of(int number) {
    return {number,
            T::INPUTS,
            T::BYTES,
            arrange_of<T>(nullptr),
            std::extent<decltype(T::FIELDS)>::value,
            T::FIELDS,
            {Weights<T>::OFFSET, T::HALVES, Weights<T>::WHOLE && Weights<T>::OFFSET != 0},
            RUNS_TOGETHER<T>,
            tile_blocks<T>,
            row_of_blocks<T>};
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
