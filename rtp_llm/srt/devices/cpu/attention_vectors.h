// Sizes of items and tiles, and arithmetic: powers of two, scores, products of units, conversions.
#pragma once

#include "attention_arguments.h"

#include <algorithm>
#include <type_traits>

static INLINE vec load(const int8_t* p) {
    typedef int8_t qvec __attribute__((vector_size(LANES)));
    qvec bytes;
    std::memcpy(&bytes, p, LANES);
    return __builtin_convertvector(__builtin_convertvector(bytes, ivec), vec);
}

static INLINE float to_float(int8_t x) { return x; }

namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float MASKED = -1e30f;  // the score of a hidden key: finite, so that inf - inf does not occur
constexpr float MASKED_PRODUCT = -1e33f;  // the same before it is scaled, by 0.001 to 10,000
constexpr float LOWEST = -1e29f;  // initial maximum: above MASKED, so that 2^(masked - maximum) is 0

constexpr int NARROW_KEYS = 32;  // keys that a narrow item computes at a time
constexpr int64_t STRIP_BYTES = 1 << 14;  // of keys, or of values, that a narrow item reads together
constexpr int NARROW_HEADS = 8;  // most query heads per key head of a narrow item
constexpr int WIDE_KEYS = 128;
constexpr int WIDE_COLUMNS = 192;
constexpr int PANEL_VECS = 3;  // columns of one tile, in vectors
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8;
#else
constexpr int TILE_ROWS = 4;  // sixteen registers
#endif
constexpr int KEYS_PER_SPLIT = 256;  // of a row of one token; one such row occupies several cores
constexpr int SPLITS_OF_SHORT = 2, FEWEST_KEYS_OF_SPLIT = 64;  // of fewer keys, so that two cores share them too
constexpr int MAX_SPLITS = 64;
constexpr int KEYS_PER_SHARED_SPLIT = 512;

// Some machines have products of bfloat16: two neighbours along the sum in one 32-bit unit. Others compute in float32,
// whatever the stored type, as all do with float16.
#if defined(__AVX512BF16__)
template <class T>
using Computed = std::conditional_t<std::is_same<T, bf16>::value, bf16, float>;
#else
template <class T>
using Computed = float;
#endif

template <class C>
constexpr int PACK = 4 / int(sizeof(C));  // numbers in a unit
template <class C>
constexpr int STEP = LANES * PACK<C>;  // numbers in a vector of units

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <bool PRECISE>
INLINE vec exp2(vec x) {
#if defined(__AVX512F__)
    __m512 whole = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec r = x - (vec)whole;
#else
    ivec too_small = (ivec)(x < -126.0f);
    vec bounded = min(max(x, splat(-126.0f)), splat(126.0f));
    vec shifted = bounded + 12582912.0f;  // rounds to an integer in the lower bits
    vec r = bounded - (shifted - 12582912.0f);
#endif
    // Taylor series: error at most 2e-7 for |r| <= 0.5, or 5e-5, which suffices if the result is rounded to bfloat16.
    vec p = splat(9.618129107628e-3f);
    if (PRECISE) p = p + r * (splat(1.333355814642e-3f) + r * 1.540353039338e-4f);
    p = p * r + 5.550410866482e-2f;
    p = p * r + 2.402265069591e-1f;
    p = p * r + 6.931471805599e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, whole);
#else
    ivec power = (ivec)shifted - (ivec)splat(12582912.0f);
    vec result = (vec)(((ivec)p + (power << 23)) & ~too_small);
    return x == x ? result : x;
#endif
}

INLINE vec lane_numbers() {
    alignas(64) static constexpr auto numbers = [] {
        struct { float at[LANES]; } result{};
        for (int i = 0; i < LANES; i++) result.at[i] = float(i);
        return result;
    }();
    return load(numbers.at);
}

INLINE vec tanh(vec x) { return 1.0f - 2.0f / (1.0f + exp2<true>(x * (2.0f * LOG2E))); }

float exp2_of(float x) { return exp2<true>(splat(x))[0]; }

// Converts products of queries and keys to exponents of two.
struct Scores {
    float factor, cap, cap_factor;
    bool plain;  // scores are products times a factor within the range of MASKED_PRODUCT

    explicit Scores(const Attention& a)
        : factor(float(a.scaling) * LOG2E),
          cap(float(a.logit_cap) * LOG2E),
          cap_factor(a.logit_cap > 0 ? float(a.scaling / a.logit_cap) : 0),
          plain(cap <= 0 && factor >= 1e-3f && factor <= 1e4f) {}

    INLINE vec operator()(vec products, float key_scale) const {
        if (cap > 0) return cap * tanh(products * (cap_factor * key_scale));
        return products * (factor * key_scale);
    }
    INLINE vec operator()(vec products, vec key_scales) const {
        if (cap > 0) return cap * tanh(products * (cap_factor * key_scales));
        return products * (factor * key_scales);
    }
};

// sum + (units of a) * (units of b)
template <class C>
INLINE vec multiply_add(vec a, vec b, vec sum) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same<C, bf16>::value)
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#endif
    return sum + a * b;
}

INLINE vec broadcast(const uint32_t* unit) {
#if defined(__AVX512F__)
    return (vec)_mm512_set1_epi32(int(*unit));
#else
    float value;
    std::memcpy(&value, unit, 4);
    return splat(value);
#endif
}

// Loads a vector of units of C from numbers of type R: unchanged, or widened from 16 bits.
template <class C, class R>
INLINE vec units(const R* p) {
    if constexpr (sizeof(C) == 2) return load(reinterpret_cast<const float*>(p));
    else return load(p);
}

template <class C, class S>
INLINE void convert_vector(const S* from, C* to) {
    if constexpr (std::is_same<C, S>::value) store(reinterpret_cast<float*>(to), load(reinterpret_cast<const float*>(from)));
    else
        for (int i = 0; i < PACK<C>; i++) store(to + i * LANES, load(from + i * LANES));
}

// `size` numbers and zeros up to `padded`, a multiple of STEP<C>.
template <class C, class S>
INLINE void convert(const S* from, int64_t size, C* to, int64_t padded) {
    int64_t i = 0;
    for (; i + STEP<C> <= size; i += STEP<C>) convert_vector(from + i, to + i);
    for (; i < padded; i++) to[i] = i < size ? from_float<C>(to_float(from[i])) : C{};
}

// The sums of four vectors.
INLINE void sums(const vec (&x)[4], float* out) {
#if defined(__AVX512F__)
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[0], (__m512)x[1]), _mm512_unpackhi_ps((__m512)x[0], (__m512)x[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[2], (__m512)x[3]), _mm512_unpackhi_ps((__m512)x[2], (__m512)x[3]));
    __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    __m512 quarters = _mm512_add_ps((__m512)low, (__m512)high);
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#elif defined(__AVX2__)
    __m256 ab = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), cd = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
    __m256 halves = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#elif defined(__aarch64__)
    float32x4_t ab = vpaddq_f32((float32x4_t)x[0], (float32x4_t)x[1]);
    vst1q_f32(out, vpaddq_f32(ab, vpaddq_f32((float32x4_t)x[2], (float32x4_t)x[3])));
#else
    for (int i = 0; i < 4; i++) out[i] = sum(x[i]);
#endif
}

}  // namespace
