// Shows whether kernels can be compiled and loaded on this machine, and how many threads share their work.
#include "common.h"

// Number of threads of a parallel region.
KERNEL int num_threads() {
    int count = 0;
#pragma omp parallel
#pragma omp atomic
    count++;
    return count;
}

// y = e^x for n elements, for a test that every instruction set computes the same.
KERNEL void exponentials(const float* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        int count = n - i < LANES ? int(n - i) : LANES;
        store_part(y + i, exp(load_part(x + i, count)), count);
    }
}

// Rounds n floats to bfloat16, by vectors.
KERNEL void round_to_bf16(const float* x, bf16* y, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, load(x + i));
    for (; i < n; i++) y[i] = from_float<bf16>(x[i]);
}
