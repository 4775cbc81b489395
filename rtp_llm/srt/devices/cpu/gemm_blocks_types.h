// Types of blocks: how bytes of weights, their scales and their minima are made of a panel.
//
// A type says how many inputs and bytes a block has, of which fields it consists, and for a run of 32 inputs (`run`: its
// number in the block) and one register of outputs (`v`):
//
//     unit(block, run, u, v)      the bytes of four inputs of each output; `u`: their number in the run
//     scale(block, run, half, v)  of the first or last 16 inputs; without HALVES, half is 0
//     minimum(...)                with MINIMA; same arguments
//
// A weight is scale * (byte - OFFSET), or scale * byte - minimum with MINIMA. Bytes are 0 to LARGEST, or SIGNED.
//
// In a panel the blocks of its outputs follow each other by their elements: all outputs' first elements, then all the
// second ones, so that a field which starts at byte `at` of a block starts at byte `at * PANEL` here.
#pragma once

#include "gemm_panels.h"

namespace {

// Elements of 1, 2 or 4 bytes. SPREAD: words of 32 bits, one for each input, of which byte i is to have those of
// inputs i, i + 4, i + 8, ...
struct Field {
    int size, count;
    bool spread = false;
};

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

INLINE ivec signed_byte(const uint8_t* at, int number, int v) { return byte(at, number, v) << 24 >> 24; }

INLINE ivec short_word(const uint8_t* at, int v) {
    hvec shorts;
    std::memcpy(&shorts, at + v * LANES * 2, LANES * 2);
    return __builtin_convertvector(shorts, ivec);
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

// ---- blocks of 32 inputs

struct Q4_0 {
    static constexpr int INPUTS = 32, BYTES = 18, OFFSET = 8, LARGEST = 15;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = false;
    static constexpr Field FIELDS[] = {{2, 1}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) { return nibbles(block + 2 * PANEL, 0, u, v); }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
};

struct Q4_1 {
    static constexpr int INPUTS = 32, BYTES = 20, OFFSET = 0, LARGEST = 15;
    static constexpr bool HALVES = false, MINIMA = true, SIGNED = false;
    static constexpr Field FIELDS[] = {{2, 1}, {2, 1}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) { return nibbles(block + 4 * PANEL, 0, u, v); }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
    static INLINE vec minimum(const uint8_t* block, int, int, int v) { return -half_float(block + 2 * PANEL, v); }
};

struct Q5_0 {
    static constexpr int INPUTS = 32, BYTES = 22, OFFSET = 16, LARGEST = 31;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = false;
    static constexpr Field FIELDS[] = {{2, 1}, {4, 1, true}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) {
        return nibbles(block + 6 * PANEL, 0, u, v) | low(moved(word(block + 2 * PANEL, 0, v), u, 4), 16);
    }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
};

struct Q5_1 {
    static constexpr int INPUTS = 32, BYTES = 24, OFFSET = 0, LARGEST = 31;
    static constexpr bool HALVES = false, MINIMA = true, SIGNED = false;
    static constexpr Field FIELDS[] = {{2, 1}, {2, 1}, {4, 1, true}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) {
        return nibbles(block + 8 * PANEL, 0, u, v) | low(moved(word(block + 4 * PANEL, 0, v), u, 4), 16);
    }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
    static INLINE vec minimum(const uint8_t* block, int, int, int v) { return -half_float(block + 2 * PANEL, v); }
};

struct Q8_0 {
    static constexpr int INPUTS = 32, BYTES = 34, OFFSET = 0, LARGEST = 128;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = true;
    static constexpr Field FIELDS[] = {{2, 1}, {4, 8}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) { return word(block + 2 * PANEL, u, v); }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
};

struct IQ4_NL {
    static constexpr int INPUTS = 32, BYTES = 18, OFFSET = 0, LARGEST = 127;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = true;
    static constexpr Field FIELDS[] = {{2, 1}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) {
        return IQ4_VALUES.of(nibbles(block + 2 * PANEL, 0, u, v));
    }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
};

struct MXFP4 {
    static constexpr int INPUTS = 32, BYTES = 17, OFFSET = 12, LARGEST = 24;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = false;
    static constexpr Field FIELDS[] = {{1, 1}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) {
        return MXFP4_VALUES.of(nibbles(block + PANEL, 0, u, v));
    }
    // 2 ** (exponent - 128); the two smallest are subnormal
    static INLINE vec scale(const uint8_t* block, int, int, int v) {
        ivec exponent = byte(block, 0, v), small = (exponent << 21) + (1 << 21);
        return (vec)(exponent < 2 ? small : (exponent - 1) << 23);
    }
};

// ---- blocks of our own: a scale and, with ZEROS, a zero for a group of 16 inputs, 32 or more; scale * (level - zero)

template <int GROUP, bool ZEROS>
struct Int4 {
    static constexpr int GROUPS = GROUP < 32 ? 32 / GROUP : 1, HEAD = (ZEROS ? 3 : 2) * GROUPS;  // bytes before levels
    static constexpr int INPUTS = GROUP * GROUPS, BYTES = HEAD + INPUTS / 2, OFFSET = ZEROS ? 0 : 8, LARGEST = 15;
    static constexpr bool HALVES = GROUPS == 2, MINIMA = ZEROS, SIGNED = false;
    static constexpr Field FIELDS[] = {{2, GROUPS}, {1, ZEROS ? GROUPS : 0}, {4, INPUTS / 8}};

    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return nibbles(block + HEAD * PANEL, 4 * run, u, v);
    }
    static INLINE vec scale(const uint8_t* block, int, int half, int v) {
        return half_float(block + 2 * half * PANEL, v);
    }
    static INLINE vec minimum(const uint8_t* block, int run, int half, int v) {
        return scale(block, run, half, v) * as_float(byte(block + 2 * GROUPS * PANEL, half, v));
    }
};

// ---- blocks of 256 inputs

// Scales and minima of 6 bits: the first four of each are whole, the others are put together.
INLINE vec six_bit_scale(const uint8_t* at, int run, int v) {
    if (run < 4) return as_float(byte(at, run, v) & 63);
    return as_float((byte(at, run + 4, v) & 15) | byte(at, run - 4, v) >> 6 << 4);
}

INLINE vec six_bit_minimum(const uint8_t* at, int run, int v) {
    if (run < 4) return as_float(byte(at, run + 4, v) & 63);
    return as_float(byte(at, run + 4, v) >> 4 | byte(at, run, v) >> 6 << 4);
}

struct Q2_K {
    static constexpr int INPUTS = 256, BYTES = 84, OFFSET = 0, LARGEST = 3;
    static constexpr bool HALVES = true, MINIMA = true, SIGNED = false;
    static constexpr Field FIELDS[] = {{1, 16}, {4, 16}, {2, 1}, {2, 1}};

    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return low(word(block + 16 * PANEL, run / 4 * 8 + u, v) >> (run % 4 * 2), 3);
    }
    static INLINE vec scale(const uint8_t* block, int run, int half, int v) {
        return half_float(block + 80 * PANEL, v) * as_float(byte(block, 2 * run + half, v) & 15);
    }
    static INLINE vec minimum(const uint8_t* block, int run, int half, int v) {
        return half_float(block + 82 * PANEL, v) * as_float(byte(block, 2 * run + half, v) >> 4);
    }
};

