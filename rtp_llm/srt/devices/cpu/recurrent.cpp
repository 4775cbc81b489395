// Layers that keep a state of single numbers: the convolution of the last tokens, Mamba 1's scan, a linear recurrence;
// and norms with a gate. States are [..., channels]: channels do not depend on each other, and lie side by side.
#include "recurrent_conv.h"
#include "replay.h"

// ---- convolution

#define EXPORT_CONV(name, T)                                                                                          \
    KERNEL void name(const T* x, int64_t x_stride, const T* before, int64_t before_stride, const T* after,            \
                     int64_t after_stride, const T* weight, const T* bias, T* states, const int64_t* load,            \
                     const int64_t* store, const int64_t* bounds, int64_t pieces, int64_t tokens, int64_t channels,   \
                     int64_t taps, bool silus, T* y) {                                                                \
        const Conv<T> conv{x, before, after, x_stride, before_stride, after_stride, weight, bias, states, channels,   \
                           taps, silus, y};                                                                           \
        auto run = before ? convolve<T, 3, true> : convolve<T, 4, false>;                                             \
        run(conv, {load, store, bounds, pieces}, tokens);                                                             \
    }
EXPORT_CONV(causal_conv1d_f32, float)
EXPORT_CONV(causal_conv1d_bf16, bf16)

// ---- what the delta rule is told by gates

// g [tokens, heads * channels] = rate * softplus(a + bias); beta [tokens, heads] = most * sigmoid(b).
template <class T>
static void delta_gates(const T* a, int64_t a_stride, const T* b, int64_t b_stride, const float* rate,
                        const float* bias, float most, int64_t tokens, int64_t heads, int64_t channels, float* g,
                        T* beta) {
    by_rows(tokens, tokens * heads * channels, [&](int64_t t) {
        const int64_t size = channels == 1 ? heads : channels;  // neighbours that are computed together
        for (int64_t first = 0; first < heads * channels; first += size)
            by_vectors(size, [&](int64_t i, auto part) {
                vec own = channels == 1 ? load(rate + i, part) : splat(rate[first / channels]);
                vec step = softplus(load(a + t * a_stride + first + i, part) + load(bias + first + i, part));
                store(g + t * heads * channels + first + i, own * step, part);
            });
        by_vectors(heads, [&](int64_t i, auto part) {
            store(beta + t * heads + i, rounded<T>(sigmoid(load(b + t * b_stride + i, part))) * most, part);
        });
    });
}

#define EXPORT_DELTA_GATES(name, T)                                                                                   \
    KERNEL void name(const T* a, int64_t a_stride, const T* b, int64_t b_stride, const float* rate, const float* bias, \
                     float most, int64_t tokens, int64_t heads, int64_t channels, float* g, T* beta) {                \
        delta_gates(a, a_stride, b, b_stride, rate, bias, most, tokens, heads, channels, g, beta);                    \
    }
EXPORT_DELTA_GATES(delta_gates_f32, float)
EXPORT_DELTA_GATES(delta_gates_bf16, bf16)

// y [outer, inner * size] = x * sigmoid(gate); rows of the gate have two levels of strides.
template <class T>
static void sigmoid_gate(const T* x, const T* gate, int64_t gate_outer, int64_t gate_inner, int64_t outer,
                         int64_t inner, int64_t size, T* y) {
    by_rows(outer, outer * inner * size, [&](int64_t o) {
        for (int64_t n = 0; n < inner; n++)
            by_vectors(size, [&](int64_t i, auto part) {
                const int64_t place = (o * inner + n) * size + i;
                vec factor = rounded<T>(sigmoid(load(gate + o * gate_outer + n * gate_inner + i, part)));
                store(y + place, load(x + place, part) * factor, part);
            });
    });
}

#define EXPORT_SIGMOID_GATE(name, T)                                                                               \
    KERNEL void name(const T* x, const T* gate, int64_t gate_outer, int64_t gate_inner, int64_t outer,             \
                     int64_t inner, int64_t size, T* y) {                                                          \
        sigmoid_gate(x, gate, gate_outer, gate_inner, outer, inner, size, y);                                      \
    }
EXPORT_SIGMOID_GATE(sigmoid_gate_f32, float)
EXPORT_SIGMOID_GATE(sigmoid_gate_bf16, bf16)

// ---- Mamba 1

// Numbers that all tokens share.
struct Scan {
    const float *a, *d, *dt_bias;  // d, dt_bias may be null
    int64_t channels, size;
};

