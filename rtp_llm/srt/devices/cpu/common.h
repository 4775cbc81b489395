// Common parts of all CPU kernels: number formats, and vectors of float32 as wide as the machine's.
//
// A kernel file is compiled for one instruction set; __AVX512BF16__, __AVX512F__, __AVX2__ or none of them shows which,
// and __ARM_FEATURE_DOTPROD and __ARM_FEATURE_BF16_VECTOR_ARITHMETIC on AArch64, where vectors are NEON's anyway. All code below is correct for each of them; the vectors are GCC's vector extensions, which Clang has, too.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#else  // a compiler without OpenMP ignores its pragmas: there is one thread
static inline int omp_get_max_threads() { return 1; }
static inline int omp_get_num_threads() { return 1; }
static inline int omp_get_thread_num() { return 0; }
static inline void omp_set_num_threads(int) {}
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define KERNEL extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

// ---- bfloat16: the upper half of a float32

struct bf16 {
    uint16_t bits;
};

static INLINE float to_float(float x) { return x; }

static INLINE float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class T>
static INLINE T from_float(float x);

template <>
INLINE float from_float<float>(float x) {
    return x;
}

// Rounds to nearest, ties to even, as torch does; a NaN stays one.
template <>
INLINE bf16 from_float<bf16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16{uint16_t((bits >> 16) | 0x40)};
    return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// ---- float16: 5 bits of exponent, 10 of fraction

struct f16 {
    uint16_t bits;
};

// ---- vectors of float32

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_unaligned __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));
typedef uint16_t hvec_unaligned __attribute__((vector_size(LANES * 2), aligned(2)));

static INLINE vec splat(float x) { return x - vec{}; }

static INLINE ivec splat_bits(int32_t x) { return x - ivec{}; }

static INLINE vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }

static INLINE vec load(const bf16* p) {
#if defined(__AVX512F__)  // GCC 12 would take the register in two halves
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#elif defined(__aarch64__)
    return (vec)vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16);
#else
    hvec half = *reinterpret_cast<const hvec_unaligned*>(p);
    return (vec)(__builtin_convertvector(half, ivec) << 16);
#endif
}

#if !defined(__F16C__) && !defined(__aarch64__)
// Bits of float16 in the lower halves. Their exponent is 112 less than float32's; numbers without one, which have no
// leading 1, are made with the smallest exponent, of which the 1 is then taken away.
static INLINE vec from_halves(ivec halves) {
    ivec magnitude = (halves & 0x7fff) << 13, sign = (halves & 0x8000) << 16;
    ivec whole = magnitude + (112 << 23), no_number = (ivec)(magnitude >= (31 << 23)) & (112 << 23);
    vec small = (vec)(magnitude + (113 << 23)) - 6.103515625e-5f;
    return (vec)((magnitude < (1 << 23) ? (ivec)small : whole + no_number) | sign);
}

// The reverse, to nearest, ties to even. A number without an exponent is rounded by adding one whose last bit is its.
static INLINE ivec to_halves(vec x) {
    ivec sign = ((ivec)x >> 16) & 0x8000, magnitude = (ivec)x & 0x7fffffff;
    ivec whole = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    ivec small = (ivec)((vec)magnitude + 0.5f) - (126 << 23);
    ivec half = magnitude < (113 << 23) ? small : whole;
    half = magnitude >= (143 << 23) ? splat_bits(0x7c00) : half;
    return (magnitude > (255 << 23) ? splat_bits(0x7e00) : half) | sign;
}
#endif

static INLINE vec load(const f16* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
    return (vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
#else
    return from_halves(__builtin_convertvector(*reinterpret_cast<const hvec_unaligned*>(p), ivec));
#endif
}

static INLINE void store(float* p, vec x) { *reinterpret_cast<vec_unaligned*>(p) = x; }

static INLINE void store(bf16* p, vec x) {
#if defined(__AVX512BF16__)
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &rounded, 32);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    bfloat16x4_t rounded = vcvt_bf16_f32((float32x4_t)x);
    std::memcpy(p, &rounded, 8);
#else
    ivec bits = (ivec)x;
    ivec rounded = bits + 0x7fff + ((bits >> 16) & 1);
    ivec is_nan = (ivec)(x != x);
    bits = (is_nan & (bits | 0x400000)) | (~is_nan & rounded);
    *reinterpret_cast<hvec_unaligned*>(p) = __builtin_convertvector((bits >> 16) & 0xffff, hvec);
#endif
}

