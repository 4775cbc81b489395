// From logits to tokens: the largest, and draws of a temperature, top_k, top_p and min_p, without a sort of the
// vocabulary. A draw is that of worker/sampler.py, step by step: float64 weights, numbers
// of each token's own, and where any are equal the same one of them.
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "common.h"

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int CHUNK = 4 * LANES;  // floats that are looked at together

// ---- the largest of a row

constexpr int64_t BLOCK = 4096;  // stays in the first cache while its largest is looked for

static INLINE bool any(ivec mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask);
#else
    return mask[0] | mask[1] | mask[2] | mask[3];
#endif
}

struct Largest {
    float value;
    int64_t index;  // the first one's
    bool has_nan;
};

static Largest find_largest(const float* x, int64_t n) {
    Largest best{-INF, 0, false};
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t end = std::min(start + BLOCK, n), i = start;
        vec most[4] = {splat(-INF), splat(-INF), splat(-INF), splat(-INF)};
        ivec nan{};
        for (; i + CHUNK <= end; i += CHUNK) {
            for (int j = 0; j < 4; j++) {
                vec y = load(x + i + j * LANES);
                most[j] = y > most[j] ? y : most[j];
                nan |= (ivec)(y != y);
            }
        }
        float value = largest(max(max(most[0], most[1]), max(most[2], most[3])));
        best.has_nan |= any(nan);
        for (; i < end; i++) {
            value = x[i] > value ? x[i] : value;
            best.has_nan |= x[i] != x[i];
        }
        if (value > best.value) {
            best.value = value;
            best.index = start;
            while (x[best.index] != value) best.index++;
        }
    }
    return best;
}

static INLINE bool is_bad(const Largest& best) { return best.has_nan || !(std::fabs(best.value) < INF); }

KERNEL void argmax(const float* logits, int64_t rows, int64_t stride, int64_t size, int64_t* tokens, uint8_t* bad) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        Largest best = find_largest(logits + row * stride, size);
        tokens[row] = best.index;
        bad[row] = is_bad(best);
    }
}

// ---- weights: exp((logit - largest) / temperature) in float64

constexpr int DLANES = LANES / 2;
typedef double dvec __attribute__((vector_size(DLANES * 8)));
typedef double dvec_unaligned __attribute__((vector_size(DLANES * 8), aligned(8)));
typedef int64_t lvec __attribute__((vector_size(DLANES * 8)));
typedef float fvec __attribute__((vector_size(DLANES * 4)));
typedef float fvec_unaligned __attribute__((vector_size(DLANES * 4), aligned(4)));

// 2^n, for n in [-1022, 1023], given n + magic.
constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: added to a small number, it leaves its integer in the bits
static INLINE dvec power_of_two(dvec n_and_magic) {
    return (dvec)(((lvec)n_and_magic - (lvec)(dvec{} + MAGIC) + 1023) << 52);
}

// e^x for x <= 0, to about one unit in the last place; 0 and subnormal numbers where they belong. Not for NaN.
static INLINE dvec exp(dvec x) {
    x = x > -746.0 ? x : dvec{} - 746.0;
    dvec n_and_magic = x * 1.4426950408889634074 + MAGIC;
    dvec n = n_and_magic - MAGIC;
    dvec r = x - n * 6.93145751953125e-1;
    r -= n * 1.42860682030941723212e-6;
    dvec p = dvec{} + 1.0 / 6227020800.0;  // of the series, until it ends in float64
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
    dvec half = n * 0.5 + MAGIC;  // the power in two steps, since a subnormal number's is none
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

// ---- selection

// f(i) for every i with x[i] >= bound, in order.
template <class F>
static INLINE void for_each_from(const float* x, int64_t n, float bound, F f) {
    int64_t i = 0;
    for (; i + CHUNK <= n; i += CHUNK) {
        vec most = max(max(load(x + i), load(x + i + LANES)), max(load(x + i + 2 * LANES), load(x + i + 3 * LANES)));
        if (!any((ivec)(most >= bound))) continue;
        for (int64_t j = i; j < i + CHUNK; j++) {
            if (x[j] >= bound) f(j);
        }
    }
    for (; i < n; i++) {
        if (x[i] >= bound) f(i);
    }
}

// What is larger than any candidate so far: grows while candidates are gathered.
struct Selection {
    std::vector<float> candidates;
    float bound;

    // The k-th largest of x, -inf if only so many are larger; candidates[0 .. k) are then the k largest, in any order.
    float kth_largest(const float* x, int64_t n, int64_t k) {
        size_t limit = 2 * k + 1024;
        candidates.clear();
        candidates.reserve(limit + CHUNK);
        bound = -INF;
        int64_t i = 0;
        for (; i + CHUNK <= n; i += CHUNK) {
            vec most = max(max(load(x + i), load(x + i + LANES)), max(load(x + i + 2 * LANES), load(x + i + 3 * LANES)));
            if (!any((ivec)(most > bound))) continue;
            for (int64_t j = i; j < i + CHUNK; j++) {
                if (x[j] > bound) candidates.push_back(x[j]);
            }
            if (candidates.size() >= limit) cut(k);
        }
        for (; i < n; i++) {
            if (x[i] > bound) candidates.push_back(x[i]);
        }
        if (int64_t(candidates.size()) >= k) cut(k);
        else bound = -INF;
        return bound;
    }

    void cut(int64_t k) {
        std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), std::greater<float>());
        bound = candidates[k - 1];
        candidates.resize(k);
    }
};

