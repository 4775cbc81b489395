// Linear layers on packed weights: y = x W^T + bias, for bfloat16 and int8 weights.
//
// A weight [N, K] is packed into panels of PANEL outputs. Within a panel the inputs run slowest, a few of them together
// in 32 bits (a *unit*: two bfloat16 or four int8), so that a panel is read once from its start to its end and every
// load fills whole registers:
//
//     bfloat16  [panels][units][PANEL][2]            a unit is 2 inputs
//     int8      [panels][units][PANEL][4]            a unit is 4 inputs
//
// Up to ROWS rows of x at a time are multiplied with one panel, with all sums in registers: with few rows the time is
// that of reading the weights, with many that of the multiplications. Many rows are first copied to the order in which
// they are read. Threads share the panels; a row's result depends only on that row.
#include "gemm_tiles.h"
#include "replay.h"

KERNEL int64_t panel_size() { return PANEL; }

constexpr int64_t UNITS_PACKED = 16;  // of a row at a time: a line of the cache

// Rows of `size` bytes, `stride` apart, of which there are `num_rows` -> the units of a panel [units][PANEL][4 bytes],
// ending in zeros.
static void pack_units(const char* rows, int64_t stride, int64_t num_rows, int64_t size, int64_t units, char* panel) {
    for (int64_t start = 0; start < units; start += UNITS_PACKED) {
        int64_t end = std::min(start + UNITS_PACKED, units), whole = std::min(end, size / 4);
        for (int64_t n = 0; n < PANEL; n++) {
            const char* row = rows + n * stride;
            bool there = n < num_rows;
            int64_t unit = start;
            if (there)
                for (; unit < whole; unit++) std::memcpy(panel + (unit * PANEL + n) * 4, row + unit * 4, 4);
            for (; unit < end; unit++) {
                std::memset(panel + (unit * PANEL + n) * 4, 0, 4);
                if (there && unit * 4 < size) std::memcpy(panel + (unit * PANEL + n) * 4, row + unit * 4, size % 4);
            }
        }
    }
}

// ---- bfloat16

// weight [N, K], rows `stride` apart -> packed [panels][ceil(K / 2)][PANEL][2], ending in zeros.
KERNEL void pack_bf16(const bf16* weight, int64_t stride, int64_t N, int64_t K, bf16* packed) {
    int64_t units = divide_up(K, 2), panels = divide_up(N, PANEL);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++)
        pack_units(reinterpret_cast<const char*>(weight + p * PANEL * stride), 2 * stride, N - p * PANEL, 2 * K, units,
                   reinterpret_cast<char*>(packed + p * units * PANEL * 2));
}

// Rows `ids` of the weight [N, K] that was packed -> [count, K]. Returns whether all ids are in range.
KERNEL int rows_bf16(const bf16* packed, const int64_t* ids, int64_t count, int64_t N, int64_t K, bf16* out) {
    int64_t units = divide_up(K, 2);
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= N) return 0;
        const bf16* row = packed + (ids[i] / PANEL) * units * PANEL * 2 + (ids[i] % PANEL) * 2;
        for (int64_t k = 0; k < K; k++) out[i * K + k] = row[(k / 2) * PANEL * 2 + k % 2];
    }
    return 1;
}

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gate. x: rows `x_stride` elements apart; bias: [N] or null.
KERNEL void gemm_bf16(const bf16* x, int64_t x_stride, int64_t M, const bf16* packed, int64_t N, int64_t K,
                      const void* bias, int bias_is_float, void* out, int64_t out_stride, int out_is_float, int gate) {
    int64_t units = divide_up(K, 2);
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Gate(gate)};
    Input input(x, x_stride, M, K);
    Panels panels(output);
#pragma omp parallel
    {
        input.pack();
        each_tile(output, input.tiles, panels, [&](int64_t p, int64_t start, auto& sums, Following following) {
            constexpr int R = ROWS_OF<decltype(sums)>;
            const auto* rows = input.rows<R>(start);
            const uint32_t* panel = reinterpret_cast<const uint32_t*>(packed) + p * units * PANEL;
            tile_bf16<R>(rows, panel, units, sums, following.of<R>(rows, units, panel, units * PANEL));
        });
    }
}

