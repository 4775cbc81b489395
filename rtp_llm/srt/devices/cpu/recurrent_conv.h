// Convolutions of a sequence's last inputs.
#pragma once

#include "recurrent_vectors.h"

// y[t] = act(bias + the sum of weight[i] * x[t - (taps - 1) + i]); inputs before the piece are the state's, [taps - 1,
// channels], oldest first. With gates, inputs are x times the gate before, and y is multiplied by the gate after.
template <class T>
struct Conv {
    const T *x, *before, *after;  // gates: both null or none
    int64_t x_stride, before_stride, after_stride;
    const T *weight, *bias;  // bias: may be null
    T* states;
    int64_t channels, taps;
    bool silus;
    T* y;

    template <bool GATES, class Part>
    INLINE vec input(int64_t token, int64_t c, Part part) const {
        vec value = load(x + token * x_stride + c, part);
        return GATES ? rounded<T>(value * load(before + token * before_stride + c, part)) : value;
    }

    template <bool GATES, class Part>
    INLINE void output(int64_t token, int64_t c, vec total, Part part) const {
        if (silus) total /= power_of_two(total * -LOG2_E) + 1.0f;
        if (GATES) total = rounded<T>(total) * load(after + token * after_stride + c, part);
        store(y + token * channels + c, total, part);
    }
};

// TAPS: known when compiled, so that all of them stay in registers; 0: conv.taps.
template <class T, int TAPS, bool GATES>
static void causal_conv(const Conv<T>& conv, const Pieces& pieces, int64_t tokens) {
    const int64_t channels = conv.channels, taps = TAPS ? TAPS : conv.taps, kept = taps - 1;
    by_channels(pieces, channels, tokens * channels * taps, [&](int64_t piece, int64_t c, auto part) INLINED {
        const int64_t begin = pieces.begin(piece), length = pieces.end(piece) - begin;
        const T* before = conv.states + pieces.load[piece] * kept * channels + c;
        T* after = conv.states + pieces.store[piece] * kept * channels + c;
        vec factors[TAPS ? TAPS : MOST_TAPS], seen[TAPS ? TAPS : MOST_TAPS];
        for (int64_t i = 0; i < taps; i++) factors[i] = load(conv.weight + i * channels + c, part);
        for (int64_t i = 0; i < kept; i++) seen[i] = load(before + i * channels, part);
        vec start = conv.bias ? load(conv.bias + c, part) : vec{};
        for (int64_t t = begin; t < begin + length; t++) {
            seen[kept] = conv.template input<GATES>(t, c, part);
            vec total = start;
            for (int64_t i = 0; i < taps; i++) total += factors[i] * seen[i];
            conv.template output<GATES>(t, c, total, part);
            for (int64_t i = 0; i < kept; i++) seen[i] = seen[i + 1];
        }
        if (GATES) {
            for (int64_t i = 0; i < kept; i++) store(after + i * channels, seen[i], part);
            return;
        }
        // The last inputs as they are: those before this piece, oldest first, and then its own.
        const int64_t count = channels_of(part), old = std::max<int64_t>(kept - length, 0);
        for (int64_t i = 0; i < old; i++) copy(before + (i + length) * channels, count, after + i * channels);
        const T* last = conv.x + (begin + length - kept) * conv.x_stride + c;
        for (int64_t i = old; i < kept; i++) copy(last + i * conv.x_stride, count, after + i * channels);
    });
}

// A token in each piece: factors of some channels are made once for all of them.
template <class T, int TAPS, bool GATES>
static void causal_conv_of_tokens(const Conv<T>& conv, const Pieces& pieces) {
    constexpr int64_t kept = TAPS - 1;
    const int64_t channels = conv.channels, strips = (channels + CONV_CHANNELS - 1) / CONV_CHANNELS;
    const bool is_small = pieces.count * channels * TAPS < WORTH_THREADS;
#pragma omp parallel for schedule(static) if (!is_small)
    for (int64_t strip = 0; strip < strips; strip++) {
        alignas(64) float factors[TAPS + 1][CONV_CHANNELS];
        const int64_t first = strip * CONV_CHANNELS, size = std::min(CONV_CHANNELS, channels - first);
        by_vectors(size, [&](int64_t c, auto part) {
            for (int i = 0; i < TAPS; i++)
                store(factors[i] + c, load(conv.weight + i * channels + first + c, part), part);
            store(factors[TAPS] + c, conv.bias ? load(conv.bias + first + c, part) : vec{}, part);
        });
        for (int64_t t = 0; t < pieces.count; t++) {
            const T* before = conv.states + pieces.load[t] * kept * channels + first;
            T* after = conv.states + pieces.store[t] * kept * channels + first;
            const T* next = conv.states + pieces.load[std::min(t + 1, pieces.count - 1)] * kept * channels + first;
            by_vectors(size, [&](int64_t c, auto part) INLINED {
                vec seen[TAPS], total = load(factors[TAPS] + c, part);
                for (int64_t i = 0; i < kept; i++) {
                    seen[i] = load(before + i * channels + c, part);
                    __builtin_prefetch(next + i * channels + c, 1, 2);
                }
                seen[kept] = conv.template input<GATES>(t, first + c, part);
                for (int i = 0; i < TAPS; i++) total += load(factors[i] + c, part) * seen[i];
                const int64_t count = channels_of(part);
                for (int64_t i = 0; i + 1 < kept; i++)
                    copy(before + (i + 1) * channels + c, count, after + i * channels + c);
                T* last = after + (kept - 1) * channels + c;
                if (GATES) store(last, seen[kept], part);
                else copy(conv.x + t * conv.x_stride + first + c, count, last);
                conv.template output<GATES>(t, first + c, total, part);
            });
        }
    }
}

// Models have 3 taps between gates (LFM2), else 4.
template <class T, int TAPS, bool GATES>
static void convolve(const Conv<T>& conv, const Pieces& pieces, int64_t tokens) {
    if (conv.taps != TAPS) causal_conv<T, 0, GATES>(conv, pieces, tokens);
    else if (pieces.bounds) causal_conv<T, TAPS, GATES>(conv, pieces, tokens);
    else causal_conv_of_tokens<T, TAPS, GATES>(conv, pieces);
}
