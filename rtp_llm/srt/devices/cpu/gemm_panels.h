// Panels and units, and a thread's memory.
#pragma once

#include "common.h"
#include "gemm_choice.h"

#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int PANEL = 32;
constexpr int VECS = PANEL / LANES;
constexpr int ROWS = LANES == 16 ? 12 : 6;  // of a tile: the registers have room for their sums
constexpr int HALF = LANES == 16 ? VECS : VECS / 2;  // of a panel: the sums of so many outputs with ROWS rows
constexpr int ROWS_OF_WHOLE_PANELS = 2;     // up to this number, there is room for those of all outputs
constexpr int PANELS_AT_ONCE = 4;           // panels that a thread takes; a tile of rows stays in its cache meanwhile
constexpr int64_t UNITS_OF_EACH = 256;      // units of a tile's rows that one thread prepares at a time
constexpr int FEWEST_THAT_ASK = LANES == 16 ? 4 : 3;  // rows: with fewer there is no time for prefetching the next data
constexpr int UNITS_AHEAD = 24;             // distance of the prefetch of weights
constexpr int UNITS_AHEAD_OF_FEW = LANES == 8 ? 64 : UNITS_AHEAD;  // likewise, with up to ROWS_OF_WHOLE_PANELS rows

typedef int32_t ivec_unaligned __attribute__((vector_size(LANES * 4), aligned(4)));

typedef uint8_t bytes_vec __attribute__((vector_size(LANES), aligned(1)));
typedef int16_t shorts_vec __attribute__((vector_size(LANES * 2), aligned(2)));

INLINE ivec load_bits(const void* p) { return *static_cast<const ivec_unaligned*>(p); }

INLINE ivec larger(ivec a, ivec b) { return a > b ? a : b; }

#if defined(__AVX2__)
// The rest of a register, to be combined with its first half, pair or number.
INLINE __m128i upper_half(__m256i x) { return _mm256_extracti128_si256(x, 1); }
INLINE __m128i upper_pair(__m128i x) { return _mm_shuffle_epi32(x, 0x4e); }
INLINE __m128i upper_one(__m128i x) { return _mm_shuffle_epi32(x, 0xb1); }
#endif

INLINE int32_t largest(ivec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#elif defined(__AVX2__)
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), upper_half((__m256i)x));
    most = _mm_max_epi32(most, upper_pair(most));
    return _mm_cvtsi128_si32(_mm_max_epi32(most, upper_one(most)));
#elif defined(__aarch64__)
    return vmaxvq_s32((int32x4_t)x);
#else
    int32_t most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

INLINE int32_t sum(ivec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#elif defined(__AVX2__)
    __m128i total = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), upper_half((__m256i)x));
    total = _mm_add_epi32(total, upper_pair(total));
    return _mm_cvtsi128_si32(_mm_add_epi32(total, upper_one(total)));
#elif defined(__aarch64__)
    return vaddvq_s32((int32x4_t)x);
#else
    int32_t total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

// Writes the lowest byte of each number.
INLINE void store_bytes(void* to, ivec x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i lowest = _mm256_set1_epi32(0x0c080400);
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)x, lowest);  // of each half in its first four
    _mm_storel_epi64(static_cast<__m128i*>(to), _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), upper_half(bytes)));
#else
    const bytes_vec bytes = __builtin_convertvector(x, bytes_vec);
    std::memcpy(to, &bytes, LANES);
#endif
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of the calling thread that is kept from call to call, separate for each SLOT.
template <class T, int SLOT>
T* scratch(int64_t count) {
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local int64_t capacity = 0;
    int64_t needed = count * int64_t(sizeof(T)) + 64;
    if (needed > capacity) {
        memory.reset(new char[needed]);
        capacity = needed;
#if defined(__linux__)  // in large pages, if it is large
        uintptr_t page = 2 << 20, start = (reinterpret_cast<uintptr_t>(memory.get()) + page - 1) / page * page;
        uintptr_t end = (reinterpret_cast<uintptr_t>(memory.get()) + needed) / page * page;
        if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
    }
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t(63));
}

// Prefetches a unit further on, for a tile of R rows, into level 1. A single row is all waiting: vectors of 512 bits have
// it brought into level 2, which allows more outstanding requests; with those of 256 bits, which need more instructions
// for a unit, the processor reads ahead by itself, and faster than when told to.
template <int R = ROWS>
INLINE void ahead(const uint32_t* w) {
    if (R == 1 && LANES == 8) return;
    constexpr int CACHE = R == 1 ? 2 : 1, UNITS = R <= ROWS_OF_WHOLE_PANELS ? UNITS_AHEAD_OF_FEW : UNITS_AHEAD;
    __builtin_prefetch(w + UNITS * PANEL, 0, 4 - CACHE);
    __builtin_prefetch(w + UNITS * PANEL + PANEL / 2, 0, 4 - CACHE);
}

}  // namespace
