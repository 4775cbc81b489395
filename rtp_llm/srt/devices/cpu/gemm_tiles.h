// Results, and one tile of rows times one panel.
#pragma once

#include "gemm_matrix.h"
#include "gemm_rows.h"

namespace {

// ---- results

// What outputs go through. A gated activation is a function of the first half of them, times the second half.
enum Activation { NO_ACTIVATION, SILU_AND_MUL, GELU_TANH_AND_MUL, GELU };

// Not inline: a tile has dozens of vectors.
static NOINLINE vec activated(vec x) { return gelu(x); }

template <class H>  // the results' and biases' type, where it is not float32
struct OutputIn {
    void* data;
    int64_t stride, columns;  // columns: outputs of the weight
    const void* bias;  // [columns] or null
    bool is_float, bias_is_float;
    Activation activation = NO_ACTIVATION;

    INLINE bool is_gated() const { return activation == SILU_AND_MUL || activation == GELU_TANH_AND_MUL; }

    INLINE void write(int64_t row, int64_t column, vec value) const {
        if (column >= columns) return;
        int count = int(std::min<int64_t>(columns - column, LANES));
        value = with_bias(value, column, count);
        if (activation == GELU) value = activated(round(value));
        put(row * stride + column, value, count);
    }

    // Writes a whole panel of R rows, as ``write`` does.
    template <int R>
    INLINE void write_panel(int64_t row, int64_t column, const vec (&values)[R][VECS]) const {
        vec biases[VECS] = {};
        for (int v = 0; v < VECS && bias; v++) biases[v] = with_bias(vec{}, column + v * LANES, LANES);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++) {
                vec value = values[r][v] + biases[v];
                if (activation == GELU) value = activated(round(value));
                put((row + r) * stride + column + v * LANES, value, LANES);
            }
    }

    // Applies a gated activation to a vector of columns of the first half and those of the second, with the roundings
    // of separate operations.
    INLINE void write_gated(int64_t row, int64_t column, vec first, vec second) const {
        first = round(with_bias(first, column, LANES));
        second = round(with_bias(second, columns / 2 + column, LANES));
        put(row * stride + column, round(activation == SILU_AND_MUL ? silu(first) : gelu_tanh(first)) * second, LANES);
    }

    // Asks for the memory of a panel's results in `rows` rows, so that writing need not wait for it.
    INLINE void ask(int64_t row, int64_t rows, int64_t column) const {
        const int64_t size = is_float ? 4 : sizeof(H);
        char* at = static_cast<char*>(data) + (row * stride + column) * size;
        for (int64_t r = 0; r < rows; r++, at += stride * size)
            for (int64_t i = 0; i < PANEL * size; i += 64) __builtin_prefetch(at + i, 1, 3);
    }

   private:
    INLINE vec with_bias(vec value, int64_t column, int count) const {
        if (!bias) return value;
        return value + (bias_is_float ? read(static_cast<const float*>(bias) + column, count)
                                      : read(static_cast<const H*>(bias) + column, count));
    }

    INLINE vec round(vec value) const { return is_float ? value : rounded<H>(value); }

    INLINE void put(int64_t at, vec value, int count) const {
        if (is_float)
            write_to(static_cast<float*>(data) + at, value, count);
        else
            write_to(static_cast<H*>(data) + at, value, count);
    }

    template <class T>
    static INLINE vec read(const T* p, int count) {
        return count == LANES ? load(p) : load_part(p, count);
    }

    template <class T>
    static INLINE void write_to(T* p, vec value, int count) {
        count == LANES ? store(p, value) : store_part(p, value, count);
    }
};

using Output = OutputIn<bf16>;

// The number of rows of a tile's sums.
template <class Sums>
constexpr int ROWS_OF = std::extent<std::remove_reference_t<Sums>>::value;

// Calls f(constant) with the number of rows as a constant.
template <int R = ROWS, class F>
INLINE void with_rows(int64_t rows, F&& f) {
    if constexpr (R >= 1) {
        if (rows == R)
            f(std::integral_constant<int, R>{});
        else
            with_rows<R - 1>(rows, f);
    }
}

// ---- one tile of rows times one panel

// Passes over a panel of a tile of R rows, each for the outputs for whose sums there is room.
template <int R>
constexpr int PASSES = R <= ROWS_OF_WHOLE_PANELS ? 1 : VECS / HALF;

