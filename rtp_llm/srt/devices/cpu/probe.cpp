// Shows whether kernels can be compiled and loaded on this machine, and how many threads share their work, and where.
#include "common.h"

#if defined(__linux__)
#include <sched.h>
#endif

// Number of threads of a parallel region.
KERNEL int num_threads() {
    int count = 0;
#pragma omp parallel
#pragma omp atomic
    count++;
    return count;
}

// Sets the number of threads of the calling thread's parallel regions. torch has done so already for a library that is
// its own, but not for clang's.
KERNEL void use_threads(int count) { omp_set_num_threads(count); }

// Binds thread t of a parallel region to the logical processors cpus[starts[t]] to cpus[starts[t + 1] - 1]; returns how
// many of the threads could not be bound.
KERNEL int bind_threads(const int* cpus, const int* starts, int num_threads) {
#if defined(__linux__)
    int failed = 0;
#pragma omp parallel num_threads(num_threads) reduction(+ : failed)
    {
        int thread = omp_get_thread_num();
        cpu_set_t set;
        CPU_ZERO(&set);
        for (int i = starts[thread]; i < starts[thread + 1]; i++)
            if (cpus[i] < CPU_SETSIZE) CPU_SET(cpus[i], &set);
        failed += sched_setaffinity(0, sizeof set, &set) != 0;
    }
    return failed;
#else
    return num_threads;
#endif
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
