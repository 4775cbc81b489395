// Linear layers on packed weights of one number each, float16 or float32: y = x W^T + bias, in float32 out of registers,
// as gemm.cpp.
//
// A unit is 2 inputs of a panel's outputs. Halves of the panel come one after the other, so that a pass for half of the
// outputs reads whole lines, and each input's numbers lie together, as the instructions that widen them want it:
//
//     [panels][units][2 halves][2 inputs][PANEL / 2]
//
// Rows of x are widened once, before the products.
#pragma once

#include "gemm_tiles.h"

namespace {

struct Pair {
    float first, second;
};

constexpr int HALF_PANEL = PANEL / 2;

// Where output n and input k are in a panel.
INLINE int64_t place(int64_t n, int64_t k) {
    return (k / 2 * 2 + n / HALF_PANEL) * PANEL + k % 2 * HALF_PANEL + n % HALF_PANEL;
}

// Rows as pairs of inputs in float32: unit u of row r of a tile of R rows is number u * R + r of the tile. Cut: Tiles or
// GroupTiles.
template <class T, class Cut>
class WideRows {
   public:
    const Cut& tiles;

    WideRows(const T* x, int64_t stride, const Cut& tiles, int64_t K)
        : tiles(tiles), x_(x), stride_(stride), K_(K), units_(divide_up(K, 2)) {
        pairs_ = scratch<Pair, 0>(tiles.rows * units_);
    }

    // To be called by all threads of a team, each with a copy. With few rows each thread widens all of them, which takes
    // less time than waiting for the others.
    void pack() {
        if (tiles.rows <= most_rows(PREPARE_ALONE)) {
            pairs_ = scratch<Pair, 0>(tiles.rows * units_);
            for (int64_t t = 0; t < tiles.count; t++) pack_tile(t, 0, units_);
            return;
        }
        int64_t pieces = divide_up(units_, UNITS_OF_EACH);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tiles.count * pieces; i++) {
            int64_t first = i % pieces * UNITS_OF_EACH;
            pack_tile(i / pieces, first, std::min(first + UNITS_OF_EACH, units_));
        }
    }

    const Pair* rows(int64_t start) const { return pairs_ + start * units_; }

   private:
    void pack_tile(int64_t t, int64_t first, int64_t last) {
        int64_t start = tiles.start(t), count = tiles.start(t + 1) - start;
        Pair* to = pairs_ + start * units_;
        for (int64_t block = first; block < last; block += AT_ONCE) {
            int64_t size = std::min(AT_ONCE, last - block);
            if constexpr (std::is_same_v<T, float>) {
                if (2 * (block + size) <= K_) {
                    give_pairs(x_ + start * stride_ + 2 * block, stride_, count, size, to + block * count);
                    continue;
                }
            }
            alignas(64) float wide[ROWS * 2 * AT_ONCE];
            for (int64_t r = 0; r < count; r++) {
                const T* row = x_ + (start + r) * stride_ + 2 * block;
                widen(row, std::min(2 * AT_ONCE, K_ - 2 * block), wide + r * 2 * AT_ONCE);
            }
            give_pairs(wide, 2 * AT_ONCE, count, size, to + block * count);
        }
    }