static INLINE void store(f16* p, vec x) {
#if defined(__AVX512F__)
    __m256i rounded = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p, &rounded, 32);
#elif defined(__F16C__)
    __m128i rounded = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &rounded, 16);
#elif defined(__aarch64__)
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
    *reinterpret_cast<hvec_unaligned*>(p) = __builtin_convertvector(to_halves(x), hvec);
#endif
}

static INLINE float to_float(f16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    f16 numbers[LANES] = {x};
    return load(numbers)[0];
#endif
}

template <>
INLINE f16 from_float<f16>(float x) {
#if defined(__F16C__)
    return f16{uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
    f16 numbers[LANES];
    store(numbers, splat(x));
    return numbers[0];
#endif
}

// b where one is NaN
static INLINE vec max(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

static INLINE vec min(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

static INLINE float sum(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__aarch64__)
    return vaddvq_f32((float32x4_t)x);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

static INLINE float largest(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

// e^x, relative error below 3e-7 for x in [-87, 88]; 0 below, never more than e^88, and NaN of NaN. As in Cephes
// (Moshier): a power of two times a polynomial.
static INLINE vec exp(vec given) {
    ivec too_small = (ivec)(given < -87.3f);
    vec x = min(max(given, splat(-87.3f)), splat(88.0f));
    vec scaled = x * 1.44269504088896341f + 12582912.0f;  // rounds to an integer in the lower bits
    ivec power = (ivec)scaled - (ivec)splat(12582912.0f);
    vec whole = scaled - 12582912.0f;
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec result = (vec)((ivec)p + (power << 23));
    return given == given ? (vec)((ivec)result & ~too_small) : given;
}

static INLINE vec silu(vec x) { return x / (exp(-x) + 1.0f); }

// x * Phi(x) with Phi's approximation by a hyperbolic tangent, 0.5 * (1 + tanh(z)) = 1 / (1 + exp(-2 z)).
static INLINE vec gelu_tanh(vec x) {
    vec z = (x * x * 0.044715f + 1.0f) * x * 0.79788456080286536f;
    return x / (exp(z * -2.0f) + 1.0f);
}

// x * Phi(x) with Phi by the error function, erf(z) = z P(z z) / Q(z z) below 4 (relative error below 3e-8, fitted by
// least squares), else 1.
static INLINE vec gelu(vec x) {
    vec z = x * 0.70710678118654752f, s = min(z * z, splat(16.0f));
    vec p = splat(1.98676980289747e-6f);
    p = p * s + 2.8456549625843763e-4f;
    p = p * s + 3.88335925526917e-3f;
    p = p * s + 5.31017929315567e-2f;
    p = p * s + 1.9354553520679474e-1f;
    p = p * s + 1.1283791065216064f;
    vec q = splat(3.742002081708051e-5f);
    q = q * s + 1.1855734046548605e-3f;
    q = q * s + 1.5207283198833466e-2f;
    q = q * s + 1.1535017937421799e-1f;
    q = q * s + 5.048578381538391e-1f;
    q = q * s + 1.0f;
    vec erf = z * p / q, sign = z < 0.0f ? splat(-1.0f) : splat(1.0f);
    return x * ((s < 15.3f ? erf : sign) * 0.5f + 0.5f);
}

// x rounded as by a store in T.
template <class T>
static INLINE vec rounded(vec x) {
    T buffer[LANES];
    store(buffer, x);
    return load(buffer);
}
template <>
INLINE vec rounded<float>(vec x) {
    return x;
}

// The last elements of a row whose size is not a multiple of LANES go through a short buffer.
template <class T>
static INLINE vec load_part(const T* p, int count, float fill = 0.0f) {
    float buffer[LANES];
    for (int i = 0; i < LANES; i++) buffer[i] = i < count ? to_float(p[i]) : fill;
    return load(buffer);
}

template <class T>
static INLINE void store_part(T* p, vec x, int count) {
    float buffer[LANES];
    store(buffer, x);
    for (int i = 0; i < count; i++) p[i] = from_float<T>(buffer[i]);
}