// Data of the next tile, to be prefetched: `step` words for each unit of each pass.
struct Next {
    const uint32_t* at;
    int step;

    template <int R>
    INLINE void ask(int64_t unit) const {
        if (R >= FEWEST_THAT_ASK)
            for (int i = 0; i < step; i += 32) __builtin_prefetch(at + unit * step + i, 0, 2);
    }
};

// Data that a tile can prefetch: part `part` of `parts` of the panel that is `panels` further on, or, if 0, the next
// tile's rows.
struct Following {
    int64_t panels;
    int part, parts;

    template <int R, class T>
    INLINE Next of(const T* x, int64_t units, const uint32_t* panel, int64_t words) const {
        if (panels) return {panel + panels * words + part * words / parts, int(words / units) / parts / PASSES<R>};
        return {reinterpret_cast<const uint32_t*>(x + units * R), R * int(sizeof(T) / 4) / PASSES<R>};
    }
};

// Calls f(number, first, count) for each pass: registers of outputs [first, first + count).
template <int R, class F>
INLINE void each_pass(F&& f) {
    constexpr int COUNT = VECS / PASSES<R>;
    for (int pass = 0; pass < PASSES<R>; pass++) f(pass, pass * COUNT, std::integral_constant<int, COUNT>{});
}

// As tile_bf16 and tile_int8, by matrix instructions. S: vec or ivec.
template <int R, class S>
INLINE void tile_of_squares(const uint32_t* x, const uint32_t* panel, int64_t units, S (&result)[R][VECS], Next next) {
    each_pass<R>([&](int pass, int first, auto count) {
        S sums[R][count];
        multiply_squares<R, count>(x, panel + first * LANES, units, sums, [&](int64_t u, const uint32_t* w) {
            if (pass == 0) ahead<R>(w);
            next.ask<R>(pass * units + u);
        });
        for (int r = 0; r < R; r++) std::memcpy(result[r] + first, sums[r], sizeof sums[r]);
    });
}

template <int R>
NOINLINE void tile_bf16(const UnitOf<R>* x, const uint32_t* panel, int64_t units, vec (&result)[R][VECS], Next next) {
    if constexpr (HAVE_MATRIX_OF_BF16 && R >= FEWEST_OF_MATRIX) return tile_of_squares(x, panel, units, result, next);
    each_pass<R>([&](int pass, int first, auto count) {
        const UnitOf<R>* rows = x;
        const Next asked = next;
        const int64_t of_pass = units;
        vec sums[R][count];
        for (auto& row : sums)
            for (vec& sum : row) sum = vec{};
        const uint32_t* w = panel + first * LANES;
        for (int64_t u = 0; u < of_pass; u++, w += PANEL, rows += R) {
            if (pass == 0) ahead<R>(w);
            asked.ask<R>(pass * of_pass + u);
            add_unit<R, count>(sums, rows, w);
        }
        for (int r = 0; r < R; r++) std::memcpy(result[r] + first, sums[r], sizeof sums[r]);
    });
}

template <int R>
NOINLINE void tile_int8(const FourOf<R>* x, const uint32_t* panel, int64_t units, ivec (&result)[R][VECS], Next next) {
    if constexpr (HAVE_MATRIX_OF_BYTES && R >= FEWEST_OF_MATRIX) return tile_of_squares(x, panel, units, result, next);
    each_pass<R>([&](int pass, int first, auto count) {
        ivec sums[R][count];
        for (auto& row : sums)
            for (ivec& sum : row) sum = ivec{};
        for (int64_t u = 0; u < units; u++) {
            const uint32_t* w = panel + u * PANEL + first * LANES;
            if (pass == 0) ahead<R>(w);
            next.ask<R>(pass * units + u);
            add_fours<R, count>(sums, x + u * R, w);
        }
        for (int r = 0; r < R; r++) std::memcpy(result[r] + first, sums[r], sizeof sums[r]);
    });
}

template <int R, class H>
INLINE void write_tile(const OutputIn<H>& out, int64_t row, int64_t column, const vec (&sums)[R][VECS]) {
    if (column + PANEL <= out.columns) return out.template write_panel<R>(row, column, sums);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECS; v++) out.write(row + r, column + v * LANES, sums[r][v]);
}

template <int R, class H>
INLINE void write_tile_gated(
    const OutputIn<H>& out, int64_t row, int64_t column, const vec (&first)[R][VECS], const vec (&second)[R][VECS]
) {
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECS; v++) out.write_gated(row + r, column + v * LANES, first[r][v], second[r][v]);
}

