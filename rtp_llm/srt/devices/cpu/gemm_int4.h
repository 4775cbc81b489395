// int4: weights (q - zero) * scale, with scale and zero per output and group of neighbouring inputs
#pragma once

#include "gemm_tiles.h"

namespace {

// Rows are multiplied as bytes if the processor can; otherwise one panel at a time is converted to bfloat16.
#if defined(__AVX512VNNI__)
constexpr bool AS_BYTES = true;
#else
constexpr bool AS_BYTES = false;
#endif
constexpr int ROWS_OF_INT4 = 6;  // of a tile, which has two sets of sums

struct Int4 {
    const uint8_t* packed;   // [panels][units / 2][PANEL][4]
    const int16_t* scales;   // [panels][groups][PANEL], in units of `steps`
    const uint8_t* zeros;    // [panels][groups][PANEL], or null: all 8
    const float* steps;      // [panels * PANEL]
    int64_t groups, group;   // group: inputs of one group, a multiple of 8

    const uint8_t* quarters(int64_t panel) const { return packed + panel * groups * group / 2 * PANEL; }

    INLINE vec scale(int64_t panel, int64_t g, int v) const {
        const int16_t* at = scales + (panel * groups + g) * PANEL + v * LANES;
        return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const shorts_vec*>(at), ivec), vec);
    }

    INLINE vec zero(int64_t panel, int64_t g, int v) const {
        if (!zeros) return splat(8.0f);
        bytes_vec bytes = *reinterpret_cast<const bytes_vec*>(zeros + (panel * groups + g) * PANEL + v * LANES);
        return __builtin_convertvector(__builtin_convertvector(bytes, ivec), vec);
    }

    INLINE vec step(int64_t panel, int v) const { return load(steps + panel * PANEL + v * LANES); }
};

// Multiplies one panel with rows of bytes, group by group. With few rows there are registers for separate sums of the
// upper halves, unshifted and so 16 times too large, which saves shifting the weights.
template <int R>
NOINLINE void tile_int4(
    const Bytes& input, int64_t start, const Int4& weight, int64_t panel, vec (&result)[R][VECS], Following following
) {
    constexpr bool FEW = R <= 4;
    const uint32_t* x = input.rows(start);
    const uint8_t* w = weight.quarters(panel);
    const int64_t units = weight.groups * weight.group / 4;
    const Next next = following.of<R>(x, units, reinterpret_cast<const uint32_t*>(w), units / 2 * PANEL);
    vec sums[R][VECS] = {};
    int64_t unit = 0;
    for (int64_t g = 0; g < weight.groups; g++) {
        const int32_t* totals = input.totals + start * input.groups + g;
        const float* scales = input.scales + start * input.groups + g;
        ivec products[R][VECS], shifted[R][VECS] = {};
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++) products[r][v] = ivec{} + (weight.zeros ? 0 : -8 * totals[r * input.groups]);
        for (int64_t end = unit + weight.group / 4; unit < end; unit += 2, w += PANEL * 4) {
            ahead(reinterpret_cast<const uint32_t*>(w));
            next.ask<R>(unit / 2);
            ivec lower[VECS], upper[VECS];
            for (int v = 0; v < VECS; v++) {
                ivec both = load_bits(w + v * LANES * 4);
                lower[v] = both & 0x0f0f0f0f, upper[v] = FEW ? both & int32_t(0xf0f0f0f0) : (both >> 4) & 0x0f0f0f0f;
            }
            for (int r = 0; r < R; r++) {
                ivec first = ivec{} + int32_t(x[unit * R + r]), second = ivec{} + int32_t(x[(unit + 1) * R + r]);
                for (int v = 0; v < VECS; v++) {
                    products[r][v] = add_bytes(products[r][v], lower[v], first);
                    ivec& sum = FEW ? shifted[r][v] : products[r][v];
                    sum = add_bytes(sum, upper[v], second);
                }
            }
        }
        for (int v = 0; v < VECS; v++) {
            vec scale = weight.scale(panel, g, v), zero = weight.zeros ? weight.zero(panel, g, v) : vec{};
            for (int r = 0; r < R; r++) {
                vec product = __builtin_convertvector(products[r][v] + (shifted[r][v] >> 4), vec);
                if (weight.zeros) product -= zero * splat(float(totals[r * input.groups]));
                sums[r][v] += product * (scale * splat(scales[r * input.groups]));
            }
        }
    }
    for (int v = 0; v < VECS; v++)
        for (int r = 0; r < R; r++) result[r][v] = sums[r][v] * weight.step(panel, v);
}