struct Q3_K {
    static constexpr int INPUTS = 256, BYTES = 110, OFFSET = 4, LARGEST = 7;
    static constexpr bool HALVES = true, MINIMA = false, SIGNED = false;
    static constexpr Field FIELDS[] = {{4, 8}, {4, 16}, {1, 12}, {2, 1}};

    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return low(word(block + 32 * PANEL, run / 4 * 8 + u, v) >> (run % 4 * 2), 3) |
               low(moved(word(block, u, v), run, 2), 4);
    }
    static INLINE vec scale(const uint8_t* block, int run, int half, int v) {
        int number = 2 * run + half;
        ivec lower = byte(block + 96 * PANEL, number % 8, v) >> (number / 8 * 4) & 15;
        ivec upper = byte(block + 96 * PANEL, 8 + number % 4, v) >> (number / 4 * 2) & 3;
        return half_float(block + 108 * PANEL, v) * as_float((lower | upper << 4) - 32);
    }
};

struct Q4_K {
    static constexpr int INPUTS = 256, BYTES = 144, OFFSET = 0, LARGEST = 15;
    static constexpr bool HALVES = false, MINIMA = true, SIGNED = false;
    static constexpr Field FIELDS[] = {{2, 1}, {2, 1}, {1, 12}, {4, 32}};

    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return low(word(block + 16 * PANEL, run / 2 * 8 + u, v) >> (run % 2 * 4), 15);
    }
    static INLINE vec scale(const uint8_t* block, int run, int, int v) {
        return half_float(block, v) * six_bit_scale(block + 4 * PANEL, run, v);
    }
    static INLINE vec minimum(const uint8_t* block, int run, int, int v) {
        return half_float(block + 2 * PANEL, v) * six_bit_minimum(block + 4 * PANEL, run, v);
    }
};

