// Norms, gated activations and rotations: one pass over memory each, with the roundings of kernels/reference.py.
//
// A kernel file exports them for a type by EXPORT_ELEMENTWISE(suffix of names, T), for calls from a list, too.
#pragma once

#include "common.h"
#include "replay.h"

#include <initializer_list>

// ---- helpers

// Elements from which a parallel region saves more than it costs.
constexpr int64_t WORTH_THREADS = 32768;

// body(i) for every i below n; `elements`: the total number of elements, for the choice of threads.
template <class F>
static INLINE void parallel_for(int64_t n, int64_t elements, F body) {
    if (elements < WORTH_THREADS || n == 1) {
        for (int64_t i = 0; i < n; i++) body(i);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) body(i);
}

struct Whole {};  // all lanes of a vector; an int in its place: that number of first lanes

// body(i, Whole) for every whole vector of a row of n elements, body(i, count) for the rest.
template <class F>
static INLINE void by_vectors(int64_t n, F body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, Whole{});
    if (i < n) body(i, int(n - i));
}

template <class T>
static INLINE vec load(const T* p, Whole, float = 0) { return load(p); }
template <class T>
static INLINE vec load(const T* p, int count, float fill = 0) { return load_part(p, count, fill); }
template <class T>
static INLINE void store(T* p, vec x, Whole) { store(p, x); }
template <class T>
static INLINE void store(T* p, vec x, int count) { store_part(p, x, count); }

template <class T>
static INLINE float rounded(float x) {
    return to_float(from_float<T>(x));
}

// ---- norms

enum NormKind { RMS, GEMMA, LAYER };

// y = norm(x) of one row; `given` is x, or x + residual, already rounded to T.
template <class T, NormKind kind>
static INLINE void norm_row(const T* given, const T* weight, const T* bias, T* y, int64_t size, float eps) {
    float mean = 0;
    if (kind == LAYER) {
        vec total{};
        by_vectors(size, [&](int64_t i, auto part) { total += load(given + i, part); });
        mean = sum(total) / size;
    }
    vec squares{};
    by_vectors(size, [&](int64_t i, auto part) {
        vec x = load(given + i, part, mean) - mean;
        squares += x * x;
    });
    float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
    by_vectors(size, [&](int64_t i, auto part) {
        vec x = load(given + i, part), w = load(weight + i, part);
        if (kind == RMS) x = rounded<T>(x * scale) * w;
        if (kind == GEMMA) x = x * scale * (w + 1.0f);
        if (kind == LAYER) x = (x - mean) * scale * w + (bias ? load(bias + i, part) : vec{});
        store(y + i, x, part);
    });
}

// Rows have two levels of strides, outer_stride and inner_stride; y is contiguous. With a residual (inner is 1), its
// sum with x is rounded, stored in `added`, and normed.
template <class T, NormKind kind>
static void norm(const T* x, const T* residual, const T* weight, const T* bias, T* y, T* added, int64_t outer,
                 int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t residual_stride, int64_t size,
                 float eps) {
    parallel_for(outer, outer * inner * size, [&](int64_t o) {
        for (int64_t i = 0; i < inner; i++) {
            const T* row = x + o * outer_stride + i * inner_stride;
            int64_t at = (o * inner + i) * size;
            if (residual) {
                const T* more = residual + o * residual_stride;
                by_vectors(size, [&](int64_t j, auto part) {
                    store(added + at + j, load(row + j, part) + load(more + j, part), part);
                });
                row = added + at;
            }
            norm_row<T, kind>(row, weight, bias, y + at, size, eps);
        }
    });
}

// ---- gated activations

// The error function's complement for z >= 0, relative error below 1e-6, as in Cephes (Moshier).
static INLINE vec erfc(vec z) {
    vec q = z * z;
    vec near = splat(7.853861353153693e-5f);
    near = near * q - 8.010193625184903e-4f;
    near = near * q + 5.188327685732524e-3f;
    near = near * q - 2.685381193529856e-2f;
    near = near * q + 1.128358514861418e-1f;
    near = near * q - 3.761262582423300e-1f;
    near = near * q + 1.128379165726710f;
    vec r = 1.0f / max(z, splat(1.0f)), s = r * r;
    vec mid = splat(2.326819970068386e-2f);
    mid = mid * s - 1.387039388740657e-1f;
    mid = mid * s + 3.687424674597105e-1f;
    mid = mid * s - 5.824733027278666e-1f;
    mid = mid * s + 6.210004621745983e-1f;
    mid = mid * s - 4.944515323274145e-1f;
    mid = mid * s + 3.404879937665872e-1f;
    mid = mid * s - 2.741127028184656e-1f;
    mid = mid * s + 5.638259427386472e-1f;
    vec far = splat(-1.047766399936249e1f);
    far = far * s + 1.297719955372516e1f;
    far = far * s - 7.495518717768503f;
    far = far * s + 2.921019019210786f;
    far = far * s - 1.015265279202700f;
    far = far * s + 4.218463358204948e-1f;
    far = far * s - 2.820767439740514e-1f;
    far = far * s + 5.641895067754075e-1f;
    vec tail = exp(-q) * r * (z < 2.0f ? mid : far);
    return z < 1.0f ? 1.0f - z * near : tail;
}

