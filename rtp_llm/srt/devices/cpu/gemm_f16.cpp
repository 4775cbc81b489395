// Linear layers on packed float16 weights: y = x W^T + bias. See gemm_numbers.h.
#include "gemm_numbers.h"
#include "replay.h"

KERNEL void pack_f16(const f16* weight, int64_t stride, int64_t N, int64_t K, f16* packed) {
    pack_numbers(weight, stride, N, K, packed);
}

KERNEL int rows_f16(const f16* packed, const int64_t* ids, int64_t count, int64_t N, int64_t K, f16* out) {
    return rows_of_numbers(packed, ids, count, N, K, out);
}

KERNEL void gemm_f16(const f16* x, int64_t x_stride, int64_t M, const f16* packed, int64_t N, int64_t K,
                     const void* bias, int bias_is_float, void* out, int64_t out_stride, int out_is_float,
                     int activation) {
    multiply_numbers(x, x_stride, M, packed, N, K, bias, bias_is_float, out, out_stride, out_is_float, activation);
}

KERNEL int grouped_gemm_f16(const f16* x, int64_t x_stride, int64_t M, const int64_t* rows_per_group, int64_t groups,
                            const f16* packed, int64_t N, int64_t K, const f16* bias, f16* out, int64_t out_stride) {
    return multiply_groups(x, x_stride, M, rows_per_group, groups, packed, N, K, bias, out, out_stride);
}

// ---- calls from a list

REPLAYED(rows_f16)
REPLAYED(gemm_f16)
REPLAYED(grouped_gemm_f16)
