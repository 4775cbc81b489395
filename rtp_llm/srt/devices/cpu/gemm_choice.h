// Up to how many rows of x the first of two ways of computing a product is taken, by measurement.
//
// `python benchmark/cpu_kernels.py --tune` measures both ways under the instruction set of this machine, or the one in
// RTP_LLM_CPU_ISA, and writes its line of the table anew; docs/performance.md has the figures. Not measured so far, for
// want of such a machine: avx2_vnni, which has avx2's line, and those of neon.
#pragma once

#include <cstdint>

namespace {

enum Choice {
    DECODE_E4M3,     // codes of e4m3fn are decoded as they are multiplied; or each panel is written out before
    DECODE_TABLE,    // likewise codes of 4 bits
    DECODE_INTEGER,  // likewise integers of 8 bits
    PREPARE_ALONE,   // each thread turns all rows into bytes for itself; or all share the rows, and wait for each other
    PANEL_BY_PANEL,  // all rows are multiplied with a panel while the next is read; or each tile with several in turn
};

constexpr int64_t ROWS_OF_CHOICE[] = {
#if defined(__AVX512BF16__)
    16, 16, 8, 4, 96  // avx512_bf16
#elif defined(__AVX512F__)
    8, 8, 6, 4, 32  // avx512
#elif defined(__AVXVNNI__)
    6, 4, 6, 4, 96  // avx2_vnni
#elif defined(__AVX2__)
    6, 4, 6, 4, 96  // avx2
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)
    2, 2, 2, 4, 96  // neon_i8mm
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    2, 2, 2, 4, 96  // neon_bf16
#elif defined(__ARM_FEATURE_DOTPROD)
    2, 2, 2, 4, 96  // neon_dot
#else
    4, 6, 0, 4, 256  // portable
#endif
};

// The number of rows up to which the first way is taken. To measure one of them alone, compile with
// -DTUNED=number -DTUNED_ROWS=rows.
constexpr int64_t most_rows(Choice choice) {
#if defined(TUNED)
    if (choice == TUNED) return TUNED_ROWS;
#endif
    return ROWS_OF_CHOICE[choice];
}

}  // namespace