static INLINE vec gelu_erf(vec x) {
    vec half = erfc((x < 0.0f ? -x : x) * 0.70710678118654752f) * 0.5f;
    return x * (x < 0.0f ? half : 1.0f - half);
}

// y[rows, size] = rounded(f(first half)) * second half of x[rows, 2 * size].
template <class T, class F>
static INLINE void gated(const T* x, T* y, int64_t rows, int64_t size, int64_t stride, F f) {
    parallel_for(rows, rows * size, [&](int64_t row) {
        const T *gate = x + row * stride, *up = gate + size;
        by_vectors(size, [&](int64_t i, auto part) {
            store(y + row * size + i, rounded<T>(f(load(gate + i, part))) * load(up + i, part), part);
        });
    });
}

// GPT-OSS: gate at even places, up at odd ones.
template <class T>
static void swiglu_oai(const T* x, T* y, int64_t rows, int64_t size, int64_t stride, float alpha, float limit) {
    parallel_for(rows, rows * size, [&](int64_t row) {
        float gates[LANES] = {}, ups[LANES] = {};
        for (int64_t i = 0; i < size; i += LANES) {
            int count = size - i < LANES ? int(size - i) : LANES;
            const T* pairs = x + row * stride + 2 * i;
            for (int j = 0; j < count; j++) gates[j] = to_float(pairs[2 * j]), ups[j] = to_float(pairs[2 * j + 1]);
            vec gate = load(gates), up = load(ups), top = splat(limit);
            gate = gate > top ? top : gate;
            up = up > top ? top : up < -top ? -top : up;
            vec sigmoid = rounded<T>(1.0f / (exp(-rounded<T>(gate * alpha)) + 1.0f));
            store_part(y + row * size + i, rounded<T>(rounded<T>(up + 1.0f) * gate) * sigmoid, count);
        }
    });
}

// ---- rotary positions

// Rotates one head: pairs (i, i + half), or (2i, 2i + 1). Each product is rounded, as in torch. y may be x.
template <class T>
static INLINE void rotate_head(const T* x, T* y, const T* cos, const T* sin, int64_t half, int64_t head_size,
                               bool is_neox) {
    if (is_neox) {
        by_vectors(half, [&](int64_t i, auto part) {
            vec first = load(x + i, part), second = load(x + half + i, part);
            vec c = load(cos + i, part), s = load(sin + i, part);
            store(y + i, rounded<T>(first * c) - rounded<T>(second * s), part);
            store(y + half + i, rounded<T>(second * c) + rounded<T>(first * s), part);
        });
    } else {
        for (int64_t i = 0; i < half; i++) {
            float first = to_float(x[2 * i]), second = to_float(x[2 * i + 1]);
            float c = to_float(cos[i]), s = to_float(sin[i]);
            y[2 * i] = from_float<T>(rounded<T>(first * c) - rounded<T>(second * s));
            y[2 * i + 1] = from_float<T>(rounded<T>(second * c) + rounded<T>(first * s));
        }
    }
    if (y != x) std::memcpy(y + 2 * half, x + 2 * half, (head_size - 2 * half) * sizeof(T));
}

template <class T>
struct Heads {
    const T* x;
    T* y;
    int64_t num_heads, x_token_stride, x_head_stride, y_token_stride, y_head_stride;
};

template <class T>
static void rotate(Heads<T> q, Heads<T> k, const T* cos, const T* sin, int64_t num_tokens, int64_t half,
                   int64_t head_size, bool is_neox) {
    int64_t elements = num_tokens * (q.num_heads + k.num_heads) * head_size;
    parallel_for(num_tokens, elements, [&](int64_t token) {
        for (const Heads<T>& heads : {q, k}) {
            for (int64_t head = 0; head < heads.num_heads; head++) {
                rotate_head(heads.x + token * heads.x_token_stride + head * heads.x_head_stride,
                            heads.y + token * heads.y_token_stride + head * heads.y_head_stride, cos + token * half,
                            sin + token * half, half, head_size, is_neox);
            }
        }
    });
}

// ---- norms and rotations of heads

template <class T>
struct Norms {
    const T *q_weight, *k_weight;
    float eps;
};

