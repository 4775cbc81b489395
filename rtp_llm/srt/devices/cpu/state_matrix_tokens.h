// What the kernels of state matrices are given, and what tokens need of a head: queries, keys, decays.
#pragma once

#include <algorithm>

#include "common.h"

constexpr int VECTORS = 2;  // of columns that are computed together
constexpr int COLUMNS = VECTORS * LANES;

template <class T>
struct Heads {  // of tokens: [P, heads, size], the last dimension contiguous
    const T* data;
    int64_t token_stride, head_stride;
    INLINE const T* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

template <class T>
struct Step {
    Heads<T> q, k, v;
    const float* g;        // delta rule: [P, v_heads] or [P, v_heads, k_dim]; else [v_heads], or null for Mamba 2
    Heads<T> beta;         // delta rule: how much is written; Mamba 2: step sizes before softplus, [P, v_heads]
    const float *a, *d, *dt_bias;  // Mamba 2: [v_heads] each; d and dt_bias may be null
    float dt_least, dt_most;
    float* states;  // [slots, v_heads, k_dim, v_dim]
    const int64_t *load, *store, *bounds;  // bounds null: one token in each piece
    int64_t pieces, k_heads, v_heads, k_dim, v_dim;
    bool normalize;
    T* out;  // [P, v_heads, v_dim]
};

enum Kind { DELTA, DELTA_OF_CHANNELS, LINEAR, MAMBA2 };

// A block of tokens of a head; k_dim numbers for each token where nothing else is said.
struct Tokens {
    float *q, *k;
    float* decays;        // of channels
    float *decay, *write;  // of the head; beta, or the factor of values
    int64_t count, k_dim;
};

static INLINE int part(int64_t columns, int j) {
    return int(std::min<int64_t>(std::max<int64_t>(columns - j * LANES, 0), LANES));
}

template <bool WHOLE, class T, int V>
static INLINE void load_columns(const T* p, int64_t columns, vec (&x)[V]) {
    for (int j = 0; j < V; j++) x[j] = WHOLE ? load(p + j * LANES) : load_part(p + j * LANES, part(columns, j));
}

template <bool WHOLE, class T, int V>
static INLINE void store_columns(T* p, int64_t columns, const vec (&x)[V]) {
    for (int j = 0; j < V; j++) {
        if (WHOLE) store(p + j * LANES, x[j]);
        else store_part(p + j * LANES, x[j], part(columns, j));
    }
}

// y = x in float32, times `factor`, over the length of x if asked.
template <class T>
static INLINE void prepare_vector(const T* x, int64_t size, bool normalize, float factor, float* y) {
    vec squares{};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vec part = load(x + i);
        store(y + i, part);
        squares += part * part;
    }
    float total = sum(squares);
    for (; i < size; i++) {
        y[i] = to_float(x[i]);
        total += y[i] * y[i];
    }
    if (normalize) factor /= std::sqrt(total + 1e-6f);
    for (i = 0; i < size; i++) y[i] *= factor;
}

static INLINE float softplus(float x) { return std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

template <class T, Kind KIND>
static void prepare_keys(const Step<T>& step, int64_t token, int64_t k_head, const Tokens& block) {
    const int64_t k_dim = step.k_dim;
    constexpr bool IS_DELTA = KIND == DELTA || KIND == DELTA_OF_CHANNELS;
    const float scale = IS_DELTA ? 1.0f / std::sqrt(float(k_dim)) : 1.0f;
    for (int64_t t = 0; t < block.count; t++) {
        prepare_vector(step.q.at(token + t, k_head), k_dim, step.normalize, scale, block.q + t * k_dim);
        prepare_vector(step.k.at(token + t, k_head), k_dim, step.normalize, 1.0f, block.k + t * k_dim);
    }
}

template <class T, Kind KIND>
static void prepare_decays(const Step<T>& step, int64_t token, int64_t head, const Tokens& block) {
    const int64_t k_dim = step.k_dim;
    for (int64_t t = 0; t < block.count; t++) {
        const int64_t place = (token + t) * step.v_heads + head;
        if (KIND == MAMBA2) {
            float dt = to_float(*step.beta.at(token + t, head)) + (step.dt_bias ? step.dt_bias[head] : 0.0f);
            block.write[t] = std::min(std::max(softplus(dt), step.dt_least), step.dt_most);
            block.decay[t] = std::exp(block.write[t] * step.a[head]);
        } else if (KIND == LINEAR) {
            block.write[t] = 1.0f;
            block.decay[t] = std::exp(step.g[head]);
        } else {
            block.write[t] = to_float(*step.beta.at(token + t, head));
        }
        if (KIND == DELTA) block.decay[t] = std::exp(step.g[place]);
        if (KIND == DELTA_OF_CHANNELS) {
            const float* g = step.g + place * k_dim;
            int64_t i = 0;
            for (; i + LANES <= k_dim; i += LANES) store(block.decays + t * k_dim + i, exp(load(g + i)));
            for (; i < k_dim; i++) block.decays[t * k_dim + i] = std::exp(g[i]);
        }
    }
}
