// What a machine can do: how fast all threads together read memory, and how fast they multiply out of registers.
// Prints JSON. Built and run by ceilings.py: c++ -O3 -march=native -fopenmp ceilings.cpp

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <vector>

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace {

constexpr int kPasses = 7;
constexpr std::size_t kBytes = std::size_t{1} << 30;  // far more than any cache
constexpr long kRegisterSteps = 20'000'000;
constexpr int kAccumulators = 16;  // enough to hide the latency of one multiplication

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::uint64_t sum(const std::uint64_t* words, std::size_t count) {
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < count; ++i) total += words[i];
    return total;
}

// Every thread reads its own part; the best of some passes, in GB/s.
double read_gb_s() {
    const std::size_t count = kBytes / sizeof(std::uint64_t);
    std::vector<std::uint64_t> words(count, 1);
    double best_s = 1e9;
    for (int pass = 0; pass < kPasses; ++pass) {
        const double start_s = now_s();
        std::uint64_t total = 0;
#pragma omp parallel reduction(+ : total)
        {
            const std::size_t part = count / omp_get_num_threads();
            total += sum(words.data() + part * omp_get_thread_num(), part);
        }
        asm volatile("" : : "r"(total));
        best_s = std::min(best_s, now_s() - start_s);
    }
    return kBytes / best_s / 1e9;
}

// Runs `steps` in every thread; the best of some passes, in 1e9 operations/s.
template <typename Steps>
double peak_gops(double operations_per_step, Steps steps) {
    double best_s = 1e9;
    int threads = 1;
    for (int pass = 0; pass < kPasses; ++pass) {
        const double start_s = now_s();
#pragma omp parallel
        {
            steps();
#pragma omp single
            threads = omp_get_num_threads();
        }
        best_s = std::min(best_s, now_s() - start_s);
    }
    return threads * operations_per_step * kRegisterSteps / best_s / 1e9;
}

#ifdef __AVX512BF16__
void bf16_steps() {
    __m512 sums[kAccumulators] = {};
    for (auto& total : sums) asm volatile("" : "+v"(total));  // else all are known to be equal: one is computed
    __m512bh a = (__m512bh)_mm512_set1_epi16(0), b = a;
    for (long i = 0; i < kRegisterSteps; ++i) {
        asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
        for (auto& total : sums) total = _mm512_dpbf16_ps(total, a, b);
    }
    for (auto& total : sums) asm volatile("" : : "v"(total));
}
#endif

#ifdef __AVX512VNNI__
void int8_steps() {
    __m512i sums[kAccumulators] = {};
    for (auto& total : sums) asm volatile("" : "+v"(total));  // else all are known to be equal: one is computed
    __m512i a = _mm512_setzero_si512(), b = a;
    for (long i = 0; i < kRegisterSteps; ++i) {
        asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
        for (auto& total : sums) total = _mm512_dpbusd_epi32(total, a, b);
    }
    for (auto& total : sums) asm volatile("" : : "v"(total));
}
#endif

}  // namespace

int main() {
    std::printf("{\"read_gb_s\": %.2f", read_gb_s());
#ifdef __AVX512BF16__
    // 32 multiplications and as many additions each
    std::printf(", \"bf16_peak_gflops\": %.1f", peak_gops(kAccumulators * 64.0, bf16_steps));
#endif
#ifdef __AVX512VNNI__
    std::printf(", \"int8_peak_gops\": %.1f", peak_gops(kAccumulators * 128.0, int8_steps));
#endif
    std::printf("}\n");
}
