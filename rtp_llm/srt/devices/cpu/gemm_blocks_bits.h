// Reading elements of a panel of blocks, and units of two to six bits.
#pragma once

#include "gemm_panels.h"

namespace {

// ---- reading a panel's elements: element `number` of the field that starts at `at`

INLINE ivec word(const uint8_t* at, int number, int v) { return load_bits(at + (number * PANEL + v * LANES) * 4); }

INLINE ivec byte(const uint8_t* at, int number, int v) {
    at += number * PANEL + v * LANES;
#if defined(__AVX512F__)  // GCC 12 would take the bytes one by one
    return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
#else
    bytes_vec bytes;
    std::memcpy(&bytes, at, LANES);
    return __builtin_convertvector(bytes, ivec);
#endif
}

INLINE ivec short_word(const uint8_t* at, int v) {
    hvec shorts;
    std::memcpy(&shorts, at + v * LANES * 2, LANES * 2);
    return __builtin_convertvector(shorts, ivec);
}

// Two signed bytes as numbers of 16 bits.
INLINE ivec signed_bytes(const uint8_t* at, int number, int v) {
    at += (number * PANEL + v * LANES) * 2;
#if defined(__AVX512BW__)
    return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
    ivec both = short_word(at, 0);
    return (both << 24 >> 24 & 0xffff) | both << 16 >> 24 << 16;
#endif
}

// Of two numbers of 16 bits, one in place of both.
INLINE ivec first_twice(ivec x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m128i places = _mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13);
    return (ivec)_mm256_shuffle_epi8((__m256i)x, _mm256_broadcastsi128_si256(places));
#else
    return (x & 0xffff) | x << 16;
#endif
}

INLINE ivec second_twice(ivec x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m128i places = _mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15);
    return (ivec)_mm256_shuffle_epi8((__m256i)x, _mm256_broadcastsi128_si256(places));
#else
    return (x >> 16 & 0xffff) | (x & int32_t(0xffff0000));
#endif
}

INLINE vec as_float(ivec x) { return __builtin_convertvector(x, vec); }

// A float16. Without instructions for it: its bits, shifted, are a float32 that is 2^112 times too small.
INLINE vec half_float(const uint8_t* at, int v) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + v * LANES * 2)));
#elif defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + v * LANES * 2)));
#else
    ivec bits = short_word(at, v), magnitude = bits & 0x7fff;
    ivec value = (ivec)((vec)(magnitude << 13) * 0x1p112f);
    value = magnitude >= 0x7c00 ? value | 0x7f800000 : value;
    return (vec)(value | (bits & 0x8000) << 16);
#endif
}

// The low bits of bytes: `mask` in each of them.
INLINE ivec low(ivec x, int mask) { return x & (mask * 0x01010101); }

// Bits `mask` of bytes, moved to the right.
INLINE ivec taken(ivec x, uint32_t mask, int by) {
    typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
    return (ivec)(((uvec)x & mask * 0x01010101u) >> by);
}

// The bits of bytes from bit `from` on, moved to bit `to`; those below and beyond them are undefined. One shift does it
// where both are known to the compiler.
INLINE ivec moved(ivec x, int from, int to) {
    if (__builtin_constant_p(from)) return from > to ? x >> (from - to) : x << (to - from);
    return x >> from << to;
}

struct alignas(16) Table {
    int8_t values[16];

    // Bytes of 0 to 15 -> values.
    INLINE ivec of(ivec indices) const {
#if defined(__AVX512BW__)
        __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
        return (ivec)_mm512_shuffle_epi8(table, (__m512i)indices);
#elif defined(__AVX2__)
        __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
        return (ivec)_mm256_shuffle_epi8(table, (__m256i)indices);
#elif defined(__aarch64__)
        return (ivec)vqtbl1q_s8(vld1q_s8(values), (uint8x16_t)indices);
#else
        uint8_t bytes[sizeof indices];
        std::memcpy(bytes, &indices, sizeof indices);
        for (uint8_t& index : bytes) index = uint8_t(values[index]);
        std::memcpy(&indices, bytes, sizeof indices);
        return indices;
#endif
    }
};

constexpr Table IQ4_VALUES = {{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}};
constexpr Table MXFP4_VALUES = {{12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}};  // plus 12

// 16 bytes of a run: the lower halves are its first 16 inputs, the upper halves the others.
INLINE ivec nibbles(const uint8_t* at, int first_word, int u, int v) {
    return low(word(at, first_word + u % 4, v) >> (u / 4 * 4), 15);
}

