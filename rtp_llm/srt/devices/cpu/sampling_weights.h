// weights: exp((logit - largest) / temperature) in float64
#pragma once

#include "common.h"

constexpr int DLANES = LANES / 2;
typedef double dvec __attribute__((vector_size(DLANES * 8)));
typedef double dvec_unaligned __attribute__((vector_size(DLANES * 8), aligned(8)));
typedef int64_t lvec __attribute__((vector_size(DLANES * 8)));
typedef float fvec __attribute__((vector_size(DLANES * 4)));
typedef float fvec_unaligned __attribute__((vector_size(DLANES * 4), aligned(4)));

// 2^n, for n in [-1022, 1023], given n + magic.
constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: added to a small number, its integer is in the low bits
static INLINE dvec power_of_two(dvec n_and_magic) {
    return (dvec)(((lvec)n_and_magic - (lvec)(dvec{} + MAGIC) + 1023) << 52);
}

// e^x for x <= 0, to about one unit in the last place, with correct zeros and subnormal numbers. Not for NaN.
static INLINE dvec exp(dvec x) {
    x = x > -746.0 ? x : dvec{} - 746.0;
    dvec n_and_magic = x * 1.4426950408889634074 + MAGIC;
    dvec n = n_and_magic - MAGIC;
    dvec r = x - n * 6.93145751953125e-1;
    r -= n * 1.42860682030941723212e-6;
    dvec p = dvec{} + 1.0 / 6227020800.0;  // first of the terms of the series that matter in float64
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    dvec half = n * 0.5 + MAGIC;  // the power in two steps, since 2^n of a subnormal result is not normal
    return p * power_of_two(half) * power_of_two(n - (half - MAGIC) + MAGIC);
}

struct Scale {
    double largest, temperature;

    INLINE dvec weights(dvec logits) const {
        dvec x = logits - largest;
        return exp(temperature == 1.0 ? x : x / temperature);
    }
    double weight(float logit) const {
        double w;
        weights(&logit, 1, &w);
        return w;
    }
    void weights(const float* logits, int64_t n, double* w) const {
        int64_t i = 0;
        for (; i + DLANES <= n; i += DLANES) {
            fvec x = *reinterpret_cast<const fvec_unaligned*>(logits + i);
            *reinterpret_cast<dvec_unaligned*>(w + i) = weights(__builtin_convertvector(x, dvec));
        }
        if (i == n) return;
        dvec rest = dvec{} + largest;
        for (int64_t j = i; j < n; j++) rest[j - i] = logits[j];
        rest = weights(rest);
        for (int64_t j = i; j < n; j++) w[j] = rest[j - i];
    }
};