// Each head is normed to its place in y, and rotated there.
template <class T, NormKind kind>
static void norm_and_rotate(Heads<T> q, Heads<T> k, Norms<T> norms, const T* cos, const T* sin, int64_t num_tokens,
                            int64_t half, int64_t head_size, bool is_neox) {
    int64_t elements = num_tokens * (q.num_heads + k.num_heads) * head_size;
    parallel_for(num_tokens, elements, [&](int64_t token) {
        for (const Heads<T>* heads : {&q, &k}) {
            const T* weight = heads == &q ? norms.q_weight : norms.k_weight;
            for (int64_t head = 0; head < heads->num_heads; head++) {
                const T* x = heads->x + token * heads->x_token_stride + head * heads->x_head_stride;
                T* y = heads->y + token * heads->y_token_stride + head * heads->y_head_stride;
                norm_row<T, kind>(x, weight, nullptr, y, head_size, norms.eps);
                rotate_head(y, y, cos + token * half, sin + token * half, half, head_size, is_neox);
            }
        }
    });
}

// ---- exports

#define EXPORT_NORM(name, T, kind)                                                                                  \
    KERNEL void name(const T* x, const T* residual, const T* weight, const T* bias, T* y, T* added, int64_t outer,  \
                     int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t residual_stride,            \
                     int64_t size, float eps) {                                                                     \
        norm<T, kind>(x, residual, weight, bias, y, added, outer, inner, outer_stride, inner_stride,                \
                      residual_stride, size, eps);                                                                  \
    }                                                                                                                \
    REPLAYED(name)

#define EXPORT_GATED(name, T, f)                                                           \
    KERNEL void name(const T* x, T* y, int64_t rows, int64_t size, int64_t stride) {       \
        gated(x, y, rows, size, stride, [](vec gate) { return f(gate); });                 \
    }                                                                                                                \
    REPLAYED(name)

#define EXPORT_SWIGLU_OAI(name, T)                                                                                   \
    KERNEL void name(const T* x, T* y, int64_t rows, int64_t size, int64_t stride, float alpha, float limit) {       \
        swiglu_oai(x, y, rows, size, stride, alpha, limit);                                                          \
    }                                                                                                                \
    REPLAYED(name)

#define ARGUMENTS_OF_HEADS(T, x)                                                                                     \
    const T *x, T *x##_out, int64_t x##_heads, int64_t x##_token_stride, int64_t x##_head_stride,                    \
        int64_t x##_out_token_stride, int64_t x##_out_head_stride
#define HEADS(x)                                                                                                     \
    {x, x##_out, x##_heads, x##_token_stride, x##_head_stride, x##_out_token_stride, x##_out_head_stride}

#define EXPORT_ROTARY(name, T)                                                                                       \
    KERNEL void name(ARGUMENTS_OF_HEADS(T, q), ARGUMENTS_OF_HEADS(T, k), const T* cos, const T* sin,                 \
                     int64_t num_tokens, int64_t half, int64_t head_size, int is_neox) {                             \
        rotate<T>(HEADS(q), HEADS(k), cos, sin, num_tokens, half, head_size, is_neox);                               \
    }                                                                                                                \
    REPLAYED(name)

#define EXPORT_NORM_ROTARY(name, T, kind)                                                                            \
    KERNEL void name(ARGUMENTS_OF_HEADS(T, q), ARGUMENTS_OF_HEADS(T, k), const T* q_weight, const T* k_weight,       \
                     float eps, const T* cos, const T* sin, int64_t num_tokens, int64_t half, int64_t head_size,     \
                     int is_neox) {                                                                                  \
        norm_and_rotate<T, kind>(HEADS(q), HEADS(k), {q_weight, k_weight, eps}, cos, sin, num_tokens, half,          \
                                 head_size, is_neox);                                                                \
    }                                                                                                                \
    REPLAYED(name)

#define EXPORT_ELEMENTWISE(suffix, T)                                                                                \
    EXPORT_NORM(rms_norm_##suffix, T, RMS)                                                                           \
    EXPORT_NORM(gemma_rms_norm_##suffix, T, GEMMA)                                                                   \
    EXPORT_NORM(layer_norm_##suffix, T, LAYER)                                                                       \
    EXPORT_GATED(silu_and_mul_##suffix, T, silu)                                                                     \
    EXPORT_GATED(gelu_and_mul_##suffix, T, gelu_erf)                                                                 \
    EXPORT_GATED(gelu_tanh_and_mul_##suffix, T, gelu_tanh)                                                           \
    EXPORT_SWIGLU_OAI(swiglu_oai_and_mul_##suffix, T)                                                                \
    EXPORT_ROTARY(rotary_##suffix, T)                                                                                \
    EXPORT_NORM_ROTARY(rms_norm_rotary_##suffix, T, RMS)                                                             \
    EXPORT_NORM_ROTARY(gemma_rms_norm_rotary_##suffix, T, GEMMA)