constexpr int64_t IN_ORDER = INT64_MAX;  // panels that a thread takes: most of its share

// Panels of outputs, which the threads of a team take: several at a time, and fewer towards the end, so that all end
// together. With a gated activation, whose halves are whole panels, a panel of the first half includes that of the
// second.
//
// most: panels taken at once. IN_ORDER is for few rows, whose time is that of reading the weight: wherever a thread begins
// to read, it waits until the processor reads ahead.
class Panels {
   public:
    const int64_t count;

    template <class H>
    explicit Panels(const OutputIn<H>& out, int64_t most = PANELS_AT_ONCE)
        : count(out.is_gated() ? out.columns / 2 / PANEL : divide_up(out.columns, PANEL)),
          most_(most == IN_ORDER || !out.is_gated() ? most : std::max<int64_t>(1, most / 2)) {}

    // Takes panels [first, last); false if none were left.
    bool take(int64_t& first, int64_t& last) {
        first = next_.load(std::memory_order_relaxed);
        do {
            if (first >= count) return false;
            last = first + std::max<int64_t>(1, part_of(count - first));
        } while (!next_.compare_exchange_weak(first, last, std::memory_order_relaxed));
        return true;
    }

   private:
    int64_t part_of(int64_t left) const {
        const int64_t quarters = 4 * omp_get_num_threads();
        return most_ == IN_ORDER ? left * 3 / quarters : std::min(most_, left / quarters);
    }

    const int64_t most_;
    std::atomic<int64_t> next_{0};
};

// Panels that a thread takes at once of several weights of `panels` each: with few rows for a weight a longer stretch, as
// IN_ORDER, but so that every thread takes eight.
inline int64_t panels_of_piece(int64_t rows, int64_t weights, int64_t panels) {
    if (rows > ROWS_OF_WHOLE_PANELS * weights) return PANELS_AT_ONCE;
    return std::max<int64_t>(PANELS_AT_ONCE, std::min(panels, weights * panels / (8 * omp_get_max_threads())));
}

// Computes every tile of rows by every panel; to be called by all threads of a team. tile(panel, first row, sums,
// following) computes one.
//
// With few tiles, all are multiplied with a panel while the next one is read from memory, as the passes of a single tile
// are: otherwise the first one would wait for memory, and the others for the multipliers. With many, each is multiplied
// with several panels in turn.
template <class H, class F>
void each_tile(const OutputIn<H>& out, const Tiles& tiles, Panels& panels, F&& tile) {
    auto compute = [&](int64_t p, int64_t t, Following following) {
        int64_t start = tiles.start(t);
        with_rows(tiles.start(t + 1) - start, [&](auto constant) {
            constexpr int R = decltype(constant)::value;
            vec sums[R][VECS], others[R][VECS];
            out.ask(start, R, p * PANEL);
            tile(p, start, sums, following);
            if (out.is_gated()) {
                tile(panels.count + p, start, others, following);
                write_tile_gated<R>(out, start, p * PANEL, sums, others);
            } else {
                write_tile<R>(out, start, p * PANEL, sums);
            }
        });
    };
    // A thread takes its next panels early, to prefetch them, unless no panels would be left for the others.
    const bool passes = tiles.count > 1 || (VECS > HALF && tiles.rows > ROWS_OF_WHOLE_PANELS);
    const bool few = passes && tiles.rows <= most_rows(PANEL_BY_PANEL);
    const int parts = int(std::min<int64_t>(tiles.count, 2));
    const bool early = few && panels.count >= 4 * omp_get_num_threads();
    int64_t first, last, next_first = 0, next_last = 0;
    bool taken = panels.take(first, last);
    while (taken) {
        bool next_taken = early && panels.take(next_first, next_last);
        if (few) {
            for (int64_t p = first; p < last; p++) {
                int64_t next = p + 1 < last ? p + 1 : next_taken ? next_first : p;
                for (int64_t t = 0; t < tiles.count; t++)
                    compute(p, t, t < parts ? Following{next - p, int(t), parts} : Following{});
            }
        } else {
            for (int64_t t = 0; t < tiles.count; t++)
                for (int64_t p = first; p < last; p++) compute(p, t, Following{});
        }
        taken = early ? next_taken : panels.take(first, last);
        if (early) first = next_first, last = next_last;
    }
}

}  // namespace