// Sorts floats, none of them NaN, largest first. By digits of 11 bits from the last: linear in their number.
static void sort_descending(std::vector<float>& values, std::vector<float>& other) {
    constexpr int DIGIT = 11, BINS = 1 << DIGIT;
    size_t n = values.size();
    if (n < 512) {
        std::sort(values.begin(), values.end(), std::greater<float>());
        return;
    }
    auto digit = [](float value, int pass) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits ^= bits >> 31 ? 0 : 0x7fffffff;  // ascending where the values descend
        return bits >> (pass * DIGIT) & (BINS - 1);
    };
    other.resize(n);
    for (int pass = 0; pass < 3; pass++) {
        uint32_t starts[BINS] = {};
        for (float value : values) starts[digit(value, pass)]++;
        uint32_t total = 0;
        for (uint32_t& start : starts) {
            uint32_t count = start;
            start = total;
            total += count;
        }
        for (float value : values) other[starts[digit(value, pass)]++] = value;
        values.swap(other);
    }
}

// ---- random numbers: Philox4x32-10 (Salmon et al., 2011), as in worker/philox.py

typedef uint64_t uvec __attribute__((vector_size(DLANES * 8)));
typedef uint32_t uvec32 __attribute__((vector_size(LANES * 4)));
typedef uint32_t wvec __attribute__((vector_size(DLANES * 4)));
typedef uint32_t wvec_unaligned __attribute__((vector_size(DLANES * 4), aligned(4)));

constexpr uint64_t WORD = 0xFFFFFFFF;

