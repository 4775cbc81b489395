// Products of a unit of inputs with a register of outputs: pairs of bfloat16, and fours of bytes.
#pragma once

#include "gemm_panels.h"

#include <type_traits>

namespace {

// ---- two inputs

// Of rows: two bfloat16, or both in float32, so that rows are widened once (weights are in registers). In a tile of few
// rows, whose time is that of reading weights, rows should not need the nearest cache for themselves.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAVE_DOT_OF_BF16
typedef uint32_t Unit;
constexpr int ROWS_OF_PAIRS = ROWS;
#else
struct Unit {
    float first, second;
};
constexpr int ROWS_OF_PAIRS = 2;
#endif

template <int R>
using UnitOf = std::conditional_t<R <= ROWS_OF_PAIRS, uint32_t, Unit>;

template <class T>
INLINE T unit_of(uint32_t pair) {
    if constexpr (std::is_same_v<T, uint32_t>)
        return pair;
    else
        return {to_float(bf16{uint16_t(pair)}), to_float(bf16{uint16_t(pair >> 16)})};
}

INLINE vec first_of(ivec pair) { return (vec)(pair << 16); }

INLINE vec second_of(ivec pair) { return (vec)(pair & int32_t(0xffff0000)); }

INLINE vec add_pair(vec sum, uint32_t x, ivec pair) {
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)_mm512_set1_epi32(int(x)));
#elif defined(HAVE_DOT_OF_BF16)
    return (vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)pair, (bfloat16x8_t)vdupq_n_u32(x));
#else
    sum += first_of(ivec{} + int32_t(x)) * first_of(pair);
    return sum + second_of(ivec{} + int32_t(x)) * second_of(pair);
#endif
}

// sum + x * weights. Of the forms of this instruction, GCC chooses one that overwrites x, not the sum; with 16 registers,
// of which a tile uses all, it then moves sums to memory and back in every step.
INLINE vec add_product(vec sum, vec x, vec weights) {
#if defined(__FMA__) && !defined(__AVX512F__)
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(weights));
    return sum;
#else
    return sum + x * weights;
#endif
}

// sums[r][v] += the pairs of COUNT registers at w times the unit of row r.
#if defined(HAVE_DOT_OF_BF16)
// Row by row: the registers have room for all sums and weights, and for one row's unit.
template <int R, int COUNT>
INLINE void add_unit(vec (&sums)[R][COUNT], const uint32_t* x, const uint32_t* w) {
    ivec pairs[COUNT];
    for (int v = 0; v < COUNT; v++) pairs[v] = load_bits(w + v * LANES);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < COUNT; v++) sums[r][v] = add_pair(sums[r][v], x[r], pairs[v]);
}
#else
template <int R, int COUNT>
INLINE void add_unit(vec (&sums)[R][COUNT], const uint32_t* x, const uint32_t* w) {
    for (int v = 0; v < COUNT; v++) {
        ivec pair = load_bits(w + v * LANES);
        for (int r = 0; r < R; r++) sums[r][v] = add_pair(sums[r][v], x[r], pair);
    }
}

INLINE vec add_pair(vec sum, Unit x, ivec pair) {
    sum += splat(x.first) * first_of(pair);
    return sum + splat(x.second) * second_of(pair);
}

// All first inputs come before the second ones: so fewer registers are in use at a time.
template <int R, int COUNT>
INLINE void add_unit(vec (&sums)[R][COUNT], const Unit* x, const uint32_t* w) {
    vec weights[COUNT];
    for (int v = 0; v < COUNT; v++) weights[v] = first_of(load_bits(w + v * LANES));
    for (int r = 0; r < R; r++)
        for (int v = 0; v < COUNT; v++) sums[r][v] = add_product(sums[r][v], splat(x[r].first), weights[v]);
    for (int v = 0; v < COUNT; v++) weights[v] = second_of(load_bits(w + v * LANES));
    for (int r = 0; r < R; r++)
        for (int v = 0; v < COUNT; v++) sums[r][v] = add_product(sums[r][v], splat(x[r].second), weights[v]);
}
#endif

// ---- four inputs as bytes

// Whether one instruction adds the products of bytes; if not, products of neighbours are added in 16 bits, for which one
// factor must be small or both have their signs apart. On x86-64 one factor is unsigned; on ARM both are signed, so that
// an unsigned one must be below 128.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool HAVE_DOT = true, DOT_OF_SIGNED = false;

INLINE ivec add_bytes(ivec sum, ivec unsigned_bytes, ivec signed_bytes) {
#if defined(__AVX512F__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#elif defined(__AVXVNNI__)
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)unsigned_bytes, (__m256i)signed_bytes);
#else
    return (ivec)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)unsigned_bytes, (__m256i)signed_bytes);
#endif
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr bool HAVE_DOT = true, DOT_OF_SIGNED = true;

INLINE ivec add_bytes(ivec sum, ivec a, ivec b) {
    return (ivec)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
}
#else
constexpr bool HAVE_DOT = false, DOT_OF_SIGNED = false;

