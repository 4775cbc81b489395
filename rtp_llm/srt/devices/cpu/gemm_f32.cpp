// Linear layers on packed float32 weights: y = x W^T + bias. See gemm_numbers.h.
#include "gemm_numbers.h"
#include "replay.h"

KERNEL void pack_f32(const float* weight, int64_t stride, int64_t N, int64_t K, float* packed) {
    pack_numbers(weight, stride, N, K, packed);
}

KERNEL int rows_f32(const float* packed, const int64_t* ids, int64_t count, int64_t N, int64_t K, float* out) {
    return rows_of_numbers(packed, ids, count, N, K, out);
}

KERNEL void gemm_f32(const float* x, int64_t x_stride, int64_t M, const float* packed, int64_t N, int64_t K,
                     const void* bias, int bias_is_float, void* out, int64_t out_stride, int out_is_float,
                     int activation) {
    multiply_numbers(x, x_stride, M, packed, N, K, bias, bias_is_float, out, out_stride, out_is_float, activation);
}

// ---- calls from a list

REPLAYED(rows_f32)
REPLAYED(gemm_f32)
