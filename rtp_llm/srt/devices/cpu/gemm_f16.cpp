// Linear layers on packed float16 weights: y = x W^T + bias, in float32 out of registers, as gemm.cpp.
//
// A unit is 2 inputs of a panel's outputs. Halves of the panel come one after the other, so that a pass for half of the
// outputs reads whole lines, and each input's numbers lie together, as the instructions that widen them want it:
//
//     [panels][units][2 halves][2 inputs][PANEL / 2]
//
// Rows of x are widened once, before the products.
#include "gemm_tiles.h"
#include "replay.h"

namespace {

struct Pair {
    float first, second;
};

constexpr int HALF_PANEL = PANEL / 2;

// Where output n and input k are in a panel.
INLINE int64_t place(int64_t n, int64_t k) {
    return (k / 2 * 2 + n / HALF_PANEL) * PANEL + k % 2 * HALF_PANEL + n % HALF_PANEL;
}

// Rows as pairs of inputs in float32: unit u of row r of a tile of R rows is number u * R + r of the tile.
class WideRows {
   public:
    const Tiles tiles;

    WideRows(const f16* x, int64_t stride, int64_t M, int64_t K)
        : tiles(M), x_(x), stride_(stride), K_(K), units_(divide_up(K, 2)), pairs_(scratch<Pair, 0>(M * units_)) {}

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
            int64_t end = std::min(block + AT_ONCE, last);
            for (int64_t r = 0; r < count; r++) {
                alignas(64) float wide[2 * AT_ONCE];
                widen(x_ + (start + r) * stride_ + 2 * block, std::min(2 * AT_ONCE, K_ - 2 * block), wide);
                for (int64_t u = block; u < end; u++) std::memcpy(to + u * count + r, wide + 2 * (u - block), sizeof(Pair));
            }
        }
    }

    static INLINE void widen(const f16* x, int64_t count, float* wide) {
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) store(wide + i, load(x + i));
        for (; i < 2 * AT_ONCE; i++) wide[i] = i < count ? to_float(x[i]) : 0.0f;
    }

    static constexpr int64_t AT_ONCE = 16;  // units: a line of the cache

    const f16* x_;
    int64_t stride_, K_, units_;
    Pair* pairs_;
};

// sums[r][v] += input `number` of a unit of COUNT registers at w, the first of which is number `first` of its panel,
// times that of row r.
template <int R, int COUNT>
INLINE void add_input(vec (&sums)[R][COUNT], const Pair* x, const f16* w, int first, int number) {
    vec weights[COUNT];
    for (int v = 0; v < COUNT; v++) weights[v] = load(w + place((first + v) * LANES, number));
    for (int r = 0; r < R; r++) {
        vec input = splat(number ? x[r].second : x[r].first);
        for (int v = 0; v < COUNT; v++) sums[r][v] = add_product(sums[r][v], input, weights[v]);
    }
}

template <int R>
NOINLINE void tile_f16(const Pair* x, const f16* panel, int64_t units, vec (&result)[R][VECS], Next next) {
    each_pass<R>([&](int pass, int first, auto count) {
        const Pair* rows = x;
        const f16* w = panel;
        const Next asked = next;
        const int64_t of_pass = units;
        vec sums[R][count];
        for (auto& row : sums)
            for (vec& sum : row) sum = vec{};
        for (int64_t u = 0; u < of_pass; u++, w += 2 * PANEL, rows += R) {
            if (pass == 0) ahead<R>(reinterpret_cast<const uint32_t*>(w));
            asked.ask<R>(pass * of_pass + u);
            add_input<R, count>(sums, rows, w, first, 0);
            add_input<R, count>(sums, rows, w, first, 1);
        }
        for (int r = 0; r < R; r++) std::memcpy(result[r] + first, sums[r], sizeof sums[r]);
    });
}

}  // namespace

// weight [N, K], rows `stride` apart -> packed, ending in zeros.
KERNEL void pack_f16(const f16* weight, int64_t stride, int64_t N, int64_t K, f16* packed) {
    int64_t units = divide_up(K, 2), panels = divide_up(N, PANEL);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        f16* panel = packed + p * units * 2 * PANEL;
        int64_t count = std::min<int64_t>(PANEL, N - p * PANEL);
        if (count < PANEL || K % 2) std::memset(panel, 0, units * 2 * PANEL * sizeof(f16));
        for (int64_t k = 0; k < K; k += 32)  // a line of each row
            for (int64_t n = 0; n < count; n++)
                for (int64_t i = k; i < std::min(k + 32, K); i++) panel[place(n, i)] = weight[(p * PANEL + n) * stride + i];
    }
}

// Rows `ids` of the weight [N, K] that was packed -> [count, K]. Returns whether all ids are in range.
KERNEL int rows_f16(const f16* packed, const int64_t* ids, int64_t count, int64_t N, int64_t K, f16* out) {
    int64_t units = divide_up(K, 2);
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= N) return 0;
        const f16* panel = packed + ids[i] / PANEL * units * 2 * PANEL;
        for (int64_t k = 0; k < K; k++) out[i * K + k] = panel[place(ids[i] % PANEL, k)];
    }
    return 1;
}

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gate. x: rows `x_stride` elements apart; bias: [N] or null.
KERNEL void gemm_f16(const f16* x, int64_t x_stride, int64_t M, const f16* packed, int64_t N, int64_t K,
                     const void* bias, int bias_is_float, void* out, int64_t out_stride, int out_is_float, int gate) {
    int64_t units = divide_up(K, 2);
    OutputIn<f16> output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Gate(gate)};
    const WideRows shared(x, x_stride, M, K);
    Panels panels(output);
#pragma omp parallel
    {
        WideRows input = shared;
        input.pack();
        each_tile(output, input.tiles, panels, [&](int64_t p, int64_t start, auto& sums, Following following) {
            constexpr int R = ROWS_OF<decltype(sums)>;
            const Pair* rows = input.rows(start);
            const f16* panel = packed + p * units * 2 * PANEL;
            tile_f16<R>(rows, panel, units, sums,
                        following.of<R>(rows, units, reinterpret_cast<const uint32_t*>(panel), units * PANEL));
        });
    }
}

// ---- calls from a list

REPLAYED(rows_f16)
REPLAYED(gemm_f16)
