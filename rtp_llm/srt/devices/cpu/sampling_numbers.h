// random numbers: Philox4x32-10 (Salmon et al., 2011), as in worker/philox.py
//
// Each token has a random number, and the token with the smallest number divided by its weight is drawn.
#pragma once

#include "sampling_weights.h"

#include <limits>

typedef uint64_t uvec __attribute__((vector_size(DLANES * 8)));
typedef uint32_t uvec32 __attribute__((vector_size(LANES * 4)));
typedef uint32_t wvec __attribute__((vector_size(DLANES * 4)));
typedef uint32_t wvec_unaligned __attribute__((vector_size(DLANES * 4), aligned(4)));

constexpr uint64_t WORD = 0xFFFFFFFF;

// Products of the lower halves of each lane.
static INLINE uvec multiply(uvec a, uint64_t b) {
#if defined(__AVX512F__)
    return (uvec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (uvec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (a & WORD) * b;
#endif
}

static INLINE uint64_t multiply(uint64_t a, uint64_t b) { return (a & WORD) * b; }

// The words of a counter, in the lower halves of c0 .. c3; the upper halves mean nothing. T: one counter, or a vector.
template <class T>
static INLINE void philox(T& c0, T& c1, T& c2, T& c3, uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        T low = multiply(c0, 0xD2511F53), high = multiply(c2, 0xCD9E8D57);
        c0 = (high >> 32) ^ c1 ^ uint64_t(k0);
        c1 = high;
        c2 = (low >> 32) ^ c3 ^ uint64_t(k1);
        c3 = low;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

// The exponentially distributed numbers of a row's tokens.
struct Noise {
    static constexpr int GROUP = 64;  // tokens that have 16 counters of four words in common
    uint64_t seed, position;

    // The upper halves of the uniform numbers of GROUP tokens from `start`, a multiple of GROUP, on.
    INLINE void upper_words(int64_t start, uint32_t* words) const {
        for (int part = 0; part < 16; part += DLANES) {
            uvec c0 = uvec{} + (position & WORD), c1 = uvec{} + (position >> 32), c2, c3{};
            for (int lane = 0; lane < DLANES; lane++) c2[lane] = start / 4 + part + lane;
            philox(c0, c1, c2, c3, seed);
            const uvec all[4] = {c0, c1, c2, c3};
            for (int word = 0; word < 4; word++) {
                *reinterpret_cast<wvec_unaligned*>(words + 16 * word + part) =
                    __builtin_convertvector(all[word] & WORD, wvec);
            }
        }
    }

    NOINLINE uint32_t word(int64_t token, uint64_t stream) const {
        uint64_t c0 = position & WORD, c1 = position >> 32, c2 = token / 64 * 16 + token % 16, c3 = stream;
        philox(c0, c1, c2, c3, seed);
        const uint64_t all[4] = {c0, c1, c2, c3};
        return uint32_t(all[token / 16 % 4]);
    }

    double number(int64_t token, uint32_t upper) const {
        double u = upper * 0x1p-32 + (word(token, 1) + 0.5) * 0x1p-64;
        return -std::log1p(-u);
    }
};

// The token with the smallest number divided by its weight, the first of equal ones.
struct Race {
    const Noise& noise;
    double best = std::numeric_limits<double>::infinity();
    int64_t winner = -1;

    void enter(int64_t token, double weight, uint32_t upper) {
        if (upper * 0x1p-32 > weight * best) return;  // the number itself is even larger
        double time = noise.number(token, upper) / weight;
        if (time < best || (time == best && token < winner)) {
            best = time;
            winner = token;
        }
    }
};

KERNEL void exponential(int64_t seed, int64_t position, int64_t size, double* numbers) {
    Noise noise{uint64_t(seed), uint64_t(position)};
    uint32_t words[Noise::GROUP];
    for (int64_t i = 0; i < size; i++) {
        if (i % Noise::GROUP == 0) noise.upper_words(i, words);
        numbers[i] = noise.number(i, words[i % Noise::GROUP]);
    }
}
