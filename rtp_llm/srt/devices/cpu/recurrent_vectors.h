// Parts of the kernels in recurrent.cpp: how they go through channels and rows, and functions of single numbers.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common.h"

constexpr int64_t WORTH_THREADS = 32768;  // elements
constexpr int64_t CHANNELS = 8 * LANES;        // that a thread computes together
constexpr int64_t CONV_CHANNELS = 256;         // likewise, of many rows' convolution
constexpr int64_t MOST_TOGETHER = 16;          // times as many that it takes at a time
constexpr int64_t CHANNELS_AHEAD = 4 * LANES;  // distance of the prefetch
constexpr int LINE = 16 / LANES;  // vectors of float32 in a line of the cache
constexpr int MOST_TAPS = 16;
constexpr int MOST_STATES = 256;

// Pieces of rows: piece n begins with the state of slot load[n], and its last state goes to slot store[n].
struct Pieces {
    const int64_t *load, *store, *bounds;  // bounds null: one token in each piece
    int64_t count;
    INLINE int64_t begin(int64_t piece) const { return bounds ? bounds[piece] : piece; }
    INLINE int64_t end(int64_t piece) const { return bounds ? bounds[piece + 1] : piece + 1; }
};

#define INLINED __attribute__((always_inline))  // of a lambda

struct Whole {};  // all lanes of a vector; an int in its place: that number of first lanes
struct Line {};   // likewise, of LINE vectors
template <class T>
static INLINE vec load(const T* p, Whole) { return load(p); }
template <class T>
static INLINE vec load(const T* p, int count) { return load_part(p, count); }
template <class T>
static INLINE void store(T* p, vec x, Whole) { store(p, x); }
template <class T>
static INLINE void store(T* p, vec x, int count) { store_part(p, x, count); }

static INLINE int64_t channels_of(Whole) { return LANES; }
static INLINE int64_t channels_of(int count) { return count; }
template <class T>
static INLINE void copy(const T* from, int64_t count, T* to) { std::memmove(to, from, count * sizeof(T)); }

template <class Part>
constexpr int VECTORS_OF = std::is_same_v<Part, Line> ? LINE : 1;
static INLINE Whole of_each(Line) { return {}; }
static INLINE Whole of_each(Whole) { return {}; }
static INLINE int of_each(int count) { return count; }

// body(piece, first channel, Line, Whole or a number of channels) for all channels of all pieces. V: 1: no lines.
template <int V = 1, class F>
static INLINE void by_channels(const Pieces& pieces, int64_t channels, int64_t elements, F body) {
    const int64_t strips = (channels + CHANNELS - 1) / CHANNELS, tasks = pieces.count * strips;
    auto task = [&](int64_t i) {
        const int64_t first = i % strips * CHANNELS, end = std::min(first + CHANNELS, channels);
        int64_t c = first;
        if constexpr (V > 1)
            for (; c + V * LANES <= end; c += V * LANES) body(i / strips, c, Line{});
        for (; c + LANES <= end; c += LANES) body(i / strips, c, Whole{});
        if (c < end) body(i / strips, c, int(end - c));
    };
    if (elements < WORTH_THREADS || tasks == 1) {
        for (int64_t i = 0; i < tasks; i++) task(i);
        return;
    }
    // Several at a time, for which little is to be done: taking them would cost more.
    const int64_t together = std::min(MOST_TOGETHER, std::max<int64_t>(1, tasks / (8 * omp_get_max_threads())));
#pragma omp parallel for schedule(dynamic, together)
    for (int64_t i = 0; i < tasks; i++) task(i);
}

template <class F>
static INLINE void by_vectors(int64_t n, F body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, Whole{});
    if (i < n) body(i, int(n - i));
}

// body(row) for all rows, on more than one thread if `elements` are many.
template <class F>
static INLINE void by_rows(int64_t rows, int64_t elements, F body) {
    if (elements < WORTH_THREADS || rows == 1) {
        for (int64_t i = 0; i < rows; i++) body(i);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) body(i);
}

// ---- functions of single numbers

// log(1 + z) for z in [0, 1]: twice the series of the inverse hyperbolic tangent of z / (2 + z), which is below 1/3.
static INLINE vec log1p(vec z) {
    vec w = z / (z + 2.0f), s = w * w;
    vec p = splat(1.0f / 15);
    p = p * s + 1.0f / 13;
    p = p * s + 1.0f / 11;
    p = p * s + 1.0f / 9;
    p = p * s + 1.0f / 7;
    p = p * s + 1.0f / 5;
    p = p * s + 1.0f / 3;
    p = p * s + 1.0f;
    return w * p * 2.0f;
}

static INLINE vec softplus(vec x) {
    vec size = x < 0.0f ? -x : x;
    return (x > 0.0f ? x : vec{}) + log1p(exp(-size)) + (x - x);  // x - x: a NaN stays one
}

static INLINE vec sigmoid(vec x) { return 1.0f / (exp(-x) + 1.0f); }

constexpr float LOG2_E = 1.44269504088896341f;

// 2^x, relative error below 3e-7; at least 2^-126, at most 2^127, and exactly 1 for 0, so that a state without decay
// stays as it is.
static INLINE vec power_of_two(vec given) {
    vec x = min(splat(127.0f), max(splat(-126.0f), given));  // a NaN stays one
    vec scaled = x + 12582912.0f;  // rounds to an integer in the lower bits
    vec r = x - (scaled - 12582912.0f);
    vec p = splat(1.326472708e-3f);
    p = p * r + 9.671512862e-3f;
    p = p * r + 5.550733746e-2f;
    p = p * r + 2.402224208e-1f;
    p = p * r + 6.931469776e-1f;
    p = p * r + 1.0f;
    return (vec)((ivec)p + ((ivec)scaled << 23));  // the bits above the integer are shifted out
}