// out [M, N] = x [M, K] times a weight and plus a bias of each row's group, for all groups in one call. Rows are sorted
// by group, rows_per_group of each. packed: [groups] weights, one after the other; bias: [groups][N] bfloat16 or null.
// Returns whether groups have M rows together.
KERNEL int grouped_gemm_bf16(const bf16* x, int64_t x_stride, int64_t M, const int64_t* rows_per_group, int64_t groups,
                             const bf16* packed, int64_t N, int64_t K, const bf16* bias, bf16* out,
                             int64_t out_stride) {
    int64_t rows = 0;
    for (int64_t g = 0; g < groups; g++) rows += rows_per_group[g];
    if (rows != M) return 0;
    int64_t units = divide_up(K, 2), panels = divide_up(N, PANEL), pieces = divide_up(panels, PANELS_AT_ONCE);
    Unit* memory = scratch<Unit, 0>(M * units);
    std::vector<int64_t> ids, starts;  // of groups with rows
    std::vector<Input> inputs;
    for (int64_t g = 0, start = 0; g < groups; start += rows_per_group[g++]) {
        if (rows_per_group[g] == 0) continue;
        ids.push_back(g);
        starts.push_back(start);
        inputs.emplace_back(x + start * x_stride, x_stride, rows_per_group[g], K, memory + start * units);
    }
    int64_t tasks = int64_t(ids.size()) * pieces;
#pragma omp parallel
    {
        for (Input& input : inputs) input.pack();
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const Input& input = inputs[task / pieces];
            int64_t g = ids[task / pieces], first = task % pieces * PANELS_AT_ONCE;
            int64_t last = std::min(first + PANELS_AT_ONCE, panels);
            bf16* rows_out = out + starts[task / pieces] * out_stride;
            Output output{rows_out, out_stride, N, bias ? bias + g * N : nullptr, false, false};
            const uint32_t* weight = reinterpret_cast<const uint32_t*>(packed) + g * panels * units * PANEL;
            for (int64_t t = 0; t < input.tiles.count; t++) {
                int64_t start = input.tiles.start(t);
                with_rows(input.tiles.start(t + 1) - start, [&](auto constant) {
                    constexpr int R = decltype(constant)::value;
                    for (int64_t p = first; p < last; p++) {
                        vec sums[R][VECS];
                        const auto* rows = input.rows<R>(start);
                        const uint32_t* panel = weight + p * units * PANEL;
                        tile_bf16<R>(rows, panel, units, sums, Following{}.of<R>(rows, units, panel, units * PANEL));
                        write_tile<R>(output, start, p * PANEL, sums);
                    }
                });
            }
        }
    }
    return 1;
}

// ---- int8: weights with a scale per output; rows of x are quantized to bytes, with a scale per row

// weight [N, K] -> packed [panels][ceil(K / 4)][PANEL][4], ending in zeros, and each output's sum, [panels * PANEL].
KERNEL void pack_int8(const int8_t* weight, int64_t N, int64_t K, int8_t* packed, int32_t* totals) {
    int64_t units = divide_up(K, 4), panels = divide_up(N, PANEL);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        const int8_t* rows = weight + p * PANEL * K;
        pack_units(reinterpret_cast<const char*>(rows), K, N - p * PANEL, K, units,
                   reinterpret_cast<char*>(packed + p * units * PANEL * 4));
        for (int64_t n = 0; n < PANEL; n++) {
            int32_t total = 0;
            for (int64_t k = 0; p * PANEL + n < N && k < K; k++) total += rows[n * K + k];
            totals[p * PANEL + n] = total;
        }
    }
}

// Rows `ids` of the weight [N, K] that was packed, times their scales -> [count, K]. Returns whether all ids are in
// range.
KERNEL int rows_int8(const int8_t* packed, const float* scales, const int64_t* ids, int64_t count, int64_t N,
                     int64_t K, void* out, int out_is_float) {
    int64_t units = divide_up(K, 4);
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= N) return 0;
        const int8_t* row = packed + (ids[i] / PANEL) * units * PANEL * 4 + (ids[i] % PANEL) * 4;
        for (int64_t k = 0; k < K; k++) {
            float value = float(row[(k / 4) * PANEL * 4 + k % 4]) * scales[ids[i]];
            if (out_is_float)
                static_cast<float*>(out)[i * K + k] = value;
            else
                static_cast<bf16*>(out)[i * K + k] = from_float<bf16>(value);
        }
    }
    return 1;
}

// A weight in int8, or one of several of the same shape.
struct Int8Weight {
    const int8_t* packed;
    const float* scales;    // [panels * PANEL]
    const int32_t* totals;  // likewise
    int64_t units;