struct Q5_K {
    static constexpr int INPUTS = 256, BYTES = 176, OFFSET = 0, LARGEST = 31;
    static constexpr bool HALVES = false, MINIMA = true, SIGNED = false;
    static constexpr Field FIELDS[] = {{2, 1}, {2, 1}, {1, 12}, {4, 8}, {4, 32}};

    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return low(word(block + 48 * PANEL, run / 2 * 8 + u, v) >> (run % 2 * 4), 15) |
               low(moved(word(block + 16 * PANEL, u, v), run, 4), 16);
    }
    static INLINE vec scale(const uint8_t* block, int run, int, int v) {
        return half_float(block, v) * six_bit_scale(block + 4 * PANEL, run, v);
    }
    static INLINE vec minimum(const uint8_t* block, int run, int, int v) {
        return half_float(block + 2 * PANEL, v) * six_bit_minimum(block + 4 * PANEL, run, v);
    }
};

struct Q6_K {
    static constexpr int INPUTS = 256, BYTES = 210, OFFSET = 32, LARGEST = 63;
    static constexpr bool HALVES = true, MINIMA = false, SIGNED = false;
    static constexpr Field FIELDS[] = {{4, 32}, {4, 16}, {1, 16}, {2, 1}};

    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        int part = run / 4, quarter = run % 4;  // 128 inputs are together
        return low(word(block, part * 16 + quarter % 2 * 8 + u, v) >> (quarter / 2 * 4), 15) |
               low(moved(word(block + 128 * PANEL, part * 8 + u, v), quarter * 2, 4), 48);
    }
    static INLINE vec scale(const uint8_t* block, int run, int half, int v) {
        return half_float(block + 208 * PANEL, v) * as_float(signed_byte(block + 192 * PANEL, 2 * run + half, v));
    }
};

struct IQ4_XS {
    static constexpr int INPUTS = 256, BYTES = 136, OFFSET = 0, LARGEST = 127;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = true;
    static constexpr Field FIELDS[] = {{2, 1}, {2, 1}, {1, 4}, {4, 32}};

    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return IQ4_VALUES.of(nibbles(block + 8 * PANEL, run * 4, u, v));
    }
    static INLINE vec scale(const uint8_t* block, int run, int, int v) {
        ivec lower = byte(block + 4 * PANEL, run / 2, v) >> (run % 2 * 4) & 15;
        ivec upper = short_word(block + 2 * PANEL, v) >> (2 * run) & 3;
        return half_float(block, v) * as_float((lower | upper << 4) - 32);
    }
};

}  // namespace
