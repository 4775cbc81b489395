// Linear layers whose weights are codes of 4 or 8 bits: y = x W^T + bias, for bfloat16 x. A weight is the number that
// its code stands for (gemm_codes_decode.h), times the scale of its output and group of neighbouring inputs.
//
// Codes are packed in panels of PANEL outputs, lane by lane:
//
//     8 bits  [panels][inputs / 4][PANEL / 4][16]
//     4 bits  [panels][inputs / 8][PANEL / 4][16]  of eight inputs the first four in the lower halves of bytes
//
// Every number is exact in bfloat16; products and sums are in float32, and scales are applied to a group's sum. With
// few rows codes are decoded as they are multiplied: the time is that of reading them. With many, each panel is first
// written out in bfloat16, to be read once for each tile of rows.
#include "gemm_codes_decode.h"
#include "replay.h"

namespace {

template <class Codes, class F>
INLINE void each_part(F&& f) {
    f(std::integral_constant<int, 0>{});
    if constexpr (Codes::PARTS == 2) f(std::integral_constant<int, 1>{});
}

struct Scales {
    const float* data;  // [panels][groups][width]
    int64_t groups, group;  // group: inputs of one, a multiple of 8
    int width;              // PANEL, or 1: all outputs of a panel have the same

    INLINE vec at(int64_t panel, int64_t g, int v) const {
        const float* of_group = data + (panel * groups + g) * width;
        return width == 1 ? splat(*of_group) : load(of_group + v * LANES);
    }
};

template <int R>
INLINE void add_scaled(vec (&result)[R][VECS], const vec (&sums)[R][VECS], const Scales& scales, int64_t panel,
                       int64_t g) {
    for (int v = 0; v < VECS; v++) {
        vec scale = scales.at(panel, g, v);
        for (int r = 0; r < R; r++) result[r][v] = g == 0 ? sums[r][v] * scale : result[r][v] + sums[r][v] * scale;
    }
}

// One panel times a tile of few rows; codes: the panel's.
template <int R, class Codes>
NOINLINE void tile_codes(const Codes& decoder, const UnitOf<R>* x, const uint8_t* codes, const Scales& scales,
                         int64_t panel, vec (&result)[R][VECS]) {
    constexpr int SETS = R <= 2 ? 2 : 1;  // of sums: a single one would wait for itself
    int64_t unit = 0;
    for (int64_t g = 0; g < scales.groups; g++) {
        vec sums[SETS][R][VECS] = {};
        for (int64_t end = unit + scales.group / 2; unit < end; codes += STEP) {
            ahead<R>(reinterpret_cast<const uint32_t*>(codes));
            each_part<Codes>([&](auto part) {
                for (int v = 0; v < VECS; v++) {
                    ivec pairs[2];
                    decoder.template decode<part>(codes + v * LANES * 4, pairs);
                    for (int r = 0; r < R; r++)
                        for (int i = 0; i < 2; i++) {
                            vec& sum = sums[i % SETS][r][v];
                            sum = add_pair(sum, x[(unit + i) * R + r], pairs[i]);
                        }
                }
                unit += 2;
            });
        }
        for (int i = 1; i < SETS; i++)
            for (int r = 0; r < R; r++)
                for (int v = 0; v < VECS; v++) sums[0][r][v] += sums[i][r][v];
        add_scaled<R>(result, sums[0], scales, panel, g);
    }
}

// One panel in bfloat16, without scales: [units][PANEL][2].
template <class Codes>
NOINLINE void write_out(const Codes& decoder, const uint8_t* codes, int64_t units, uint32_t* out) {
    for (uint32_t* end = out + units * PANEL; out < end; codes += STEP) {
        ahead(reinterpret_cast<const uint32_t*>(codes));
        each_part<Codes>([&](auto part) {
            for (int v = 0; v < VECS; v++) {
                ivec pairs[2];
                decoder.template decode<part>(codes + v * LANES * 4, pairs);
                for (int i = 0; i < 2; i++) std::memcpy(out + i * PANEL + v * LANES, &pairs[i], sizeof pairs[i]);
            }
            out += 2 * PANEL;
        });
    }
}

template <int R>
INLINE void tile_written(const UnitOf<R>* x, const uint32_t* panel, const Scales& scales, int64_t at,
                         vec (&result)[R][VECS]) {
    int64_t units = scales.group / 2;
    for (int64_t g = 0; g < scales.groups; g++) {
        vec sums[R][VECS];
        const UnitOf<R>* rows = x + g * units * R;
        const uint32_t* weights = panel + g * units * PANEL;
        tile_bf16<R>(rows, weights, units, sums, Following{}.of<R>(rows, units, weights, units * PANEL));
        add_scaled<R>(result, sums, scales, at, g);
    }
}

// Rows of a tile whose codes are decoded as they are multiplied: with more, there are no registers for decoding.
constexpr int ROWS_OF_CODES = LANES == 16 ? 8 : ROWS;

template <Choice DECODE, class Codes>
void multiply(const Codes& decoder, const bf16* x, int64_t x_stride, int64_t M, const uint8_t* codes,
              const Scales& scales, int64_t K, const Output& output) {
    int64_t units = scales.groups * scales.group / 2, panel_bytes = units / (2 * Codes::PARTS) * STEP;
    constexpr int64_t DECODED = most_rows(DECODE);
    Input input(x, x_stride, M, K, units, scratch<Unit, 0>(M * units), M <= DECODED ? ROWS_OF_CODES : ROWS);
    if (M <= DECODED) {
        Panels panels(output, M <= ROWS_OF_WHOLE_PANELS ? IN_ORDER : PANELS_AT_ONCE);
#pragma omp parallel
        {
            input.pack();
            each_tile(output, input.tiles, panels, [&](int64_t p, int64_t start, auto& sums, Following) {
                constexpr int R = ROWS_OF<decltype(sums)>;
                if constexpr (R <= DECODED && R <= ROWS_OF_CODES)
                    tile_codes<R>(decoder, input.rows<R>(start), codes + p * panel_bytes, scales, p, sums);
            });
        }
        return;
    }
    Panels panels(output, 1);
#pragma omp parallel
    {
        int64_t written[2] = {-1, -1};  // the panel of either half
        uint32_t* memory = scratch<uint32_t, 5>(2 * units * PANEL);
        input.pack();
        each_tile(output, input.tiles, panels, [&](int64_t p, int64_t start, auto& sums, Following) {
            constexpr int R = ROWS_OF<decltype(sums)>;
            int half = output.is_gated() && 2 * p * PANEL >= output.columns;
            uint32_t* panel = memory + half * units * PANEL;
            if (written[half] != p) write_out(decoder, codes + p * panel_bytes, units, panel);
            written[half] = p;
            tile_written<R>(input.rows<R>(start), panel, scales, p, sums);
        });
    }
}

}  // namespace

