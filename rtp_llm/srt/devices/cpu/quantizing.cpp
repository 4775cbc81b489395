// Weights in 8 and 4 bits, made while a checkpoint is loaded: one pass over a weight [rows, size], a few rows at a time
// on each thread.
#include <algorithm>

#include "common.h"

namespace {

typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef double doubles __attribute__((vector_size(LANES * 8)));

constexpr float ROUNDING = 12582912;     // 1.5 * 2^23: a float of up to 2^22 that is added to it is rounded half to even
constexpr int64_t WORTH_THREADS = 32768;  // elements

INLINE vec round_to_even(vec x) { return x + ROUNDING - ROUNDING; }

// x * y, rounded: the compiler may not make one operation of it and the addition that follows.
INLINE vec product(vec x, vec y) {
    vec result = x * y;
#if defined(__x86_64__)
#if defined(__AVX512F__)
    asm("" : "+v"(result));
#else
    asm("" : "+x"(result));
#endif
#elif defined(__aarch64__)
    asm("" : "+w"(result));
#endif
    return result;
}

INLINE float total_of(doubles x) {
    double total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return float(total);
}

INLINE bool is_finite(float x) { return x - x == 0; }

// ---- 8 bits, as reference.quantize_rows

// One row of n elements to bytes; returns its scale. A row with a NaN becomes zeros and the scale NaN.
template <class T>
float quantize_row(const T* x, int8_t* values, int64_t n) {
    vec most{}, difference{};
    auto look = [&](vec value) {
        most = max(most, max(value, -value));
        difference += value - value;  // NaN for an infinity, too
    };
    int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) look(load(x + i));
    if (whole < n) look(load_part(x + whole, int(n - whole)));
    bool is_nan = false;
    if (!(sum(difference) == 0))
        for (int64_t i = 0; i < n; i++) is_nan |= std::isnan(to_float(x[i]));
    float scale = is_nan ? NAN : largest(most) / 127, divisor = scale == 0 ? 1 : scale;
    if (!is_finite(scale)) {
        std::memset(values, 0, n);
        return scale;
    }
    auto quantized = [&](vec value) {
        return __builtin_convertvector((ivec)(value / divisor + ROUNDING) - (ivec)splat(ROUNDING), bytes);
    };
    for (int64_t i = 0; i < whole; i += LANES) {
        bytes result = quantized(load(x + i));
        std::memcpy(values + i, &result, LANES);
    }
    if (whole < n) {
        bytes result = quantized(load_part(x + whole, int(n - whole)));
        std::memcpy(values + whole, &result, n - whole);
    }
    return scale;
}

// ---- 4 bits in groups, as best_grid and to_levels of layers/quantization/int4.py

constexpr float NARROWED[] = {15.0 / 1.0, 15.0 / 0.94, 15.0 / 0.88, 15.0 / 0.82};
constexpr int SYMMETRIC_FROM = 32;

struct Grid {
    float scale, zero;
};

// SIZE weights, filled up with zeros to whole vectors.
template <int SIZE>
struct Group {
    static constexpr int VECTORS = SIZE < LANES ? 1 : SIZE / LANES;
    vec weights[VECTORS];

    template <class T>
    INLINE Group(const T* x, int count) {
        for (int v = 0; v < VECTORS; v++) {
            int left = std::min(count - v * LANES, LANES);
            weights[v] = left == LANES ? load(x + v * LANES) : load_part(x + v * LANES, std::max(left, 0));
        }
    }

