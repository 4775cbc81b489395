// Linear layers on packed int8 weights, as gemm.cpp: a weight has a scale per output, rows of x are quantized to bytes,
// with a scale per row.
#include "gemm_packing.h"
#include "gemm_tiles.h"
#include "replay.h"

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

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gated activation, of bfloat16 or float32 x. scales, totals:
// [panels * PANEL].
KERNEL void gemm_int8(const void* x, int x_is_float, int64_t x_stride, int64_t M, const int8_t* packed,
                      const float* scales, const int32_t* totals, int64_t N, int64_t K, const void* bias,
                      int bias_is_float, void* out, int64_t out_stride, int out_is_float, int activation) {
    const Int8Weight weight{packed, scales, totals, divide_up(K, 4)};
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Activation(activation)};
    const Tiles tiles(M, ROWS_OF_BYTES);
    const Bytes<Tiles> rows(x, x_is_float != 0, x_stride, tiles, K);
    Panels panels(output, M <= ROWS_OF_WHOLE_PANELS ? IN_ORDER : PANELS_AT_ONCE);
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
    const int64_t panels = divide_up(N, PANEL);
    const int64_t at_once = panels_of_piece(M, int64_t(tiles.ids.size()), panels), pieces = divide_up(panels, at_once);
    const int64_t bias_bytes = bias_is_float ? sizeof(float) : sizeof(bf16);
    const Bytes<GroupTiles> rows(x, x_is_float != 0, x_stride, tiles, K);
#pragma omp parallel
    {
        Bytes<GroupTiles> input = rows;
        input.pack();
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < int64_t(tiles.ids.size()) * pieces; task++) {
            const int64_t i = task / pieces, g = tiles.ids[i], first = task % pieces * at_once;
            const void* of_group = bias ? static_cast<const char*>(bias) + g * N * bias_bytes : nullptr;
            const Output output{out, out_stride, N, of_group, out_is_float != 0, bias_is_float != 0};
            const Int8Weight weight{packed[g], scales[g], totals[g], divide_up(K, 4)};
            for (int64_t t = tiles.firsts[i]; t < tiles.firsts[i + 1]; t++) {
                const int64_t start = tiles.start(t);
                with_rows<ROWS_OF_BYTES>(tiles.start(t + 1) - start, [&](auto constant) {
                    constexpr int R = decltype(constant)::value;
                    for (int64_t p = first; p < std::min(first + at_once, panels); p++) {
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

REPLAYED(rows_int8)
REPLAYED(gemm_int8)
REPLAYED(grouped_gemm_int8)
