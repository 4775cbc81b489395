// How long all threads together take to read given pieces of memory once, in order, each thread its part of each piece.
// Built and called by decode_bound.py.

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

typedef uint64_t Words __attribute__((vector_size(64), aligned(8)));

uint64_t sum(const Words* words, std::size_t count) {
    Words totals[4] = {};
    std::size_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (int j = 0; j < 4; j++) totals[j] += words[i + j];
    for (; i < count; i++) totals[0] += words[i];
    uint64_t total = 0;
    for (const Words& each : totals)
        for (int j = 0; j < 8; j++) total += each[j];
    return total;
}

}  // namespace

// Seconds of the fastest pass.
extern "C" double read_all(const char* const* pieces, const int64_t* bytes, int64_t count, int threads, int passes) {
    double best = 1e9;
    for (int pass = 0; pass < passes; pass++) {
        const auto start = std::chrono::steady_clock::now();
        uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
        {
            const int64_t number = omp_get_thread_num(), all = omp_get_num_threads();
            for (int64_t i = 0; i < count; i++) {
                const int64_t words = bytes[i] / int64_t(sizeof(Words)), first = words * number / all;
                total += sum(reinterpret_cast<const Words*>(pieces[i]) + first, words * (number + 1) / all - first);
            }
        }
        asm volatile("" : : "r"(total));
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        best = std::min(best, taken.count());
    }
    return best;
}