INLINE ivec bf16_bits(vec x) {
    ivec bits = (ivec)x;
    return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
}

// One panel in bfloat16: [groups * group / 2][PANEL][2].
void write_out(const Int4& weight, int64_t panel, uint32_t* out) {
    const uint8_t* w = weight.quarters(panel);
    for (int64_t g = 0; g < weight.groups; g++) {
        vec scales[VECS], offsets[VECS];
        for (int v = 0; v < VECS; v++) {
            scales[v] = weight.scale(panel, g, v) * weight.step(panel, v);
            offsets[v] = weight.zero(panel, g, v);
        }
        for (int64_t pair = 0; pair < weight.group / 8; pair++, w += PANEL * 4, out += 4 * PANEL)
            for (int v = 0; v < VECS; v++) {
                ivec bits = load_bits(w + v * LANES * 4);
                for (int two = 0; two < 4; two++) {  // inputs 2 * two and 2 * two + 1 of eight
                    int shift = two < 2 ? 16 * two : 16 * (two - 2) + 4;
                    vec first = __builtin_convertvector((bits >> shift) & 15, vec);
                    vec second = __builtin_convertvector((bits >> (shift + 8)) & 15, vec);
                    ivec made = bf16_bits((first - offsets[v]) * scales[v]) |
                                bf16_bits((second - offsets[v]) * scales[v]) << 16;
                    std::memcpy(out + two * PANEL + v * LANES, &made, sizeof made);
                }
            }
    }
}

}  // namespace

// values [N, groups * group] of 0..15, a byte each -> packed [panels][groups * group / 8][PANEL][4], ending in zeros.
KERNEL void pack_int4(const uint8_t* values, int64_t N, int64_t inputs, uint8_t* packed) {
    int64_t pairs = inputs / 8, panels = divide_up(N, PANEL);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t n = 0; n < PANEL; n++) {
            const uint8_t* row = values + (p * PANEL + n) * inputs;
            bool there = p * PANEL + n < N;
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int64_t i = 0; i < 4; i++)
                    packed[((p * pairs + pair) * PANEL + n) * 4 + i] =
                        there ? uint8_t(row[pair * 8 + i] | row[pair * 8 + 4 + i] << 4) : 0;
        }
}

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gate, of bfloat16 x; see Int4 for the parts of the weight.
KERNEL void gemm_int4(const bf16* x, int64_t x_stride, int64_t M, const uint8_t* packed, const int16_t* scales,
                      const uint8_t* zeros, const float* steps, int64_t group, int64_t N, int64_t K, const void* bias,
                      int bias_is_float, void* out, int64_t out_stride, int out_is_float, int gate) {
    Int4 weight{packed, scales, zeros, steps, divide_up(K, group), group};
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Gate(gate)};
    if constexpr (AS_BYTES) {
        const Bytes rows(x, false, x_stride, M, K, group, 0, ROWS_OF_INT4);
        Panels panels(output);
#pragma omp parallel
        {
            Bytes input = rows;
            input.pack();
            each_tile(output, input.tiles, panels, [&](int64_t p, int64_t start, auto& sums, Following following) {
                constexpr int R = ROWS_OF<decltype(sums)>;
                if constexpr (R <= ROWS_OF_INT4) tile_int4<R>(input, start, weight, p, sums, following);
            });
        }
    } else {
        Input input(x, x_stride, M, K);
        Panels panels(output, 1);
        int64_t units = divide_up(K, 2), panel_units = weight.groups * group / 2 * PANEL;
#pragma omp parallel
        {
            int64_t written[2] = {-1, -1};  // the converted panel of either half
            uint32_t* memory = scratch<uint32_t, 5>(2 * panel_units);
            input.pack();
            each_tile(output, input.tiles, panels, [&](int64_t p, int64_t start, auto& sums, Following) {
                constexpr int R = ROWS_OF<decltype(sums)>;
                int half = output.gate != NO_GATE && 2 * p * PANEL >= N;
                uint32_t* panel = memory + half * panel_units;
                if (written[half] != p) write_out(weight, p, panel);
                written[half] = p;
                const auto* rows = input.rows<R>(start);
                tile_bf16<R>(rows, panel, units, sums, Following{}.of<R>(rows, units, panel, panel_units));
            });
        }
    }
}
