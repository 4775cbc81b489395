// Products of pairs of rows and pairs of outputs: the matrix instructions of AArch64.
//
// One adds to a register of 2 x 2 sums the products of two rows and two outputs, over two units of each. Weights and rows
// lie as other instructions read them, so that a weight has one order: a register of a unit, and that of the next unit of
// the same outputs, are interleaved before. With six rows these are 11 instructions beside 24, which do the work of 48.
#pragma once

#include "gemm_units.h"

namespace {

constexpr int FEWEST_OF_MATRIX = 4;  // rows of a tile: with fewer, interleaving takes as long as it saves

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool HAVE_MATRIX_OF_BF16 = true;

// As two of add_pair, one after the other.
INLINE vec add_square(vec sums, ivec rows, ivec outputs) {
    return (vec)vbfmmlaq_f32((float32x4_t)sums, (bfloat16x8_t)rows, (bfloat16x8_t)outputs);
}
#else
constexpr bool HAVE_MATRIX_OF_BF16 = false;
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool HAVE_MATRIX_OF_BYTES = true;

INLINE ivec add_square(ivec sums, ivec rows, ivec outputs) {
    return (ivec)vmmlaq_s32((int32x4_t)sums, (int8x16_t)rows, (int8x16_t)outputs);
}
#else
constexpr bool HAVE_MATRIX_OF_BYTES = false;
#endif

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || defined(__ARM_FEATURE_MATMUL_INT8)
// The sums of a tile of R rows with COUNT registers of outputs. S: vec or ivec.
template <int R, int COUNT, class S>
class SquareSums {
   public:
    SquareSums() {
        for (auto& of_pair : squares_)
            for (S& square : of_pair) square = S{};
    }

    // Adds the products of a unit and the next: x, next_x: of each row; w, next_w: of each output.
    INLINE void add(const uint32_t* x, const uint32_t* next_x, const uint32_t* w, const uint32_t* next_w) {
        ivec rows[PAIRS];
        for (int i = 0; i < PAIRS; i++) {
            const uint32x2_t units = pair_at<R>(x, 2 * i), next = pair_at<R>(next_x, 2 * i);
            rows[i] = (ivec)vcombine_u32(vzip1_u32(units, next), vzip2_u32(units, next));
        }
        for (int v = 0; v < COUNT; v++) {
            const uint32x4_t units = vld1q_u32(w + v * LANES), next = vld1q_u32(next_w + v * LANES);
            const ivec first = (ivec)vzip1q_u32(units, next), second = (ivec)vzip2q_u32(units, next);
            for (int i = 0; i < PAIRS; i++) {
                squares_[i][2 * v] = add_square(squares_[i][2 * v], rows[i], first);
                squares_[i][2 * v + 1] = add_square(squares_[i][2 * v + 1], rows[i], second);
            }
        }
    }

    // The sums of a row's outputs in register v.
    INLINE S row(int r, int v) const {
        const int64x2_t first = (int64x2_t)squares_[r / 2][2 * v], second = (int64x2_t)squares_[r / 2][2 * v + 1];
        return (S)(r % 2 ? vzip2q_s64(first, second) : vzip1q_s64(first, second));
    }

   private:
    static constexpr int PAIRS = (R + 1) / 2;

    // Of rows r and r + 1; the last row of an odd number is its own pair.
    template <int ROWS_THERE>
    static INLINE uint32x2_t pair_at(const uint32_t* x, int r) {
        return r + 1 < ROWS_THERE ? vld1_u32(x + r) : vdup_n_u32(x[r]);
    }

    S squares_[PAIRS][2 * COUNT];
};

// sums = R rows of units x times COUNT registers of the outputs of `units` units at w, PANEL words apart. ask(u): asks for
// what is needed later, before unit u.
template <int R, int COUNT, class S, class F>
INLINE void multiply_squares(const uint32_t* x, const uint32_t* w, int64_t units, S (&sums)[R][COUNT], F&& ask) {
    static const uint32_t none[PANEL] = {};
    SquareSums<R, COUNT, S> squares;
    int64_t u = 0;
    for (; u + 2 <= units; u += 2, x += 2 * R, w += 2 * PANEL) {
        ask(u, w), ask(u + 1, w + PANEL);
        squares.add(x, x + R, w, w + PANEL);
    }
    if (u < units) squares.add(x, none, w, none);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < COUNT; v++) sums[r][v] = squares.row(r, v);
}
#else
template <int R, int COUNT, class S, class F>
void multiply_squares(const uint32_t*, const uint32_t*, int64_t, S (&)[R][COUNT], F&&);  // not called
#endif

}  // namespace