INLINE ivec add_bytes(ivec sum, ivec, ivec) { return sum; }  // not called
#endif

constexpr int ROWS_OF_BYTES = LANES == 16 || HAVE_DOT ? ROWS : 4;  // of a tile whose factors are both bytes

// Sums in 16 bits of two neighbouring products each.
typedef int16_t svec __attribute__((vector_size(LANES * 4)));

// w: unsigned bytes below 128, or, with SIGNED, any; `magnitudes` are theirs. x: no byte is -128.
template <bool SIGNED>
INLINE svec pairs(ivec w, ivec magnitudes, ivec x) {
#if defined(__AVX512BW__)
    if (!SIGNED) return (svec)_mm512_maddubs_epi16((__m512i)w, (__m512i)x);
    __m512i with_sign = _mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)w), __m512i{}, (__m512i)x);
    return (svec)_mm512_maddubs_epi16((__m512i)magnitudes, with_sign);
#elif defined(__AVX2__)
    if (!SIGNED) return (svec)_mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    return (svec)_mm256_maddubs_epi16((__m256i)magnitudes, _mm256_sign_epi8((__m256i)x, (__m256i)w));
#else
    svec first = ((svec)w << 8 >> 8) * ((svec)x << 8 >> 8);
    return first + ((svec)w >> 8) * ((svec)x >> 8);
#endif
}

INLINE ivec magnitudes_of(ivec w) {
#if defined(__AVX512BW__)
    return (ivec)_mm512_abs_epi8((__m512i)w);
#elif defined(__AVX2__)
    return (ivec)_mm256_abs_epi8((__m256i)w);
#else
    return w;  // not needed
#endif
}

// The sums of neighbours.
INLINE ivec widened(svec sums) {
#if defined(__AVX512BW__)
    return (ivec)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    return (ivec)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
#else
    return ((ivec)sums << 16 >> 16) + ((ivec)sums >> 16);
#endif
}

// ---- a unit of four inputs as bytes, times weights of 8 bits

// Of rows: four bytes, plus 128 where one factor of HAVE_DOT is unsigned; or all in 16 bits, whose products are added
// without another step. In a tile of few rows, bytes: as with Unit.
constexpr int OFFSET_OF_BYTES = HAVE_DOT && !DOT_OF_SIGNED ? 128 : 0;
constexpr int ROWS_OF_FOURS = HAVE_DOT ? ROWS : 2;

struct Shorts {
    uint32_t even, odd;  // inputs 0 and 2, and 1 and 3
};

using Four = std::conditional_t<HAVE_DOT, uint32_t, Shorts>;
template <int R>
using FourOf = std::conditional_t<R <= ROWS_OF_FOURS, uint32_t, Four>;

template <class T>
INLINE T four_of(uint32_t bytes) {
    if constexpr (std::is_same_v<T, uint32_t>) {
        return bytes;
    } else {
        uint32_t parts[2];
        for (int i = 0; i < 2; i++, bytes >>= 8)
            parts[i] = uint32_t(int8_t(bytes)) & 0xffff | uint32_t(int8_t(bytes >> 16)) << 16;
        return {parts[0], parts[1]};
    }
}

// Two products each of numbers of 16 bits, and their sum.
INLINE ivec add_shorts(ivec sum, svec a, ivec b) {
#if defined(__AVX512BW__)
    return sum + (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (ivec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + ((ivec)a << 16 >> 16) * (b << 16 >> 16) + ((ivec)a >> 16) * (b >> 16);
#endif
}

// sums[r][v] += the fours of COUNT registers at w times the unit of row r.
template <int R, int COUNT>
INLINE void add_fours(ivec (&sums)[R][COUNT], const uint32_t* x, const uint32_t* w) {
    for (int r = 0; r < R; r++)
        for (int v = 0; v < COUNT; v++) {
            ivec bytes = ivec{} + int32_t(x[r]), four = load_bits(w + v * LANES);
            if constexpr (HAVE_DOT)
                sums[r][v] = add_bytes(sums[r][v], bytes, four);
            else
                sums[r][v] += widened(pairs<true>(four, magnitudes_of(four), bytes));
        }
}

template <int R, int COUNT>
INLINE void add_fours(ivec (&sums)[R][COUNT], const Shorts* x, const uint32_t* w) {
    svec even[COUNT], odd[COUNT];
    for (int v = 0; v < COUNT; v++) {
        odd[v] = (svec)load_bits(w + v * LANES);
        even[v] = odd[v] << 8 >> 8, odd[v] >>= 8;
    }
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < COUNT; v++) sums[r][v] = add_shorts(sums[r][v], even[v], ivec{} + int32_t(x[r].even));
        for (int v = 0; v < COUNT; v++) sums[r][v] = add_shorts(sums[r][v], odd[v], ivec{} + int32_t(x[r].odd));
    }
}

}  // namespace