    // results = R rows, from `start` on, times panel p.
    template <int R, class Cut>
    INLINE void multiply(const Bytes<Cut>& input, int64_t start, int64_t p, vec (&results)[R][VECS],
                         Following following) const {
        ivec sums[R][VECS];
        const FourOf<R>* rows = input.template rows<R>(start);
        const uint32_t* panel = reinterpret_cast<const uint32_t*>(packed) + p * units * PANEL;
        tile_int8<R>(rows, panel, units, sums, following.of<R>(rows, units, panel, units * PANEL));
        for (int v = 0; v < VECS; v++) {
            ivec total = load_bits(totals + p * PANEL + v * LANES);
            vec scale = load(scales + p * PANEL + v * LANES);
            for (int r = 0; r < R; r++)
                results[r][v] = __builtin_convertvector(sums[r][v] - OFFSET_OF_BYTES * total, vec) *
                                (scale * splat(input.scales[start + r]));
        }
    }
};

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gate, of bfloat16 or float32 x. scales, totals:
// [panels * PANEL].
KERNEL void gemm_int8(const void* x, int x_is_float, int64_t x_stride, int64_t M, const int8_t* packed,
                      const float* scales, const int32_t* totals, int64_t N, int64_t K, const void* bias,
                      int bias_is_float, void* out, int64_t out_stride, int out_is_float, int gate) {
    const Int8Weight weight{packed, scales, totals, divide_up(K, 4)};
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Gate(gate)};
    const Tiles tiles(M, ROWS_OF_BYTES);
    const Bytes<Tiles> rows(x, x_is_float != 0, x_stride, tiles, K);
    Panels panels(output);
#pragma omp parallel
    {
        Bytes<Tiles> input = rows;
        input.pack();
        each_tile(output, tiles, panels, [&](int64_t p, int64_t start, auto& results, Following following) {
            constexpr int R = ROWS_OF<decltype(results)>;
            if constexpr (R <= ROWS_OF_BYTES) weight.multiply<R>(input, start, p, results, following);
        });
    }
}

// out [M, N] = x [M, K] times the weight, and plus the bias, of each row's group, for all groups in one call. Rows are
// sorted by group, rows_per_group of each. packed, scales, totals: [groups]; bias: [groups][N] or null. Returns whether
// groups have M rows together.
KERNEL int grouped_gemm_int8(const void* x, int x_is_float, int64_t x_stride, int64_t M, const int64_t* rows_per_group,
                             int64_t groups, const int8_t* const* packed, const float* const* scales,
                             const int32_t* const* totals, int64_t N, int64_t K, const void* bias, int bias_is_float,
                             void* out, int64_t out_stride, int out_is_float) {
    const GroupTiles tiles(rows_per_group, groups, ROWS_OF_BYTES);
    if (tiles.rows != M) return 0;
    const int64_t panels = divide_up(N, PANEL), pieces = divide_up(panels, PANELS_AT_ONCE);
    const int64_t bias_bytes = bias_is_float ? sizeof(float) : sizeof(bf16);
    const Bytes<GroupTiles> rows(x, x_is_float != 0, x_stride, tiles, K);
#pragma omp parallel
    {
        Bytes<GroupTiles> input = rows;
        input.pack();
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < int64_t(tiles.ids.size()) * pieces; task++) {
            const int64_t i = task / pieces, g = tiles.ids[i], first = task % pieces * PANELS_AT_ONCE;
            const void* of_group = bias ? static_cast<const char*>(bias) + g * N * bias_bytes : nullptr;
            const Output output{out, out_stride, N, of_group, out_is_float != 0, bias_is_float != 0};
            const Int8Weight weight{packed[g], scales[g], totals[g], divide_up(K, 4)};
            for (int64_t t = tiles.firsts[i]; t < tiles.firsts[i + 1]; t++) {
                const int64_t start = tiles.start(t);
                with_rows<ROWS_OF_BYTES>(tiles.start(t + 1) - start, [&](auto constant) {
                    constexpr int R = decltype(constant)::value;
                    for (int64_t p = first; p < std::min(first + PANELS_AT_ONCE, panels); p++) {
                        vec results[R][VECS];
                        weight.multiply<R>(input, start, p, results, Following{});
                        write_tile<R>(output, start, p * PANEL, results);
                    }
                });
            }
        }
    }
    return 1;
}

// ---- calls from a list

REPLAYED(rows_bf16)
REPLAYED(gemm_bf16)
REPLAYED(grouped_gemm_bf16)
REPLAYED(rows_int8)
REPLAYED(gemm_int8)
REPLAYED(grouped_gemm_int8)
