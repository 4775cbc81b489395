// From codes of 4 and 8 bits to the numbers of bfloat16 that they stand for, in registers.
//
// A *lane* of 16 bytes holds 4 outputs by 4 inputs: first inputs 0 and 1 of output 0, of output 1, ..., then inputs 2
// and 3. So the upper and lower bytes of bfloat16, made separately, need only be interleaved to become units.
#pragma once

#include "gemm_tiles.h"

namespace {

constexpr int STEP = PANEL * 4;  // bytes of a panel that are decoded together

#if defined(__AVX512F__)
typedef __m512i bytes_register;
INLINE bytes_register load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE bytes_register every_byte(int value) { return _mm512_set1_epi8(char(value)); }
INLINE bytes_register every_lane(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE bytes_register look_up(bytes_register table, bytes_register at) { return _mm512_shuffle_epi8(table, at); }
template <int BITS>  // to the left, or to the right if negative; bits move into the neighbouring byte
INLINE bytes_register shifted(bytes_register x) {
    return BITS > 0 ? _mm512_slli_epi16(x, BITS & 15) : _mm512_srli_epi16(x, -BITS & 15);
}
INLINE void interleave(bytes_register low, bytes_register high, ivec (&pairs)[2]) {
    pairs[0] = (ivec)_mm512_unpacklo_epi8(low, high), pairs[1] = (ivec)_mm512_unpackhi_epi8(low, high);
}
#elif defined(__AVX2__)
typedef __m256i bytes_register;
INLINE bytes_register load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE bytes_register every_byte(int value) { return _mm256_set1_epi8(char(value)); }
INLINE bytes_register every_lane(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE bytes_register look_up(bytes_register table, bytes_register at) { return _mm256_shuffle_epi8(table, at); }
template <int BITS>
INLINE bytes_register shifted(bytes_register x) {
    return BITS > 0 ? _mm256_slli_epi16(x, BITS & 15) : _mm256_srli_epi16(x, -BITS & 15);
}
INLINE void interleave(bytes_register low, bytes_register high, ivec (&pairs)[2]) {
    pairs[0] = (ivec)_mm256_unpacklo_epi8(low, high), pairs[1] = (ivec)_mm256_unpackhi_epi8(low, high);
}
#else  // one lane at a time, by a table of all codes
template <class Table>
INLINE void look_up_lane(const uint8_t* p, const Table& table, int shift, int mask, ivec (&pairs)[2]) {
    for (int half = 0; half < 2; half++)
        for (int n = 0; n < LANES; n++) {
            const uint8_t* two = p + half * 8 + n * 2;
            pairs[half][n] = int32_t(table[two[0] >> shift & mask] | uint32_t(table[two[1] >> shift & mask]) << 16);
        }
}
#endif

// e4m3fn: a sign, four bits of exponent (bias 7), three of mantissa; `table` has the numbers without signs, [128]. A
// NaN (0x7f) may become 480 here: whoever packs a weight makes the scale of its group a NaN.
struct E4M3 {
    static constexpr int PARTS = 1;  // a register holds two units for each output in every part

#if defined(__AVX512VBMI__)
    explicit E4M3(const uint16_t* table) {
        for (int code = 0; code < 128; code++)
            low_[code] = uint8_t(table[code]), high_[code] = uint8_t(table[code] >> 8);
    }

    template <int PART>
    INLINE void decode(const uint8_t* p, ivec (&pairs)[2]) const {
        bytes_register code = load_bytes(p);
        bytes_register low = _mm512_permutex2var_epi8(load_bytes(low_), code, load_bytes(low_ + 64));
        bytes_register high = _mm512_permutex2var_epi8(load_bytes(high_), code, load_bytes(high_ + 64));
        interleave(low, _mm512_ternarylogic_epi64(high, code, every_byte(0x80), 0xf8), pairs);
    }

   private:
    alignas(64) uint8_t low_[128], high_[128];
#elif defined(__AVX2__)
    explicit E4M3(const uint16_t*) {}

    template <int PART>
    INLINE void decode(const uint8_t* p, ivec (&pairs)[2]) const {
        // Below 8 there is no implicit one: the numbers are 0 to 7 times 2^-9.
        alignas(16) static constexpr uint8_t LOW[16] = {0, 0, 0x80, 0xc0, 0, 0x20, 0x40, 0x60};
        alignas(16) static constexpr uint8_t HIGH[16] = {0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c};
        bytes_register code = load_bytes(p), magnitude = code & every_byte(0x7f);
        bytes_register low = shifted<4>(code) & every_byte(0xf0);  // the exponent's last bit, and the mantissa
        // The exponent's other bits, plus half the difference of the biases, 120; no byte overflows.
        bytes_register high = (shifted<-4>(code) & every_byte(7)) + every_byte(60);
#if defined(__AVX512F__)
        __mmask64 small = _mm512_cmplt_epu8_mask(magnitude, every_byte(8));
        low = _mm512_mask_shuffle_epi8(low, small, every_lane(LOW), magnitude);
        high = _mm512_mask_shuffle_epi8(high, small, every_lane(HIGH), magnitude);
#else
        bytes_register small = _mm256_cmpgt_epi8(every_byte(8), magnitude);
        low = _mm256_blendv_epi8(low, look_up(every_lane(LOW), magnitude), small);
        high = _mm256_blendv_epi8(high, look_up(every_lane(HIGH), magnitude), small);
#endif
        interleave(low, high | (code & every_byte(0x80)), pairs);
    }
#else
    explicit E4M3(const uint16_t* table) {
        for (int code = 0; code < 256; code++) table_[code] = uint16_t(table[code & 0x7f] | (code & 0x80) << 8);
    }

    template <int PART>
    INLINE void decode(const uint8_t* p, ivec (&pairs)[2]) const {
        look_up_lane(p, table_, 0, 0xff, pairs); }

   private:
    uint16_t table_[256];
#endif
};

// Codes of 4 bits, each half of a byte, the lower one of the earlier inputs; a table has the number of each.
struct Nibbles {
    static constexpr int PARTS = 2;

#if defined(__AVX2__)
    explicit Nibbles(const uint16_t* table) {
        for (int code = 0; code < 16; code++)
            low_[code] = uint8_t(table[code]), high_[code] = uint8_t(table[code] >> 8);
    }

    template <int PART>
    INLINE void decode(const uint8_t* p, ivec (&pairs)[2]) const {
        bytes_register both = load_bytes(p);
        bytes_register code = (PART ? shifted<-4>(both) : both) & every_byte(15);
        interleave(look_up(every_lane(low_), code), look_up(every_lane(high_), code), pairs);
    }

   private:
    uint8_t low_[16], high_[16];
#else
    explicit Nibbles(const uint16_t* table) { std::memcpy(table_, table, sizeof table_); }

    template <int PART>
    INLINE void decode(const uint8_t* p, ivec (&pairs)[2]) const {
        look_up_lane(p, table_, 4 * PART, 15, pairs);
    }

   private:
    uint16_t table_[16];
#endif
};

// Signed integers, all of which are numbers of bfloat16.
struct Integers {
    static constexpr int PARTS = 1;

    explicit Integers(const uint16_t*) {}

    template <int PART>
    INLINE void decode(const uint8_t* p, ivec (&pairs)[2]) const {
#if defined(__AVX2__)
        bytes_register code = load_bytes(p);
        interleave(code ^ code, code, pairs);
        for (int i = 0; i < 2; i++) pairs[i] = pair(pairs[i]);
#else
        for (int half = 0; half < 2; half++)
            for (int n = 0; n < LANES; n++) {
                const uint8_t* two = p + half * 8 + n * 2;
                pairs[half][n] = int32_t(uint32_t(two[0]) << 8 | uint32_t(two[1]) << 24);
            }
        for (int i = 0; i < 2; i++) pairs[i] = pair(pairs[i]);
#endif
    }

   private:
    // Two integers in the upper bytes of either half -> two numbers of bfloat16.
    static INLINE ivec pair(ivec upper_bytes) {
        ivec first = (ivec)__builtin_convertvector((upper_bytes << 16) >> 24, vec);
        ivec second = (ivec)__builtin_convertvector(upper_bytes >> 24, vec);
        return ((first >> 16) & 0xffff) | (second & int32_t(0xffff0000));
    }
};

}  // namespace