// Products of the lower halves of each lane.
static INLINE uvec multiply(uvec a, uint64_t b) {
#if defined(__AVX512F__)
    return (uvec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (uvec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (a & WORD) * b;
#endif
}

static INLINE uint64_t multiply(uint64_t a, uint64_t b) { return (a & WORD) * b; }

// The words of a counter, in the lower halves of c0 .. c3; the upper halves mean nothing. T: one counter, or a vector.
template <class T>
static INLINE void philox(T& c0, T& c1, T& c2, T& c3, uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        T low = multiply(c0, 0xD2511F53), high = multiply(c2, 0xCD9E8D57);
        c0 = (high >> 32) ^ c1 ^ uint64_t(k0);
        c1 = high;
        c2 = (low >> 32) ^ c3 ^ uint64_t(k1);
        c3 = low;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

// The exponentially distributed numbers of a row's tokens.
struct Noise {
    static constexpr int GROUP = 64;  // tokens that have 16 counters of four words in common
    uint64_t seed, position;

    // The upper halves of the uniform numbers of GROUP tokens from `start` on, a multiple of GROUP.
    INLINE void upper_words(int64_t start, uint32_t* words) const {
        for (int part = 0; part < 16; part += DLANES) {
            uvec c0 = uvec{} + (position & WORD), c1 = uvec{} + (position >> 32), c2, c3{};
            for (int lane = 0; lane < DLANES; lane++) c2[lane] = start / 4 + part + lane;
            philox(c0, c1, c2, c3, seed);
            const uvec all[4] = {c0, c1, c2, c3};
            for (int word = 0; word < 4; word++) {
                *reinterpret_cast<wvec_unaligned*>(words + 16 * word + part) =
                    __builtin_convertvector(all[word] & WORD, wvec);
            }
        }
    }

    NOINLINE uint32_t word(int64_t token, uint64_t stream) const {
        uint64_t c0 = position & WORD, c1 = position >> 32, c2 = token / 64 * 16 + token % 16, c3 = stream;
        philox(c0, c1, c2, c3, seed);
        const uint64_t all[4] = {c0, c1, c2, c3};
        return uint32_t(all[token / 16 % 4]);
    }

    double number(int64_t token, uint32_t upper) const {
        double u = upper * 0x1p-32 + (word(token, 1) + 0.5) * 0x1p-64;
        return -std::log1p(-u);
    }
};

// The token whose number divided by its weight is smallest, of equal ones the first.
struct Race {
    const Noise& noise;
    double best = std::numeric_limits<double>::infinity();
    int64_t winner = -1;

    void enter(int64_t token, double weight, uint32_t upper) {
        if (upper * 0x1p-32 > weight * best) return;  // the number is larger still
        double time = noise.number(token, upper) / weight;
        if (time < best || (time == best && token < winner)) {
            best = time;
            winner = token;
        }
    }
};

KERNEL void exponential(int64_t seed, int64_t position, int64_t size, double* numbers) {
    Noise noise{uint64_t(seed), uint64_t(position)};
    uint32_t words[Noise::GROUP];
    for (int64_t i = 0; i < size; i++) {
        if (i % Noise::GROUP == 0) noise.upper_words(i, words);
        numbers[i] = noise.number(i, words[i % Noise::GROUP]);
    }
}

// ---- draws

struct Row {
    double temperature, top_p, min_p;
    Noise noise;
    int64_t top_k;  // 0: all
};

// A thread's memory.
struct Scratch {
    Selection selection;
    std::vector<int64_t> ids;  // of the tokens that may be drawn, in order,
    std::vector<float> logits;  // with their logits
    std::vector<double> weights;  // and weights
    std::vector<float> sorted, other;
    std::vector<double> largest, before, sums;
};

constexpr int64_t PIECE = 512;  // weights that are computed at once

// sums[i]: of all weights up to the end of piece i, without those below min_p.
static void add_up(const float* x, int64_t n, const Scale& scale, double min_p, std::vector<double>& sums) {
    double total = 0, w[PIECE];
    sums.clear();
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t count = std::min(PIECE, n - start);
        scale.weights(x + start, count, w);
        for (int64_t j = 0; j < count; j++) total += w[j] < min_p ? 0.0 : w[j];
        sums.push_back(total);
    }
}

static void enter(Race& race, float logit, int64_t token, uint32_t upper, const Scale& scale, const Row& row) {
    double weight = scale.weight(logit);
    if (weight > 0 && weight >= row.min_p) race.enter(token, weight, upper);
}

// A token can win only if its weight times the best time so far is at least its number, which is at least 2^(floor of
// log2 of its upper word - 32): that compares logits with exponents of floats, so few weights are computed.
static int64_t draw_of_all(const float* x, int64_t n, const Largest& most, const Scale& scale, const Row& row) {
    constexpr float SLACK = 0.05f;  // for what float32 rounds
    Race race{row.noise};
    race.enter(most.index, 1.0, row.noise.word(most.index, 0));
    const float factor = float(std::min(1.4426950408889634 / row.temperature, 1e30)), largest = most.value;
    uint32_t words[Noise::GROUP];
    for (int64_t start = 0; start < n; start += Noise::GROUP) {
        row.noise.upper_words(start, words);
        int64_t count = std::min<int64_t>(Noise::GROUP, n - start), j = 0;
        float bound = float(-std::log2(std::max(race.best, 1e-300))) - 32.0f - SLACK;
        for (; j + LANES <= count; j += LANES) {
            vec weight = (load(x + start + j) - largest) * factor;  // log2 of it
            ivec upper = *reinterpret_cast<const ivec*>(words + j);
            // The exponent of the word without its last bit, which makes it positive; of 0 it is far below all.
            vec half = __builtin_convertvector((ivec)((uvec32)upper >> 1), vec);
            vec exponent = __builtin_convertvector(((ivec)half >> 23) - 126, vec);
            if (!any((ivec)(weight >= exponent + bound))) continue;
            for (int64_t i = j; i < j + LANES; i++) enter(race, x[start + i], start + i, words[i], scale, row);
            bound = float(-std::log2(std::max(race.best, 1e-300))) - 32.0f - SLACK;
        }
        for (; j < count; j++) enter(race, x[start + j], start + j, words[j], scale, row);
    }
    return race.winner;
}

// bound, or -inf where another logit below it has the same weight: what is equal is decided by weights.
static float clear_bound(float bound, const Scale& scale) {
    if (bound == -INF) return bound;
    return scale.weight(std::nextafter(bound, -INF)) < scale.weight(bound) ? bound : -INF;
}

// A logit such that the tokens from it on have more than `mass`.
static float bound_of_mass(const float* x, int64_t n, const Scale& scale, double mass, Scratch& scratch) {
    double most = INF;  // that k tokens can have, as no token has more than the last ones looked at had on average
    for (int64_t k : {64, 1024, 16384}) {
        if (k >= n || k * most < mass) break;
        float bound = scratch.selection.kth_largest(x, n, k);
        if (bound == -INF) break;
        scratch.largest.resize(k);
        scale.weights(scratch.selection.candidates.data(), k, scratch.largest.data());
        double sum = 0;
        for (double w : scratch.largest) sum += w;
        if (sum > mass * (1 + 1e-9)) return bound;
        most = sum / k;
    }
    return -INF;
}

static void gather(const float* x, int64_t n, float bound, const Scale& scale, Scratch& scratch) {
    scratch.ids.clear();
    scratch.logits.clear();
    for_each_from(x, n, bound, [&](int64_t i) {
        scratch.ids.push_back(i);
        scratch.logits.push_back(x[i]);
    });
    scratch.weights.resize(scratch.ids.size());
    scale.weights(scratch.logits.data(), scratch.logits.size(), scratch.weights.data());
}

// Keeps the fewest gathered tokens that reach top_p of total, of equal ones the first; at least one.
static void cut_by_top_p(const Scale& scale, const Row& row, double total, Scratch& scratch) {
    std::vector<double>&largest = scratch.largest, &before = scratch.before, &weights = scratch.weights;
    scratch.sorted = scratch.logits;
    sort_descending(scratch.sorted, scratch.other);
    size_t n = scratch.sorted.size(), num_kept = 0, num_above = 0;
    if (row.top_k) n = std::min<size_t>(n, row.top_k);
    largest.resize(n);
    before.resize(n);
    scale.weights(scratch.sorted.data(), n, largest.data());
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += largest[i];
        before[i] = (sum - largest[i]) / total;
        num_kept += before[i] < row.top_p && largest[i] > 0;
    }
    double cutoff = largest[std::max<size_t>(num_kept, 1) - 1];
    while (largest[num_above] > cutoff) num_above++;
    double num_equal = std::max(std::ceil((row.top_p - before[num_above]) * total / cutoff), 1.0), seen = 0;
    for (double& w : weights) {
        if (w < cutoff || (w == cutoff && ++seen > num_equal)) w = 0;
    }
}

static int64_t draw_of_gathered(const Row& row, const Scratch& scratch) {
    Race race{row.noise};
    uint32_t words[Noise::GROUP];
    int64_t group = -1;  // whose words are there
    const bool dense = scratch.ids.size() > 256;  // many of a group then, so that its words are made together
    for (size_t i = 0; i < scratch.weights.size(); i++) {
        double weight = scratch.weights[i];
        if (weight <= 0 || weight < row.min_p) continue;
        int64_t token = scratch.ids[i];
        if (!dense) {
            race.enter(token, weight, row.noise.word(token, 0));
            continue;
        }
        if (token / Noise::GROUP != group) {
            group = token / Noise::GROUP;
            row.noise.upper_words(group * Noise::GROUP, words);
        }
        race.enter(token, weight, words[token % Noise::GROUP]);
    }
    return race.winner;
}

static int64_t draw_row(const float* x, int64_t n, const Row& row, Scratch& scratch) {
    Largest best = find_largest(x, n);
    if (is_bad(best)) return 0;
    Scale scale{best.value, row.temperature};
    std::vector<double>& weights = scratch.weights;
    double total = 0;
    if (row.top_k) {
        float kth = scratch.selection.kth_largest(x, n, row.top_k), bound = clear_bound(kth, scale);
        gather(x, n, bound, scale, scratch);
        if (bound != kth) {
            double least = scale.weight(kth);
            for (double& w : weights) w = w < least ? 0.0 : w;
        }
        if (row.top_p < 1) {
            for (double w : weights) total += w;
            cut_by_top_p(scale, row, total, scratch);
        }
    } else if (row.top_p < 1) {
        add_up(x, n, scale, 0, scratch.sums);
        total = scratch.sums.back();
        float bound = bound_of_mass(x, n, scale, row.top_p * total, scratch);
        gather(x, n, clear_bound(bound, scale), scale, scratch);
        cut_by_top_p(scale, row, total, scratch);
    } else {
        return draw_of_all(x, n, best, scale, row);
    }
    return draw_of_gathered(row, scratch);
}

// tokens[i]: drawn from line lines[i] (null: i) of logits with rows[i]'s parameters.
KERNEL void draw(const float* logits, const int64_t* lines, int64_t count, int64_t stride, int64_t size,
                 const double* temperature, const int64_t* top_k, const double* top_p, const double* min_p,
                 const int64_t* seeds, const int64_t* positions, int64_t* tokens) {
#pragma omp parallel if (count > 1)
    {
        Scratch scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            Row row{temperature[i], top_p[i], min_p[i], {uint64_t(seeds[i]), uint64_t(positions[i])}, 0 < top_k[i] && top_k[i] < size ? top_k[i] : 0};
            tokens[i] = draw_row(logits + (lines ? lines[i] : i) * stride, size, row, scratch);
        }
    }
}