// A token by itself, for V vectors of channels: states are written as soon as they are read. Those of a channel are
// often a multiple of a page apart, so that few of them stay in the nearest cache together.
template <int V, class T, class Part>
static INLINE void scan_token(const Scan& scan, const T* x, const T* dt, const T* b, const T* c, const float* from,
                              float* to, int64_t at, T* y, Part part) {
    vec step[V], scaled[V], total[V];
    for (int j = 0; j < V; j++) {
        const int64_t channel = at + j * LANES;
        vec input = load(x + channel, part);
        vec bias = scan.dt_bias ? load(scan.dt_bias + channel, part) : vec{};
        vec skip = scan.d ? load(scan.d + channel, part) : vec{};
        step[j] = softplus(load(dt + channel, part) + bias);
        scaled[j] = step[j] * input, total[j] = input * skip;
        step[j] *= LOG2_E;
    }
    for (int64_t n = 0; n < scan.size; n++) {
        const int64_t place = n * scan.channels + at;
        __builtin_prefetch(from + place + CHANNELS_AHEAD, 1, 2);
        for (int j = 0; j < V; j++) {
            vec decay = power_of_two(step[j] * load(scan.a + place + j * LANES, part));
            vec state = load(from + place + j * LANES, part) * decay + scaled[j] * to_float(b[n]);
            total[j] += state * to_float(c[n]);
            store(to + place + j * LANES, state, part);
        }
    }
    for (int j = 0; j < V; j++) store(y + at + j * LANES, total[j], part);
}

// SIZE: known when compiled, so that a channel's states stay in registers; 0: `given`.
template <class T, int SIZE>
static void selective_scan(const T* x, int64_t x_stride, const T* dt, int64_t dt_stride, const float* a, const T* b,
                           int64_t b_stride, const T* c, int64_t c_stride, const float* d, const float* dt_bias,
                           float* states, const Pieces& pieces, int64_t tokens, int64_t channels, int64_t given, T* y) {
    const int64_t size = SIZE ? SIZE : given;
    if (!pieces.bounds) {
        const Scan scan{a, d, dt_bias, channels, size};
        auto token = [&](int64_t t, int64_t at, auto part) INLINED {
            const float* from = states + pieces.load[t] * size * channels;
            float* to = states + pieces.store[t] * size * channels;
            constexpr int VECTORS = VECTORS_OF<decltype(part)>;
            scan_token<VECTORS>(scan, x + t * x_stride, dt + t * dt_stride, b + t * b_stride, c + t * c_stride, from,
                                to, at, y + t * channels, of_each(part));
        };
        return by_channels<LINE>(pieces, channels, tokens * channels * size, token);
    }
    by_channels(pieces, channels, tokens * channels * size, [&](int64_t piece, int64_t at, auto part) INLINED {
        const float* from = states + pieces.load[piece] * size * channels + at;
        float* to = states + pieces.store[piece] * size * channels + at;
        vec state[SIZE ? SIZE : MOST_STATES];
        for (int64_t n = 0; n < size; n++) state[n] = load(from + n * channels, part);
        vec skip = d ? load(d + at, part) : vec{}, bias = dt_bias ? load(dt_bias + at, part) : vec{};
        for (int64_t t = pieces.begin(piece); t < pieces.end(piece); t++) {
            vec input = load(x + t * x_stride + at, part);
            vec step = softplus(load(dt + t * dt_stride + at, part) + bias);
            vec scaled = step * input, total = input * skip;
            step *= LOG2_E;  // exponents of 2
            for (int64_t n = 0; n < size; n++) {
                vec decay = power_of_two(step * load(a + n * channels + at, part));
                state[n] = state[n] * decay + scaled * to_float(b[t * b_stride + n]);
                total += state[n] * to_float(c[t * c_stride + n]);
            }
            store(y + t * channels + at, total, part);
        }
        for (int64_t n = 0; n < size; n++) store(to + n * channels, state[n], part);
    });
}

#define EXPORT_SCAN(name, T)                                                                                        \
    KERNEL void name(const T* x, int64_t x_stride, const T* dt, int64_t dt_stride, const float* a, const T* b,      \
                     int64_t b_stride, const T* c, int64_t c_stride, const float* d, const float* dt_bias,          \
                     float* states, const int64_t* load, const int64_t* store, const int64_t* bounds,               \
                     int64_t pieces, int64_t tokens, int64_t channels, int64_t size, T* y) {                        \
        auto run = size == 16 ? selective_scan<T, 16> : selective_scan<T, 0>;                                       \
        run(x, x_stride, dt, dt_stride, a, b, b_stride, c, c_stride, d, dt_bias, states,                            \
            {load, store, bounds, pieces}, tokens, channels, size, y);                                              \
    }