// ---- a run's units of bits that do not divide a byte

// Each has functions that pack the eight units of a run of one output, and read one of them.

struct TwoBits {
    static constexpr int WORDS = 2;

    static void pack(const uint32_t (&units)[8], uint32_t* words) {
        for (int i = 0; i < 2; i++) {
            const uint32_t* of = units + 4 * i;
            words[i] = of[0] | of[1] << 2 | of[2] << 4 | of[3] << 6;
        }
    }

    static INLINE ivec unit(const uint8_t* at, int u, int v) {
        return taken(word(at, u / 4, v), 3u << u % 4 * 2, u % 4 * 2);
    }
};

// Two units in each of three words, whose upper bits are those of the last two units: the lower bits of each are in one
// of the first words, and the third bit of both in the last one.
struct ThreeBits {
    static constexpr int WORDS = 3;

    static void pack(const uint32_t (&units)[8], uint32_t* words) {
        for (int i = 0; i < 3; i++) words[i] = units[2 * i] | units[2 * i + 1] << 3;
        for (int i = 0; i < 2; i++) {
            words[i] |= (units[6 + i] & 0x03030303) << 6;
            words[2] |= (units[6 + i] >> 2 & 0x01010101) << (6 + i);
        }
    }

    static INLINE ivec unit(const uint8_t* at, int u, int v) {
        if (u < 6) return taken(word(at, u / 2, v), 7u << u % 2 * 3, u % 2 * 3);
        const ivec last = word(at, 2, v);
        return taken(word(at, u - 6, v), 0xc0, 6) | (u == 6 ? taken(last, 0x40, 4) : taken(last, 0x80, 5));
    }
};

// A unit's upper half is that of the fourth one after it.
struct FourBits {
    static constexpr int WORDS = 4;

    static void pack(const uint32_t (&units)[8], uint32_t* words) {
        for (int i = 0; i < 4; i++) words[i] = units[i] | units[4 + i] << 4;
    }

    static INLINE ivec unit(const uint8_t* at, int u, int v) { return nibbles(at, 0, u, v); }
};

// A unit in each of five words, whose upper bits are those of the last three units: three of each in one of the first
// words, the upper two of the first two of them in the last words, and the two of the third one below these.
struct FiveBits {
    static constexpr int WORDS = 5;

    static void pack(const uint32_t (&units)[8], uint32_t* words) {
        for (int i = 0; i < 5; i++) words[i] = units[i];
        for (int i = 0; i < 3; i++) words[i] |= (units[5 + i] & 0x07070707) << 5;
        for (int i = 0; i < 2; i++)
            words[3 + i] |= (units[5 + i] >> 3 & 0x03030303) << 6 | (units[7] >> (3 + i) & 0x01010101) << 5;
    }

    static INLINE ivec unit(const uint8_t* at, int u, int v) {
        if (u < 5) return low(word(at, u, v), 31);
        const ivec lower = taken(word(at, u - 5, v), 0xe0, 5);
        if (u < 7) return lower | taken(word(at, u - 2, v), 0xc0, 3);
        return lower | taken(word(at, 3, v), 0x20, 2) | taken(word(at, 4, v), 0x20, 1);
    }
};

// Three words for four units: the low bits of each are those of a unit, and the upper two of all those of the fourth, the
// lowest ones in the first word.
struct SixBits {
    static constexpr int WORDS = 6;

    static void pack(const uint32_t (&units)[8], uint32_t* words) {
        for (int i = 0; i < 6; i++) {
            const uint32_t* of = units + i / 3 * 4;
            words[i] = of[i % 3] | (of[3] >> i % 3 * 2 & 0x03030303) << 6;
        }
    }

    static INLINE ivec unit(const uint8_t* at, int u, int v) {
        const int first = u / 4 * 3;
        if (u % 4 < 3) return low(word(at, first + u % 4, v), 63);
        return taken(word(at, first, v), 0xc0, 6) | taken(word(at, first + 1, v), 0xc0, 4) |
               taken(word(at, first + 2, v), 0xc0, 2);
    }
};

template <class Bits>
uint8_t* write_run(const uint32_t (&units)[8], uint8_t* to) {
    uint32_t words[Bits::WORDS];
    Bits::pack(units, words);
    std::memcpy(to, words, sizeof words);
    return to + sizeof words;
}

}  // namespace