    INLINE Grid best_grid() const {
        vec low{}, high{};
        for (vec w : weights) low = min(low, w), high = max(high, w);
        float least = -largest(-low), most = largest(high), width, zero = 8;
        if (SIZE >= SYMMETRIC_FROM) {
            width = (most > -least ? -most : -least) * 1.875f;
            width = width == 0 ? 1e-30f : width;
        } else {
            width = std::max(most - least, 1e-30f);
            zero = std::nearbyint(-15 * least / width);
        }
        float best = -1, scale = 0;
        for (float narrowed : NARROWED) {
            doubles products{};  // so that the order of additions does not matter
            vec squares{};
            vec factor = splat(1 / width * narrowed);
            for (vec w : weights) {
                vec level = min(max(round_to_even(product(w, factor)), splat(-zero)), splat(15 - zero));
                products += __builtin_convertvector(product(w, level), doubles);
                squares += level * level;
            }
            float total = total_of(products), square = std::max(sum(squares), 1.0f);
            float explained = total * total / square;
            if (!is_finite(explained)) return {NAN, is_finite(zero) ? zero : 0};
            if (explained > best) best = explained, scale = total / square;
        }
        return {to_float(from_float<bf16>(scale)), zero};
    }

    // The levels 0 to 15, two in a byte.
    INLINE void write(Grid grid, uint8_t* values, int count) const {
        alignas(64) int32_t levels[VECTORS * LANES];
        vec step = splat(grid.scale == 0 ? 1 : grid.scale);
        for (int v = 0; v < VECTORS; v++) {
            vec level = min(max(round_to_even(weights[v] / step + grid.zero), vec{}), splat(15));
            ivec whole = (ivec)(level == level) & __builtin_convertvector(level, ivec);
            std::memcpy(levels + v * LANES, &whole, sizeof whole);
        }
        for (int i = 0; i < count / 2; i++) values[i] = uint8_t(levels[2 * i] | levels[2 * i + 1] << 4);
    }
};

template <int SIZE, class T>
void quantize_groups(const T* x, int64_t n, uint8_t* values, float* scales, uint8_t* zeros) {
    for (int64_t start = 0; start < n; start += SIZE) {
        int count = int(std::min<int64_t>(SIZE, n - start));
        Group<SIZE> group(x + start, count);
        Grid grid = group.best_grid();
        group.write(grid, values + start / 2, count);
        *scales++ = grid.scale;
        *zeros++ = uint8_t(grid.zero);
    }
}

template <class T>
void quantize_int8(const T* x, int64_t stride, int64_t rows, int64_t size, int8_t* values, float* scales) {
#pragma omp parallel for schedule(static) if (rows * size > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++)
        scales[row] = quantize_row(x + row * stride, values + row * size, size);
}

template <int SIZE, class T>
void quantize_int4(const T* x, int64_t stride, int64_t rows, int64_t size, uint8_t* values, float* scales,
                   uint8_t* zeros) {
    int64_t groups = (size + SIZE - 1) / SIZE;
#pragma omp parallel for schedule(static) if (rows * size > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++)
        quantize_groups<SIZE>(x + row * stride, size, values + row * (size / 2), scales + row * groups,
                              zeros + row * groups);
}

}  // namespace

#define EXPORT(suffix, T)                                                                                             \
    KERNEL void quantize_int8_##suffix(const T* x, int64_t stride, int64_t rows, int64_t size, int8_t* values,        \
                                       float* scales) {                                                               \
        quantize_int8(x, stride, rows, size, values, scales);                                                         \
    }                                                                                                                 \
    /* Returns whether there are kernels for groups of this size. */                                                  \
    KERNEL int quantize_int4_##suffix(const T* x, int64_t stride, int64_t rows, int64_t size, int64_t group,          \
                                      uint8_t* values, float* scales, uint8_t* zeros) {                               \
        if (group == 32) return quantize_int4<32>(x, stride, rows, size, values, scales, zeros), 1;                   \
        if (group == 16) return quantize_int4<16>(x, stride, rows, size, values, scales, zeros), 1;                   \
        if (group == 8) return quantize_int4<8>(x, stride, rows, size, values, scales, zeros), 1;                     \
        return 0;                                                                                                     \
    }
EXPORT(f32, float)
EXPORT(bf16, bf16)