EXPORT_SCAN(selective_scan_f32, float)
EXPORT_SCAN(selective_scan_bf16, bf16)

// ---- a linear recurrence

template <class T>
static void recurrence(const T* x, int64_t x_stride, const float* log_decay, float* states, const Pieces& pieces,
                       int64_t tokens, int64_t channels, T* y) {
    by_channels(pieces, channels, tokens * channels, [&](int64_t piece, int64_t c, auto part) INLINED {
        vec state = load(states + pieces.load[piece] * channels + c, part);
        for (int64_t t = pieces.begin(piece); t < pieces.end(piece); t++) {
            state = state * exp(load(log_decay + t * channels + c, part)) + load(x + t * x_stride + c, part);
            store(y + t * channels + c, state, part);
        }
        store(states + pieces.store[piece] * channels + c, state, part);
    });
}

#define EXPORT_RECURRENCE(name, T)                                                                                    \
    KERNEL void name(const T* x, int64_t x_stride, const float* log_decay, float* states, const int64_t* load,        \
                     const int64_t* store, const int64_t* bounds, int64_t pieces, int64_t tokens, int64_t channels,   \
                     T* y) {                                                                                          \
        recurrence(x, x_stride, log_decay, states, {load, store, bounds, pieces}, tokens, channels, y);               \
    }
EXPORT_RECURRENCE(linear_recurrence_f32, float)
EXPORT_RECURRENCE(linear_recurrence_bf16, bf16)

// ---- norms with a gate

enum Place { AFTER, BEFORE };

// Rows of x and of the gate have two levels of strides; y is contiguous. `groups` are side by side in a row.
template <class T, Place GATE>
static void gated_norm(const T* x, int64_t x_outer, int64_t x_inner, const T* gate, int64_t gate_outer,
                       int64_t gate_inner, const T* weight, T* y, int64_t outer, int64_t inner, int64_t groups,
                       int64_t size, float eps, bool silus) {
    auto factor = [&](const T* p, auto part) {
        vec value = load(p, part);
        return silus ? silu(value) : sigmoid(value);
    };
    auto row = [&](int64_t o) {
        for (int64_t at = 0; at < inner * groups; at++) {
            const int64_t i = at / groups, first = at % groups * size;
            const T* from = x + o * x_outer + i * x_inner + first;
            const T* gates = gate + o * gate_outer + i * gate_inner + first;
            T* to = y + (o * inner * groups + at) * size;
            vec squares{};
            by_vectors(size, [&](int64_t j, auto part) {
                vec value = load(from + j, part);
                if (GATE == BEFORE) value = value * factor(gates + j, part);
                squares += value * value;
            });
            const float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
            by_vectors(size, [&](int64_t j, auto part) {
                vec value = load(from + j, part) * factor(gates + j, part);
                store(to + j, value * scale * load(weight + first + j, part), part);
            });
        }
    };
    by_rows(outer, outer * inner * groups * size, row);
}

#define EXPORT_GATED_NORM(name, T)                                                                                   \
    KERNEL void name(const T* x, int64_t x_outer, int64_t x_inner, const T* gate, int64_t gate_outer,                \
                     int64_t gate_inner, const T* weight, T* y, int64_t outer, int64_t inner, int64_t groups,        \
                     int64_t size, float eps, bool gates_first, bool silus) {                                        \
        auto run = gates_first ? gated_norm<T, BEFORE> : gated_norm<T, AFTER>;                                       \
        run(x, x_outer, x_inner, gate, gate_outer, gate_inner, weight, y, outer, inner, groups, size, eps, silus);   \
    }
EXPORT_GATED_NORM(gated_rms_norm_f32, float)
EXPORT_GATED_NORM(gated_rms_norm_bf16, bf16)

REPLAYED(causal_conv1d_f32)
REPLAYED(causal_conv1d_bf16)
REPLAYED(delta_gates_f32)
REPLAYED(delta_gates_bf16)
REPLAYED(sigmoid_gate_f32)
REPLAYED(sigmoid_gate_bf16)
REPLAYED(selective_scan_f32)
REPLAYED(selective_scan_bf16)
REPLAYED(linear_recurrence_f32)
REPLAYED(linear_recurrence_bf16)
REPLAYED(gated_rms_norm_f32)
REPLAYED(gated_rms_norm_bf16)