    // rows [count][2 * size], `stride` apart -> pairs [size][count]
    static INLINE void give_pairs(const float* rows, int64_t stride, int64_t count, int64_t size, Pair* pairs) {
        int64_t r = 0;
#if defined(__AVX__)
        for (; r + 4 <= count; r += 4) {
            const float* row = rows + r * stride;
            int64_t u = 0;
            for (; u + 4 <= size; u += 4) {
                __m256d x[4], y[4];
                for (int i = 0; i < 4; i++) x[i] = _mm256_castps_pd(_mm256_loadu_ps(row + i * stride + 2 * u));
                for (int i = 0; i < 2; i++) {
                    y[2 * i] = _mm256_unpacklo_pd(x[2 * i], x[2 * i + 1]);
                    y[2 * i + 1] = _mm256_unpackhi_pd(x[2 * i], x[2 * i + 1]);
                }
                for (int i = 0; i < 2; i++) {
                    Pair* to = pairs + (u + i) * count + r;
                    store_pairs(to, _mm256_permute2f128_pd(y[i], y[2 + i], 0x20));
                    store_pairs(to + 2 * count, _mm256_permute2f128_pd(y[i], y[2 + i], 0x31));
                }
            }
            for (; u < size; u++)
                for (int i = 0; i < 4; i++) copy_pair(pairs + u * count + r + i, row + i * stride + 2 * u);
        }
#endif
        for (; r < count; r++)
            for (int64_t u = 0; u < size; u++) copy_pair(pairs + u * count + r, rows + r * stride + 2 * u);
    }

#if defined(__AVX__)
    static INLINE void store_pairs(Pair* to, __m256d x) {
        _mm256_storeu_ps(reinterpret_cast<float*>(to), _mm256_castpd_ps(x));
    }
#endif

    static INLINE void copy_pair(Pair* to, const float* from) { std::memcpy(to, from, sizeof(Pair)); }

    static INLINE void widen(const T* x, int64_t count, float* wide) {
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) store(wide + i, load(x + i));
        for (; i < 2 * AT_ONCE; i++) wide[i] = i < count ? to_float(x[i]) : 0.0f;
    }

    static constexpr int64_t AT_ONCE = 16;  // units: a line of the cache

    const T* x_;
    int64_t stride_, K_, units_;
    Pair* pairs_;
};

// sums[r][v] += input `number` of a unit of COUNT registers at w, the first of which is number `first` of its panel,
// times that of row r.
template <int R, int COUNT, class T>
INLINE void add_input(vec (&sums)[R][COUNT], const Pair* x, const T* w, int first, int number) {
    vec weights[COUNT];
    for (int v = 0; v < COUNT; v++) weights[v] = load(w + place((first + v) * LANES, number));
    for (int r = 0; r < R; r++) {
        vec input = splat(number ? x[r].second : x[r].first);
        for (int v = 0; v < COUNT; v++) sums[r][v] = add_product(sums[r][v], input, weights[v]);
    }
}

template <int R, class T>
NOINLINE void tile_of_numbers(const Pair* x, const T* panel, int64_t units, vec (&result)[R][VECS], Next next) {
    each_pass<R>([&](int pass, int first, auto count) {
        const Pair* rows = x;
        const T* w = panel;
        const Next asked = next;
        const int64_t of_pass = units;
        vec sums[R][count];
        for (auto& row : sums)
            for (vec& sum : row) sum = vec{};
        for (int64_t u = 0; u < of_pass; u++, w += 2 * PANEL, rows += R) {
            if (pass == 0)
                for (size_t i = 0; i < sizeof(T) / 2; i++) ahead<R>(reinterpret_cast<const uint32_t*>(w) + i * PANEL);
            asked.ask<R>(pass * of_pass + u);
            add_input<R, count>(sums, rows, w, first, 0);
            add_input<R, count>(sums, rows, w, first, 1);
        }
        for (int r = 0; r < R; r++) std::memcpy(result[r] + first, sums[r], sizeof sums[r]);
    });
}

// weight [N, K], rows `stride` apart -> packed, ending in zeros.
template <class T>
void pack_numbers(const T* weight, int64_t stride, int64_t N, int64_t K, T* packed) {
    int64_t units = divide_up(K, 2), panels = divide_up(N, PANEL);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        T* panel = packed + p * units * 2 * PANEL;
        int64_t count = std::min<int64_t>(PANEL, N - p * PANEL);
        if (count < PANEL || K % 2) std::memset(panel, 0, units * 2 * PANEL * sizeof(T));
        for (int64_t k = 0; k < K; k += 32)  // a line of each row
            for (int64_t n = 0; n < count; n++) {
                const T* row = weight + (p * PANEL + n) * stride;
                for (int64_t i = k; i < std::min(k + 32, K); i++) panel[place(n, i)] = row[i];
            }
    }
}

