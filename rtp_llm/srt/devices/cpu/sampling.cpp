// From logits to tokens: the largest logit, and draws with temperature, top_k, top_p and min_p, without a sort of the
// vocabulary. A draw equals that of worker/sampler.py in all steps: float64 weights, a random number for each token,
// and the same choice among equal ones.
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "sampling_numbers.h"
#include "sampling_weights.h"

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int CHUNK = 4 * LANES;  // floats that are compared at a time

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
    int64_t index;  // of the first largest
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

// Sets to -inf what the bits of each line's words do not allow. words: [rows, num_words].
KERNEL void mask_tokens(float* logits, int64_t stride, int64_t size, const int64_t* lines, const int32_t* words,
                        int64_t num_words, int64_t rows) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        float* x = logits + lines[row] * stride;
        const int32_t* bits = words + row * num_words;
        for (int64_t start = 0; start < size; start += 32) {
            uint32_t word = (uint32_t)bits[start / 32];
            int64_t end = std::min<int64_t>(32, size - start);
            if (word == 0xffffffffu) continue;
            for (int64_t i = 0; i < end; i++) {
                if (!(word >> i & 1)) x[start + i] = -INF;
            }
        }
    }
}

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

// The candidates for the k largest, and a bound that rises while they are gathered.
struct Selection {
    std::vector<float> candidates;
    float bound;

    // The k-th largest of x, -inf if fewer are larger; candidates[0 .. k) are then the k largest, in any order.
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

// Sorts floats without NaN in descending order: a radix sort by digits of 11 bits, linear in their number.
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
        bits ^= bits >> 31 ? 0 : 0x7fffffff;  // ascending bits for descending values
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

constexpr int64_t PIECE = 512;  // weights that are computed at a time

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

// A token can win only if its weight times the best quotient so far is at least its number, which is at least 2^(floor
// of log2 of its upper word - 32). That compares logits with exponents of floats, so few weights are computed.
static int64_t draw_of_all(const float* x, int64_t n, const Largest& most, const Scale& scale, const Row& row) {
    constexpr float SLACK = 0.05f;  // for rounding errors of float32
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

// Returns bound, or -inf if another logit below it has the same weight: ties are decided by weights.
static float clear_bound(float bound, const Scale& scale) {
    if (bound == -INF) return bound;
    return scale.weight(std::nextafter(bound, -INF)) < scale.weight(bound) ? bound : -INF;
}

// Returns a logit such that the tokens with at least this logit have more than `mass`.
static float bound_of_mass(const float* x, int64_t n, const Scale& scale, double mass, Scratch& scratch) {
    double most = INF;  // average weight of the k largest tokens: the next ones are not larger
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

// Keeps the fewest gathered tokens that reach top_p of total (of equal ones the first), at least one.
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
    int64_t group = -1;  // whose words are computed
    const bool dense = scratch.ids.size() > 256;  // then a group has many ids, and its words are computed together
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

// tokens[i]: drawn from line lines[i] (null: line i) of logits, with rows[i]'s parameters.
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
