// Linear layers on packed weights: y = x W^T + bias, for bfloat16 weights; gemm_int8.cpp and gemm_f16.cpp are for others.
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
#include "gemm_packing.h"
#include "gemm_tiles.h"
#include "replay.h"

KERNEL int64_t panel_size() { return PANEL; }

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

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gated activation. x: rows `x_stride` elements apart; bias: [N]
// or null.
KERNEL void gemm_bf16(const bf16* x, int64_t x_stride, int64_t M, const bf16* packed, int64_t N, int64_t K,
                      const void* bias, int bias_is_float, void* out, int64_t out_stride, int out_is_float,
                      int activation) {
    int64_t units = divide_up(K, 2);
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Activation(activation)};
    Input input(x, x_stride, M, K);
    Panels panels(output, M <= ROWS_OF_WHOLE_PANELS ? IN_ORDER : PANELS_AT_ONCE);
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
    int64_t units = divide_up(K, 2), panels = divide_up(N, PANEL);
    Unit* memory = scratch<Unit, 0>(M * units);
    std::vector<int64_t> ids, starts;  // of groups with rows
    std::vector<Input> inputs;
    for (int64_t g = 0, start = 0; g < groups; start += rows_per_group[g++]) {
        if (rows_per_group[g] == 0) continue;
        ids.push_back(g);
        starts.push_back(start);
        inputs.emplace_back(x + start * x_stride, x_stride, rows_per_group[g], K, memory + start * units);
    }
    const int64_t at_once = panels_of_piece(M, int64_t(ids.size()), panels), pieces = divide_up(panels, at_once);
    const int64_t tasks = int64_t(ids.size()) * pieces;
#pragma omp parallel
    {
        for (Input& input : inputs) input.pack();
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const Input& input = inputs[task / pieces];
            int64_t g = ids[task / pieces], first = task % pieces * at_once;
            int64_t last = std::min(first + at_once, panels);
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

// ---- calls from a list

REPLAYED(rows_bf16)
REPLAYED(gemm_bf16)
REPLAYED(grouped_gemm_bf16)