// Rows `ids` of the weight [N, K] that was packed -> [count, K]. Returns whether all ids are in range.
template <class T>
int rows_of_numbers(const T* packed, const int64_t* ids, int64_t count, int64_t N, int64_t K, T* out) {
    int64_t units = divide_up(K, 2);
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= N) return 0;
        const T* panel = packed + ids[i] / PANEL * units * 2 * PANEL;
        for (int64_t k = 0; k < K; k++) out[i * K + k] = panel[place(ids[i] % PANEL, k)];
    }
    return 1;
}

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gated activation. x: rows `x_stride` elements apart; bias: [N]
// or null.
template <class T>
void multiply_numbers(const T* x, int64_t x_stride, int64_t M, const T* packed, int64_t N, int64_t K,
                      const void* bias, int bias_is_float, void* out, int64_t out_stride, int out_is_float,
                      int activation) {
    int64_t units = divide_up(K, 2);
    OutputIn<T> output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Activation(activation)};
    const Tiles tiles(M);
    const WideRows<T, Tiles> shared(x, x_stride, tiles, K);
    Panels panels(output, M <= ROWS_OF_WHOLE_PANELS ? IN_ORDER : PANELS_AT_ONCE);
#pragma omp parallel
    {
        WideRows<T, Tiles> input = shared;
        input.pack();
        each_tile(output, tiles, panels, [&](int64_t p, int64_t start, auto& sums, Following following) {
            constexpr int R = ROWS_OF<decltype(sums)>;
            const Pair* rows = input.rows(start);
            const T* panel = packed + p * units * 2 * PANEL;
            const int64_t words = units * PANEL * int64_t(sizeof(T)) / 2;
            const Next next = following.of<R>(rows, units, reinterpret_cast<const uint32_t*>(panel), words);
            tile_of_numbers<R>(rows, panel, units, sums, next);
        });
    }
}

// out [M, N] = x [M, K] times the weight, and plus the bias, of each row's group, for all groups in one call. Rows are
// sorted by group, rows_per_group of each. packed: [groups] weights, one after the other; bias: [groups][N] or null.
// Returns whether groups have M rows together.
template <class T>
int multiply_groups(const T* x, int64_t x_stride, int64_t M, const int64_t* rows_per_group, int64_t groups,
                    const T* packed, int64_t N, int64_t K, const T* bias, T* out, int64_t out_stride) {
    const GroupTiles tiles(rows_per_group, groups, ROWS);
    if (tiles.rows != M) return 0;
    const int64_t units = divide_up(K, 2), panels = divide_up(N, PANEL);
    const int64_t at_once = panels_of_piece(M, int64_t(tiles.ids.size()), panels), pieces = divide_up(panels, at_once);
    const WideRows<T, GroupTiles> shared(x, x_stride, tiles, K);
#pragma omp parallel
    {
        WideRows<T, GroupTiles> input = shared;
        input.pack();
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < int64_t(tiles.ids.size()) * pieces; task++) {
            const int64_t i = task / pieces, g = tiles.ids[i], first = task % pieces * at_once;
            const OutputIn<T> output{out, out_stride, N, bias ? bias + g * N : nullptr, false, false};
            for (int64_t t = tiles.firsts[i]; t < tiles.firsts[i + 1]; t++) {
                const int64_t start = tiles.start(t);
                with_rows(tiles.start(t + 1) - start, [&](auto constant) {
                    constexpr int R = decltype(constant)::value;
                    const Pair* rows = input.rows(start);
                    for (int64_t p = first; p < std::min(first + at_once, panels); p++) {
                        vec sums[R][VECS];
                        const T* panel = packed + (g * panels + p) * units * 2 * PANEL;
                        const uint32_t* words = reinterpret_cast<const uint32_t*>(panel);
                        tile_of_numbers<R>(rows, panel, units, sums, Following{}.of<R>(rows, units, words, 0));
                        write_tile<R>(output, start, p * PANEL, sums);
                    }
                });
            }
        }
    }
    return 1;
}

}  // namespace