// codes [N, inputs], a byte each -> packed; `inputs` is a multiple of 8.
KERNEL void pack_codes(const uint8_t* codes, int64_t N, int64_t inputs, int bits, uint8_t* packed) {
    int64_t panels = divide_up(N, PANEL), each = bits == 4 ? 8 : 4, steps = inputs / each;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t n = 0; n < PANEL; n++) {
            const uint8_t* row = codes + (p * PANEL + n) * inputs;
            bool there = p * PANEL + n < N;
            for (int64_t step = 0; step < steps; step++)
                for (int64_t i = 0; i < 4; i++) {
                    uint8_t code = there ? row[step * each + i] : 0;
                    if (there && bits == 4) code |= row[step * each + 4 + i] << 4;
                    packed[((p * steps + step) * PANEL + n / 4 * 4) * 4 + i / 2 * 8 + n % 4 * 2 + i % 2] = code;
                }
        }
}

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gated activation. kind: 0 e4m3fn, 1 nibbles, 2 integers. table:
// the numbers of the first two; scales: [panels][groups][scale_width].
KERNEL void gemm_codes(const bf16* x, int64_t x_stride, int64_t M, const uint8_t* packed, int kind,
                       const uint16_t* table, const float* scales, int scale_width, int64_t group, int64_t N, int64_t K,
                       const void* bias, int bias_is_float, void* out, int64_t out_stride, int out_is_float,
                       int activation) {
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Activation(activation)};
    Scales of_groups{scales, divide_up(K, group), group, scale_width};
    if (kind == 0) multiply<DECODE_E4M3>(E4M3(table), x, x_stride, M, packed, of_groups, K, output);
    if (kind == 1) multiply<DECODE_TABLE>(Nibbles(table), x, x_stride, M, packed, of_groups, K, output);
    if (kind == 2) multiply<DECODE_INTEGER>(Integers(table), x, x_stride, M, packed, of_groups, K, output);
}

// ---- calls from a list

REPLAYED(gemm_codes)
