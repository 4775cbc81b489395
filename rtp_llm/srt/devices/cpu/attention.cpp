// Attention over a paged cache, and the writing of that cache.
//
// Softmax is computed as keys come (Milakov and Gimelshein, 2018; FlashAttention: Dao et al., 2022), with powers of two
// instead of e. Work is cut into items that run on any thread in any order. Where an item sees only a part of a query's
// keys, it leaves a partial result (weighted sum, maximum, sum of weights), and a second pass merges those. How a row is
// cut depends on its own length alone, never on the batch or on the number of threads.
//
//   narrow items: one token, few query heads per key head (decode). Keys and values are read where they lie, once, and
//       as fast as memory gives them; each product ends in a horizontal sum.
//   wide items: a block of queries ("columns") by one key head. Products are tiles of registers: rows of the cache, one
//       32-bit unit broadcast at a time, by vectors of columns. Scores lie transposed, [keys, columns], so that softmax
//       needs no horizontal operation.
#include "common.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <vector>

// What devices/cpu/attention.py fills. Strides in elements; the last dimension is contiguous everywhere.
struct Attention {
    const void* q;  // [T, num_heads, head_dim]
    int64_t q_token, q_head;
    const void* keys;  // [slots, num_kv_heads, head_dim]
    int64_t key_slot, key_head;
    const void* values;  // [slots, num_kv_heads, v_head_dim]
    int64_t value_slot, value_head;
    const float* key_scales;  // [slots, num_kv_heads], of an int8 cache
    const float* value_scales;
    void* out;  // [T, num_heads, v_head_dim], contiguous
    const int32_t* page_table;
    int64_t table_row, page_size;
    const int32_t* rows;  // per row of the batch: its row of the page table,
    const int32_t* starts;  // the position of its first token,
    const int32_t* counts;  // and how many tokens it computes
    int64_t num_rows;
    const int32_t* shared;  // [num_shared, 3]: keys [0, end) begin at the end of the prefix before; first member, count
    const int32_t* members;  // rows of the batch
    int64_t num_shared;
    const int64_t* visible_ends;  // [T] or null
    const float* sinks;  // [num_heads] or null
    int64_t num_heads, num_kv_heads, head_dim, v_head_dim;
    int64_t window;  // visible tokens, the query's own included; 0: all
    double scaling, logit_cap;  // cap 0: none
    int64_t activations, stored;  // 0: float32, 1: bfloat16, 2: int8 (stored alone)
};

struct Write {
    const void* k;  // [T, num_kv_heads, head_dim]
    int64_t k_token, k_head;
    const void* v;  // [T, num_kv_heads, v_head_dim]; null: latent
    int64_t v_token, v_head;
    void* keys;  // contiguous [slots, num_kv_heads, head_dim]
    void* values;
    float* key_scales;
    float* value_scales;
    const int64_t* slots;  // [T]
    int64_t num_tokens, num_kv_heads, head_dim, v_head_dim;
    int64_t activations, stored;
};

static INLINE vec load(const int8_t* p) {
    typedef int8_t qvec __attribute__((vector_size(LANES)));
    qvec bytes;
    std::memcpy(&bytes, p, LANES);
    return __builtin_convertvector(__builtin_convertvector(bytes, ivec), vec);
}

static INLINE float to_float(int8_t x) { return x; }

namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float MASKED = -1e30f;  // the score of a key that is not seen: finite, so that nothing is infinity minus infinity
constexpr float MASKED_PRODUCT = -1e33f;  // the same before it is scaled, by 0.001 to 10,000
constexpr float LOWEST = -1e29f;  // where a maximum begins: above what is masked, so that 2^(masked - maximum) is 0

constexpr int NARROW_KEYS = 32;  // keys that a narrow item looks at together
constexpr int NARROW_HEADS = 8;  // most query heads per key head of a narrow item
constexpr int WIDE_KEYS = 128;
constexpr int WIDE_COLUMNS = 192;
constexpr int PANEL_VECS = 3;  // columns of one tile, in vectors
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8;
#else
constexpr int TILE_ROWS = 4;  // sixteen registers
#endif
constexpr int KEYS_PER_SPLIT = 256;  // of a row of one token; one such row occupies several cores
constexpr int MAX_SPLITS = 64;
constexpr int KEYS_PER_SHARED_SPLIT = 512;

// Products of bfloat16 are native on some machines: two neighbours along the sum in one 32-bit unit. Others compute in
// float32 whatever is stored.
#if defined(__AVX512BF16__)
template <class T>
using Computed = T;
#else
template <class T>
using Computed = float;
#endif

template <class C>
constexpr int PACK = 4 / int(sizeof(C));  // numbers in a unit
template <class C>
constexpr int STEP = LANES * PACK<C>;  // numbers in a vector of units

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// ---- numbers

template <bool PRECISE>
INLINE vec exp2(vec x) {
#if defined(__AVX512F__)
    __m512 whole = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec r = x - (vec)whole;
#else
    ivec too_small = (ivec)(x < -126.0f);
    vec bounded = min(max(x, splat(-126.0f)), splat(126.0f));
    vec shifted = bounded + 12582912.0f;  // rounds to an integer in the lower bits
    vec r = bounded - (shifted - 12582912.0f);
#endif
    // Taylor's: 2e-7 off at most for |r| <= 0.5, or 5e-5, which is enough where it is rounded to bfloat16.
    vec p = splat(9.618129107628e-3f);
    if (PRECISE) p = p + r * (splat(1.333355814642e-3f) + r * 1.540353039338e-4f);
    p = p * r + 5.550410866482e-2f;
    p = p * r + 2.402265069591e-1f;
    p = p * r + 6.931471805599e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, whole);
#else
    ivec power = (ivec)shifted - (ivec)splat(12582912.0f);
    vec result = (vec)(((ivec)p + (power << 23)) & ~too_small);
    return x == x ? result : x;
#endif
}

INLINE vec tanh(vec x) { return 1.0f - 2.0f / (1.0f + exp2<true>(x * (2.0f * LOG2E))); }

float exp2_of(float x) { return exp2<true>(splat(x))[0]; }

// From products of queries and keys to exponents of two.
struct Scores {
    float factor, cap, cap_factor;
    bool plain;  // scores are products times a factor that MASKED_PRODUCT stands

    explicit Scores(const Attention& a)
        : factor(float(a.scaling) * LOG2E),
          cap(float(a.logit_cap) * LOG2E),
          cap_factor(a.logit_cap > 0 ? float(a.scaling / a.logit_cap) : 0),
          plain(cap <= 0 && factor >= 1e-3f && factor <= 1e4f) {}

    INLINE vec operator()(vec products, float key_scale) const {
        if (cap > 0) return cap * tanh(products * (cap_factor * key_scale));
        return products * (factor * key_scale);
    }
    INLINE vec operator()(vec products, vec key_scales) const {
        if (cap > 0) return cap * tanh(products * (cap_factor * key_scales));
        return products * (factor * key_scales);
    }
};

// sum + (units of a) * (units of b)
template <class C>
INLINE vec multiply_add(vec a, vec b, vec sum) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same<C, bf16>::value)
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#endif
    return sum + a * b;
}

INLINE vec broadcast(const uint32_t* unit) {
#if defined(__AVX512F__)
    return (vec)_mm512_set1_epi32(int(*unit));
#else
    float value;
    std::memcpy(&value, unit, 4);
    return splat(value);
#endif
}

// A vector of units of C from what is stored as R: the same, or bfloat16 widened.
template <class C, class R>
INLINE vec units(const R* p) {
    if constexpr (sizeof(C) == 2) return load(reinterpret_cast<const float*>(p));
    else return load(p);
}

template <class C, class S>
INLINE void convert_vector(const S* from, C* to) {
    if constexpr (std::is_same<C, S>::value) store(reinterpret_cast<float*>(to), load(reinterpret_cast<const float*>(from)));
    else
        for (int i = 0; i < PACK<C>; i++) store(to + i * LANES, load(from + i * LANES));
}

// `size` numbers and zeros up to `padded`, a multiple of STEP<C>.
template <class C, class S>
INLINE void convert(const S* from, int64_t size, C* to, int64_t padded) {
    int64_t i = 0;
    for (; i + STEP<C> <= size; i += STEP<C>) convert_vector(from + i, to + i);
    for (; i < padded; i++) to[i] = i < size ? from_float<C>(to_float(from[i])) : C{};
}

// The sums of four vectors.
INLINE void sums(const vec (&x)[4], float* out) {
#if defined(__AVX512F__)
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[0], (__m512)x[1]), _mm512_unpackhi_ps((__m512)x[0], (__m512)x[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[2], (__m512)x[3]), _mm512_unpackhi_ps((__m512)x[2], (__m512)x[3]));
    __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    __m512 quarters = _mm512_add_ps((__m512)low, (__m512)high);
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#elif defined(__AVX2__)
    __m256 ab = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), cd = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
    __m256 halves = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
    for (int i = 0; i < 4; i++) out[i] = sum(x[i]);
#endif
}

// ---- memory

// What one thread needs while it computes; it grows and stays.
class Arena {
  public:
    ~Arena() { std::free(base_); }

    void reserve(size_t bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        std::free(base_);
        size_ = size_t(round_up(int64_t(bytes), 4096));
        base_ = static_cast<char*>(std::aligned_alloc(4096, size_));
        if (!base_) throw std::bad_alloc();
    }

    template <class T>
    T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(base_ + used_);
        used_ += bytes<T>(count);
        return taken;
    }

    template <class T>
    static size_t bytes(int64_t count) {
        return size_t(round_up(count * int64_t(sizeof(T)), 64));
    }

  private:
    char* base_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

thread_local Arena scratch;

void find_slots(const Attention& a, int64_t table, int64_t begin, int64_t count, int64_t* slots) {
    const int32_t* pages = a.page_table + table * a.table_row;
    if (a.page_size == 1) {
        for (int64_t i = 0; i < count; i++) slots[i] = pages[begin + i];
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t position = begin + i;
        slots[i] = pages[position / a.page_size] * a.page_size + position % a.page_size;
    }
}

INLINE void prefetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// Asks for rows of keys and of values some time before they are needed, a few at a time.
struct Ahead {
    const char *keys, *values;
    int64_t key_step, value_step, key_bytes, value_bytes;
    const int64_t* slots;
    int count, at_a_time, next = 0;

    INLINE void ask() {
        for (int end = std::min(next + at_a_time, count); next < end; next++) {
            prefetch(keys + slots[next] * key_step, key_bytes);
            prefetch(values + slots[next] * value_step, value_bytes);
        }
    }
};

// ---- what a step has to do

enum Kind { NARROW, WIDE };

struct Item {
    Kind kind;
    int32_t table;  // row of the page table
    int32_t begin, end;  // keys
    int32_t head, num_heads;  // key heads; one of a wide item
    int32_t query, num_queries;  // tokens of the batch, or members of a shared prefix
    int32_t in_group, group_size;  // query heads of each key head: the first, and how many
    int32_t row;  // of the batch
    int32_t partial;  // where a partial result goes; -1: the result is whole. Of a shared prefix: which of its splits
    bool shared;  // by several rows
    int64_t cost;
};

struct Step {
    std::vector<Item> items;
    std::vector<int32_t> tokens;  // per row, its first token
    std::vector<int32_t> own_begin;  // per row, the end of what it shares
    std::vector<int32_t> first_partial, num_partials;  // per row
    std::vector<int32_t> member_partials;  // per member of a shared prefix, of its first split
    int64_t total_partials = 0, total_cost = 0;
};

int64_t first_visible(const Attention& a, int64_t position) {
    return a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
}

int32_t num_splits(int64_t num_keys, int64_t keys_per_split) {
    return int32_t(std::min<int64_t>(std::max<int64_t>(1, num_keys / keys_per_split), MAX_SPLITS));
}

// Part i of n of [begin, end), in multiples of 32 keys but for the last.
int32_t split_at(int64_t begin, int64_t end, int32_t i, int32_t n) {
    if (i == n) return int32_t(end);
    return int32_t(begin + (end - begin) * i / n / 32 * 32);
}

void add(Step& step, Item item, int64_t width) {
    item.cost = int64_t(item.end - item.begin) * width;
    step.total_cost += item.cost;
    step.items.push_back(item);
}

// Shared prefixes follow on one another, for each row from 0 on. One that some row does not see wholly is left out, and
// what follows on it.
void use_shared(const Attention& a, Step& step, std::vector<int32_t>& used) {
    step.own_begin.assign(size_t(a.num_rows), 0);
    step.member_partials.assign(size_t(a.num_shared ? a.shared[3 * a.num_shared - 2] + a.shared[3 * a.num_shared - 1] : 0), 0);
    for (int64_t s = 0; s < a.num_shared; s++) {
        int32_t end = a.shared[3 * s], first = a.shared[3 * s + 1], count = a.shared[3 * s + 2];
        int32_t begin = step.own_begin[size_t(a.members[first])];
        bool usable = begin < end;
        for (int32_t i = first; i < first + count && usable; i++) {
            int32_t row = a.members[i];
            usable = step.own_begin[size_t(row)] == begin && a.counts[row] == 1 && end <= a.starts[row] &&
                     first_visible(a, a.starts[row]) <= begin;
        }
        used.push_back(usable ? begin : -1);
        if (usable)
            for (int32_t i = first; i < first + count; i++) step.own_begin[size_t(a.members[i])] = end;
    }
}

void add_shared(const Attention& a, Step& step, const std::vector<int32_t>& used, int32_t heads_per_item) {
    int32_t group = int32_t(a.num_heads / a.num_kv_heads);
    int32_t heads = std::min(group, WIDE_COLUMNS), queries = std::max(1, WIDE_COLUMNS / group);
    for (int64_t s = 0; s < a.num_shared; s++) {
        if (used[size_t(s)] < 0) continue;
        int32_t begin = used[size_t(s)], end = a.shared[3 * s], first = a.shared[3 * s + 1], count = a.shared[3 * s + 2];
        int32_t splits = num_splits(end - begin, KEYS_PER_SHARED_SPLIT), table = a.rows[a.members[first]];
        for (int32_t i = first; i < first + count; i++) {
            int32_t row = a.members[i];
            step.member_partials[size_t(i)] = step.first_partial[size_t(row)] + step.num_partials[size_t(row)];
            step.num_partials[size_t(row)] += splits;
        }
        for (int32_t i = 0; i < splits; i++) {
            int32_t from = split_at(begin, end, i, splits), to = split_at(begin, end, i + 1, splits);
            if (count * group <= NARROW_HEADS) {
                for (int32_t head = 0; head < a.num_kv_heads; head += heads_per_item) {
                    int32_t taken = std::min(heads_per_item, int32_t(a.num_kv_heads) - head);
                    add(step, {NARROW, table, from, to, head, taken, first, count, 0, group, -1, i, true, 0}, taken * count * group);
                }
                continue;
            }
            for (int32_t q = 0; q < count; q += queries)
                for (int32_t g = 0; g < group; g += heads)
                    for (int32_t head = 0; head < a.num_kv_heads; head++) {
                        int32_t num_queries = std::min(queries, count - q), size = std::min(heads, group - g);
                        add(step, {WIDE, table, from, to, head, 1, first + q, num_queries, g, size, -1, i, true, 0}, num_queries * size);
                    }
        }
    }
}

// Partials of the row come first, then those of what it shares.
void add_single(const Attention& a, Step& step, int32_t row, int32_t heads_per_item) {
    int32_t group = int32_t(a.num_heads / a.num_kv_heads), end = a.starts[row] + 1, token = step.tokens[size_t(row)];
    int32_t begin = std::max(step.own_begin[size_t(row)], int32_t(first_visible(a, a.starts[row])));
    int32_t splits = num_splits(end - begin, KEYS_PER_SPLIT);
    for (int32_t i = 0; i < splits; i++) {
        int32_t from = split_at(begin, end, i, splits), to = split_at(begin, end, i + 1, splits);
        int32_t partial = step.num_partials[size_t(row)] > 1 ? step.first_partial[size_t(row)] + i : -1;
        if (group <= NARROW_HEADS) {
            for (int32_t head = 0; head < a.num_kv_heads; head += heads_per_item) {
                int32_t heads = std::min(heads_per_item, int32_t(a.num_kv_heads) - head);
                add(step, {NARROW, a.rows[row], from, to, head, heads, token, 1, 0, group, row, partial, false, 0}, heads * group);
            }
            continue;
        }
        for (int32_t head = 0; head < a.num_kv_heads; head++)
            for (int32_t g = 0; g < group; g += WIDE_COLUMNS) {
                int32_t size = std::min(WIDE_COLUMNS, group - g);
                add(step, {WIDE, a.rows[row], from, to, head, 1, token, 1, g, size, row, partial, false, 0}, size);
            }
    }
}

void add_several(const Attention& a, Step& step, int32_t row) {
    int32_t group = int32_t(a.num_heads / a.num_kv_heads), count = a.counts[row];
    int32_t heads = std::min(group, WIDE_COLUMNS), queries = std::max(1, WIDE_COLUMNS / group);
    for (int32_t q = 0; q < count; q += queries) {
        int32_t num_queries = std::min(queries, count - q), token = step.tokens[size_t(row)] + q;
        int64_t position = a.starts[row] + q, end = position + num_queries;
        if (a.visible_ends)
            for (int32_t i = 0; i < num_queries; i++) end = std::max(end, a.visible_ends[token + i]);
        end = std::min<int64_t>(end, a.starts[row] + count);
        for (int32_t g = 0; g < group; g += heads)
            for (int32_t head = 0; head < a.num_kv_heads; head++) {
                int32_t size = std::min(heads, group - g);
                add(step, {WIDE, a.rows[row], int32_t(first_visible(a, position)), int32_t(end), head, 1, token, num_queries, g,
                           size, row, -1, false, 0}, num_queries * size);
            }
    }
}

void plan(const Attention& a, Step& step) {
    step.items.clear();
    step.tokens.clear();
    step.total_partials = step.total_cost = 0;
    std::vector<int32_t> used;
    use_shared(a, step, used);
    int32_t token = 0;
    int64_t singles = 0;
    step.first_partial.assign(size_t(a.num_rows), 0);
    step.num_partials.assign(size_t(a.num_rows), 0);
    for (int64_t row = 0; row < a.num_rows; row++) {
        step.tokens.push_back(token);
        token += a.counts[row];
        if (a.counts[row] != 1) continue;
        int64_t begin = std::max<int64_t>(step.own_begin[size_t(row)], first_visible(a, a.starts[row]));
        step.num_partials[size_t(row)] = num_splits(a.starts[row] + 1 - begin, KEYS_PER_SPLIT);
        singles += step.num_partials[size_t(row)];
    }
    std::vector<int32_t> of_shared(size_t(a.num_rows), 0);
    for (int64_t s = 0; s < a.num_shared; s++) {
        if (used[size_t(s)] < 0) continue;
        int32_t splits = num_splits(a.shared[3 * s] - used[size_t(s)], KEYS_PER_SHARED_SPLIT), first = a.shared[3 * s + 1];
        for (int32_t i = first; i < first + a.shared[3 * s + 2]; i++) of_shared[size_t(a.members[i])] += splits;
    }
    for (size_t row = 0; row < size_t(a.num_rows); row++) {
        if (step.num_partials[row] + of_shared[row] < 2) continue;
        step.first_partial[row] = int32_t(step.total_partials);
        step.total_partials += step.num_partials[row] + of_shared[row];
    }
    // One item takes all key heads of its keys, so that memory is read in long runs, unless threads would be idle.
    int64_t heads_per_item = a.num_kv_heads, wanted = 4 * omp_get_max_threads();
    while (heads_per_item > 1 && singles * ((a.num_kv_heads + heads_per_item - 1) / heads_per_item) < wanted)
        heads_per_item = (heads_per_item + 1) / 2;
    add_shared(a, step, used, int32_t(heads_per_item));
    for (int32_t row = 0; row < a.num_rows; row++) {
        if (a.counts[row] == 1) add_single(a, step, row, int32_t(heads_per_item));
        if (a.counts[row] > 1) add_several(a, step, row);
    }
    std::stable_sort(step.items.begin(), step.items.end(), [](const Item& x, const Item& y) { return x.cost > y.cost; });
}

// ---- results

// Partial results of one query head: the weighted sum, padded to vectors, then maximum and sum of weights.
struct Partials {
    float* base;
    int64_t size, num_heads;  // floats of one

    float* at(int64_t partial, int64_t head) const { return base + (partial * num_heads + head) * size; }
};

template <class T>
INLINE void store_row(T* out, const float* sums_of, float factor, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(out + i, load(sums_of + i) * factor);
    if (i < size) {
        float rest[LANES] = {};
        for (int64_t j = i; j < size; j++) rest[j - i] = sums_of[j];
        store_part(out + i, load(rest) * factor, int(size - i));
    }
}

template <class T>
void finish(const Attention& a, int64_t token, int64_t head, const float* weighted, float maximum, float total) {
    float factor = 1.0f / total;
    if (a.sinks) {
        float sink = a.sinks[head] * LOG2E, top = std::max(maximum, sink);
        float scale = exp2_of(maximum - top);
        factor = scale / (total * scale + exp2_of(sink - top));
    }
    store_row(static_cast<T*>(a.out) + (token * a.num_heads + head) * a.v_head_dim, weighted, factor, a.v_head_dim);
}

void leave_partial(const Attention& a, float* to, int64_t size, const float* weighted, float maximum, float total) {
    std::memcpy(to, weighted, size_t(a.v_head_dim) * 4);
    to[size - 2] = maximum;
    to[size - 1] = total;
}

// Merges a row's partial results of one head, the first of which takes the sum.
template <class T>
void merge(const Attention& a, const Partials& partials, int64_t token, int64_t first, int64_t count, int64_t head) {
    float* into = partials.at(first, head);
    int64_t size = partials.size;
    float maximum = into[size - 2];
    for (int64_t i = 1; i < count; i++) maximum = std::max(maximum, partials.at(first + i, head)[size - 2]);
    float scale = exp2_of(into[size - 2] - maximum), total = into[size - 1] * scale;
    for (int64_t d = 0; d < a.v_head_dim; d += LANES) store(into + d, load(into + d) * scale);
    for (int64_t i = 1; i < count; i++) {
        const float* other = partials.at(first + i, head);
        scale = exp2_of(other[size - 2] - maximum);
        total += other[size - 1] * scale;
        for (int64_t d = 0; d < a.v_head_dim; d += LANES) store(into + d, load(into + d) + load(other + d) * scale);
    }
    finish<T>(a, token, head, into, maximum, total);
}

// ---- items

// An item's columns for one key head: query i, head g of the group is column i * group_size + g.
struct Columns {
    const Attention& a;
    const Step& step;
    const Item& item;

    int count() const { return item.num_queries * item.group_size; }
    int64_t row(int column) const {
        return item.shared ? a.members[item.query + column / item.group_size] : item.row;
    }
    int64_t token(int column) const {
        int query = column / item.group_size;
        return item.shared ? step.tokens[size_t(row(column))] : item.query + query;
    }
    int64_t head(int column, int64_t kv_head) const {
        return kv_head * (a.num_heads / a.num_kv_heads) + item.in_group + column % item.group_size;
    }
    int64_t position(int column) const { return a.starts[row(column)] + token(column) - step.tokens[size_t(row(column))]; }
    int64_t partial(int column) const {
        if (item.shared) return step.member_partials[size_t(item.query + column / item.group_size)] + item.partial;
        return item.partial;
    }
    // Keys of the item that it sees.
    void visible(int column, int32_t& from, int32_t& to) const {
        from = item.begin;
        to = item.end;
        if (item.shared) return;
        int64_t at = position(column), end = at + 1;
        if (a.visible_ends) end = std::max(end, a.visible_ends[token(column)]);
        from = int32_t(std::max<int64_t>(from, first_visible(a, at)));
        to = int32_t(std::min<int64_t>(to, end));
    }
};

// ---- narrow items

// Products of HEADS queries and four keys, over `size` numbers.
template <class C, class R, int HEADS>
INLINE void multiply_keys(const C* q, int64_t q_size, const R* const* keys, int64_t size, float* out) {
    vec acc[HEADS][4] = {};
    for (int64_t d = 0; d < size; d += STEP<C>) {
        vec k[4];
        for (int j = 0; j < 4; j++) k[j] = units<C>(keys[j] + d);
        for (int h = 0; h < HEADS; h++) {
            vec x = units<C>(q + h * q_size + d);
            for (int j = 0; j < 4; j++) acc[h][j] = multiply_add<C>(x, k[j], acc[h][j]);
        }
    }
    for (int h = 0; h < HEADS; h++) sums(acc[h], out + h * NARROW_KEYS);
}

// weighted[h] += the sum over keys of p[h][key] * values[key], for VECS vectors of it. Of bfloat16 pairs, the even
// quarters come first in each STEP: `natural_order` puts them right.
template <class C, class R, int HEADS, int VECS>
INLINE void add_values(const C* p, const R* const* values, int64_t d, int num_keys, float* weighted, int64_t size) {
    vec acc[HEADS][VECS];
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < VECS; v++) acc[h][v] = load(weighted + h * size + d + v * LANES);
    for (int j = 0; j < num_keys; j += PACK<C>) {
        vec x[VECS];
#if defined(__AVX512BF16__)
        if constexpr (sizeof(C) == 2) {
            for (int v = 0; v < VECS; v += 2) {
                __m512i even = (__m512i)units<C>(values[j] + d + v * LANES);
                __m512i odd = (__m512i)units<C>(values[j + 1] + d + v * LANES);
                x[v] = (vec)_mm512_unpacklo_epi16(even, odd);
                x[v + 1] = (vec)_mm512_unpackhi_epi16(even, odd);
            }
        } else
#endif
        {
            for (int v = 0; v < VECS; v++) x[v] = units<C>(values[j] + d + v * LANES);
        }
        for (int h = 0; h < HEADS; h++) {
            vec weight = broadcast(reinterpret_cast<const uint32_t*>(p + h * NARROW_KEYS + j));
            for (int v = 0; v < VECS; v++) acc[h][v] = multiply_add<C>(weight, x[v], acc[h][v]);
        }
    }
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < VECS; v++) store(weighted + h * size + d + v * LANES, acc[h][v]);
}

template <class C>
INLINE void natural_order(float* weighted, int64_t size) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(C) == 2) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        for (int64_t d = 0; d < size; d += 32) {
            __m512 low = _mm512_loadu_ps(weighted + d), high = _mm512_loadu_ps(weighted + d + 16);
            _mm512_storeu_ps(weighted + d, _mm512_permutex2var_ps(low, first, high));
            _mm512_storeu_ps(weighted + d + 16, _mm512_permutex2var_ps(low, second, high));
        }
    }
#endif
}

template <class C, class R, int HEADS>
INLINE void add_all_values(const C* p, const R* const* values, int num_keys, float* weighted, int64_t size) {
    constexpr int VECS = 2 * PACK<C>;
    int64_t d = 0;
    for (; d + VECS * LANES <= size; d += VECS * LANES) add_values<C, R, HEADS, VECS>(p, values, d, num_keys, weighted, size);
    for (; d < size; d += STEP<C>) add_values<C, R, HEADS, PACK<C>>(p, values, d, num_keys, weighted, size);
}

// All query heads of a key head, up to four at a time.
template <class C, class R>
void multiply_group(const C* q, int64_t q_size, const R* const* keys, int64_t size, int num_heads, float* out) {
    while (num_heads > 0) {
        int taken = std::min(num_heads, 4);
        if (taken == 1) multiply_keys<C, R, 1>(q, q_size, keys, size, out);
        if (taken == 2) multiply_keys<C, R, 2>(q, q_size, keys, size, out);
        if (taken == 3) multiply_keys<C, R, 3>(q, q_size, keys, size, out);
        if (taken == 4) multiply_keys<C, R, 4>(q, q_size, keys, size, out);
        q += taken * q_size;
        out += taken * NARROW_KEYS;
        num_heads -= taken;
    }
}

template <class C, class R>
void add_group(const C* p, const R* const* values, int num_keys, int num_heads, float* weighted, int64_t size) {
    while (num_heads > 0) {
        int taken = std::min(num_heads, 4);
        if (taken == 1) add_all_values<C, R, 1>(p, values, num_keys, weighted, size);
        if (taken == 2) add_all_values<C, R, 2>(p, values, num_keys, weighted, size);
        if (taken == 3) add_all_values<C, R, 3>(p, values, num_keys, weighted, size);
        if (taken == 4) add_all_values<C, R, 4>(p, values, num_keys, weighted, size);
        p += taken * NARROW_KEYS;
        weighted += taken * size;
        num_heads -= taken;
    }
}

// Rows of some slots: where they lie, or converted. Up to a multiple of four, the last is repeated.
template <class C, class S>
struct Rows {
    const S* stored[NARROW_KEYS + 4];
    const C* converted[NARROW_KEYS + 4];
    bool direct;

    void find(const S* base, int64_t stride, const int64_t* slots, int count, int64_t size, int64_t padded, C* buffer) {
        int padded_count = (count + 3) / 4 * 4;
        for (int j = 0; j < padded_count; j++) {
            int key = std::min(j, count - 1);
            stored[j] = base + slots[key] * stride;
            if (direct) continue;
            converted[j] = buffer + key * padded;
            if (j < count) convert(stored[j], size, buffer + j * padded, padded);
        }
    }
};

template <class T, class S>
void run_narrow(const Attention& a, const Step& step, const Item& item, const Partials& partials) {
    using C = Computed<T>;
    constexpr bool CONVERTS = std::is_same<S, int8_t>::value;
    const Columns columns{a, step, item};
    int group = columns.count();
    int64_t k_size = round_up(a.head_dim, STEP<C>), v_size = round_up(a.v_head_dim, STEP<C>);
    int64_t queries = int64_t(item.num_heads) * group;
    scratch.reserve(Arena::bytes<C>(queries * k_size) + Arena::bytes<float>(queries * v_size) +
                    2 * Arena::bytes<float>(queries) + Arena::bytes<C>(NARROW_KEYS * std::max(k_size, v_size)));
    C* q = scratch.take<C>(queries * k_size);
    float* weighted = scratch.take<float>(queries * v_size);
    float* maxima = scratch.take<float>(queries);
    float* totals = scratch.take<float>(queries);
    C* buffer = scratch.take<C>(NARROW_KEYS * std::max(k_size, v_size));
    auto token_of = [&](int64_t h) { return columns.token(int(h % group)); };
    auto head_of = [&](int64_t h) { return columns.head(int(h % group), item.head + h / group); };
    for (int64_t h = 0; h < queries; h++) {
        convert(static_cast<const T*>(a.q) + token_of(h) * a.q_token + head_of(h) * a.q_head, a.head_dim, q + h * k_size, k_size);
        maxima[h] = LOWEST;
        totals[h] = 0;
    }
    std::fill(weighted, weighted + queries * v_size, 0.0f);

    const Scores to_scores(a);
    const S* keys = static_cast<const S*>(a.keys);
    const S* values = static_cast<const S*>(a.values);
    Rows<C, S> rows;
    int64_t slots[2][NARROW_KEYS];
    alignas(64) float scores[NARROW_HEADS * NARROW_KEYS];
    alignas(64) C weights[NARROW_HEADS * NARROW_KEYS];
    alignas(64) float key_scales[NARROW_KEYS] = {}, value_scales[NARROW_KEYS] = {};
    int count = std::min(NARROW_KEYS, item.end - item.begin);
    find_slots(a, item.table, item.begin, count, slots[0]);
    int now = 0;
    for (int32_t begin = item.begin; begin < item.end; begin += NARROW_KEYS, now = 1 - now) {
        int next_count = std::max(0, std::min(NARROW_KEYS, item.end - begin - NARROW_KEYS));
        find_slots(a, item.table, begin + NARROW_KEYS, next_count, slots[1 - now]);
        for (int head = 0; head < item.num_heads; head++) {
            int64_t kv_head = item.head + head;
            for (int j = 0; j < next_count; j++)
                prefetch(keys + slots[1 - now][j] * a.key_slot + kv_head * a.key_head, a.head_dim * int64_t(sizeof(S)));
            if (CONVERTS)
                for (int j = 0; j < count; j++) {
                    key_scales[j] = a.key_scales[slots[now][j] * a.num_kv_heads + kv_head];
                    value_scales[j] = a.value_scales[slots[now][j] * a.num_kv_heads + kv_head];
                }
            rows.direct = !CONVERTS && a.head_dim % STEP<C> == 0;
            rows.find(keys + kv_head * a.key_head, a.key_slot, slots[now], count, a.head_dim, k_size, buffer);
            for (int j = 0; j < count; j += 4) {
                if constexpr (!CONVERTS)
                    if (rows.direct) {
                        multiply_group(q + head * group * k_size, k_size, rows.stored + j, k_size, group, scores + j);
                        continue;
                    }
                multiply_group(q + head * group * k_size, k_size, rows.converted + j, k_size, group, scores + j);
            }
            for (int g = 0; g < group; g++) {
                float* row = scores + g * NARROW_KEYS;
                int64_t h = head * group + g;
                vec top = splat(LOWEST);
                for (int j = 0; j < NARROW_KEYS; j += LANES) {
                    vec x = CONVERTS ? to_scores(load(row + j), load(key_scales + j)) : to_scores(load(row + j), 1.0f);
                    if (j + LANES > count)
                        for (int lane = std::max(0, count - j); lane < LANES; lane++) x[lane] = MASKED;
                    store(row + j, x);
                    top = max(x, top);
                }
                float maximum = std::max(maxima[h], largest(top));
                if (maximum > maxima[h]) {
                    float factor = exp2_of(maxima[h] - maximum);
                    totals[h] *= factor;
                    float* sum_of = weighted + h * v_size;
                    for (int64_t d = 0; d < v_size; d += LANES) store(sum_of + d, load(sum_of + d) * factor);
                    maxima[h] = maximum;
                }
                vec total = {};
                for (int j = 0; j < NARROW_KEYS; j += LANES) {
                    vec p = exp2<sizeof(C) == 4>(load(row + j) - maximum);
                    total += p;
                    if (CONVERTS) p *= load(value_scales + j);
                    store(weights + g * NARROW_KEYS + j, p);
                }
                totals[h] += sum(total);
            }
            for (int j = 0; j < next_count; j++)
                prefetch(values + slots[1 - now][j] * a.value_slot + kv_head * a.value_head, a.v_head_dim * int64_t(sizeof(S)));
            rows.direct = !CONVERTS && a.v_head_dim % STEP<C> == 0;
            rows.find(values + kv_head * a.value_head, a.value_slot, slots[now], count, a.v_head_dim, v_size, buffer);
            float* sums_of = weighted + head * group * v_size;
            if constexpr (!CONVERTS)
                if (rows.direct) {
                    add_group(weights, rows.stored, count, group, sums_of, v_size);
                    continue;
                }
            add_group(weights, rows.converted, count, group, sums_of, v_size);
        }
        count = next_count;
    }
    for (int64_t h = 0; h < queries; h++) {
        natural_order<C>(weighted + h * v_size, v_size);
        int64_t partial = columns.partial(int(h % group));
        if (partial < 0) finish<T>(a, token_of(h), head_of(h), weighted + h * v_size, maxima[h], totals[h]);
        else leave_partial(a, partials.at(partial, head_of(h)), partials.size, weighted + h * v_size, maxima[h], totals[h]);
    }
}

// ---- wide items

// acc[r][v] += sum over k of (unit k of row r of a) * (vector v of row k of b)
template <class C, int VECS>
INLINE void multiply_tile(
    const uint32_t* a, int64_t row, int64_t step, const float* b, int64_t depth, vec (&acc)[TILE_ROWS][VECS]
) {
    for (int64_t k = 0; k < depth; k++, a += step, b += VECS * LANES) {
        vec x[VECS];
        for (int v = 0; v < VECS; v++) x[v] = load(b + v * LANES);
        for (int r = 0; r < TILE_ROWS; r++) {
            vec unit = broadcast(a + r * row);
            for (int v = 0; v < VECS; v++) acc[r][v] = multiply_add<C>(unit, x[v], acc[r][v]);
        }
    }
}

// scores [num_keys, VECS * LANES] of keys [num_keys, row units] and queries [depth, VECS * LANES]
template <class C, int VECS>
void multiply_panel(
    const C* keys, int64_t row, const float* queries, int64_t depth, int num_keys, float* scores, Ahead& ahead
) {
    for (int j = 0; j < num_keys; j += TILE_ROWS) {
        ahead.ask();
        vec acc[TILE_ROWS][VECS] = {};
        multiply_tile<C, VECS>(reinterpret_cast<const uint32_t*>(keys) + j * row, row, 1, queries, depth, acc);
        for (int r = 0; r < TILE_ROWS; r++)
            for (int v = 0; v < VECS; v++) store(scores + ((j + r) * VECS + v) * LANES, acc[r][v]);
    }
}

// weighted [size, VECS * LANES] = itself times factors, and values [tile][num_units or more][TILE_ROWS] times weights
// [num_units, VECS * LANES].
template <class C, int VECS>
void add_panel(
    const uint32_t* values, int64_t tile_size, const float* weights, int num_units, const float* factors, int64_t size,
    float* weighted
) {
    for (int64_t d = 0; d < size; d += TILE_ROWS, values += tile_size) {
        vec acc[TILE_ROWS][VECS];
        for (int v = 0; v < VECS; v++) {
            vec factor = load(factors + v * LANES);
            for (int r = 0; r < TILE_ROWS; r++) acc[r][v] = load(weighted + ((d + r) * VECS + v) * LANES) * factor;
        }
        multiply_tile<C, VECS>(values, 1, TILE_ROWS, weights, num_units, acc);
        for (int r = 0; r < TILE_ROWS; r++)
            for (int v = 0; v < VECS; v++) store(weighted + ((d + r) * VECS + v) * LANES, acc[r][v]);
    }
}

// Columns that go through the tiles together, and what is known of each.
struct Panel {
    int vecs;
    float* queries;  // [depth, vecs * LANES] units
    float* weighted;  // [padded v_head_dim, vecs * LANES]
    float *maxima, *totals;  // [vecs * LANES]
    int32_t *from, *to;  // visible keys of each column
    int32_t all_from, all_to, some_from, some_to;  // keys that all columns see, and that some do
};

template <class C>
INLINE void store_weights(float* to, vec even, vec odd) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(C) == 2) {
        alignas(64) static constexpr auto order = [] {
            struct { uint16_t at[32]; } result{};
            for (int i = 0; i < 32; i++) result.at[i] = uint16_t(i / 2 + i % 2 * 16);
            return result;
        }();
        __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(&order), pairs));
        return;
    }
#endif
    store(to, even);
}

// Turns one vector of columns of scores into weights, and returns by what earlier sums are to be multiplied. PLAIN: a
// score is the product times to_scores.factor, and nothing else.
template <class C, bool MASKS, bool PLAIN, bool SCALES>
INLINE vec soften(
    const Scores& to_scores, float* scores, int64_t stride, int num_keys, int32_t begin, const float* key_scales,
    const float* value_scales, const int32_t* from, const int32_t* to, float* weights, float* maxima, float* totals
) {
    vec before = load(maxima), top = PLAIN ? splat(MASKED_PRODUCT) : before;
    vec factor = splat(PLAIN ? to_scores.factor : 1.0f);
    ivec first, last;
    if (MASKS) {
        std::memcpy(&first, from, sizeof(first));
        std::memcpy(&last, to, sizeof(last));
    }
    for (int j = 0; j < num_keys; j++) {
        vec x = load(scores + j * stride);
        if (!PLAIN) x = to_scores(x, SCALES ? key_scales[j] : 1.0f);
        if (MASKS) {
            int32_t position = begin + j;
            ivec seen = (first <= position) & (last > position);
            x = seen ? x : splat(PLAIN ? MASKED_PRODUCT : MASKED);
        }
        if (!PLAIN || MASKS) store(scores + j * stride, x);
        top = max(x, top);
    }
    if (PLAIN) top = max(top * factor, before);
    vec total = {};
    for (int j = 0; j < num_keys; j += PACK<C>) {
        vec p[2] = {};
        for (int i = 0; i < PACK<C>; i++) {
            if (j + i >= num_keys) break;
            vec x = load(scores + (j + i) * stride);
            p[i] = exp2<sizeof(C) == 4>(PLAIN ? x * factor - top : x - top);
            total += p[i];
            if (SCALES) p[i] *= value_scales[j + i];
        }
        store_weights<C>(weights + j / PACK<C> * stride, p[0], p[1]);
    }
    vec scale = exp2<true>(before - top);
    store(maxima, top);
    store(totals, load(totals) * scale + total);
    return scale;
}

// Values of a block as `add_panel` wants them.
template <class C, class S>
void pack_values(const S* base, int64_t stride, const int64_t* slots, int num_keys, int64_t size, int64_t padded, C* row, uint32_t* to) {
    int num_units = (num_keys + PACK<C> - 1) / PACK<C>;
    for (int j = 0; j < num_units; j++) {
        const C* sources[2] = {};
        for (int i = 0; i < PACK<C>; i++) {
            C* copy = row + i * padded;
            sources[i] = copy;
            if (j * PACK<C> + i >= num_keys) {
                std::fill(copy, copy + padded, C{});
                continue;
            }
            const S* source = base + slots[j * PACK<C> + i] * stride;
            if constexpr (std::is_same<C, S>::value)
                if (size == padded) {
                    sources[i] = source;
                    continue;
                }
            convert(source, size, copy, padded);
        }
        uint32_t* unit = to + j * TILE_ROWS;
        int64_t next = int64_t(num_units) * TILE_ROWS;
#if defined(__AVX512BF16__)
        if constexpr (sizeof(C) == 2) {
            for (int64_t d = 0; d < padded; d += 32) {
                __m512i even = (__m512i)units<C>(sources[0] + d), odd = (__m512i)units<C>(sources[1] + d);
                __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
                // Quarters of low hold d .. d+3, d+8 .. d+11, and so on; those of high what is between.
                for (int i = 0; i < 4; i++) {
                    __m128i a = i == 0 ? _mm512_extracti32x4_epi32(low, 0) : i == 1 ? _mm512_extracti32x4_epi32(low, 1)
                              : i == 2 ? _mm512_extracti32x4_epi32(low, 2) : _mm512_extracti32x4_epi32(low, 3);
                    __m128i b = i == 0 ? _mm512_extracti32x4_epi32(high, 0) : i == 1 ? _mm512_extracti32x4_epi32(high, 1)
                              : i == 2 ? _mm512_extracti32x4_epi32(high, 2) : _mm512_extracti32x4_epi32(high, 3);
                    uint32_t* tile = unit + (d / TILE_ROWS + i) * next;
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile), a);
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + 4), b);
                }
            }
            continue;
        }
#endif
        for (int64_t d = 0; d < padded; d += TILE_ROWS) std::memcpy(unit + d / TILE_ROWS * next, sources[0] + d, TILE_ROWS * 4);
    }
}

#if defined(__AVX512F__)
// [16, from_step] -> [16, to_step], transposed
INLINE void transpose(const float* from, int64_t from_step, float* to, int64_t to_step) {
    __m512 x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_ps(from + i * from_step);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // quarter q of x[i + j] is column 4 q + j of rows i to i + 3
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)y[i + j], (__m512d)y[i + 2 + j]);
            x[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)y[i + j], (__m512d)y[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) {
        __m512 even_upper = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88), odd_upper = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
        __m512 even_lower = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
        __m512 odd_lower = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
        _mm512_storeu_ps(to + j * to_step, _mm512_shuffle_f32x4(even_upper, even_lower, 0x88));
        _mm512_storeu_ps(to + (4 + j) * to_step, _mm512_shuffle_f32x4(odd_upper, odd_lower, 0x88));
        _mm512_storeu_ps(to + (8 + j) * to_step, _mm512_shuffle_f32x4(even_upper, even_lower, 0xdd));
        _mm512_storeu_ps(to + (12 + j) * to_step, _mm512_shuffle_f32x4(odd_upper, odd_lower, 0xdd));
    }
}
#endif

// LANES rows, `step` apart, as columns.
void give_columns(const float* rows, int64_t step, int64_t size, float* columns, int64_t width) {
    int64_t d = 0;
#if defined(__AVX512F__)
    for (; d + LANES <= size; d += LANES) transpose(rows + d, step, columns + d * width, width);
#endif
    for (; d < size; d++)
        for (int c = 0; c < LANES; c++) columns[d * width + c] = rows[c * step + d];
}

// `rows` has room for LANES rows of `step` units.
template <class T, class C>
void fill_panel(const Columns& columns, int first, Panel& panel, float* rows, int64_t step) {
    const Attention& a = columns.a;
    int width = panel.vecs * LANES, count = std::min(width, columns.count() - first);
    int64_t depth = (a.head_dim + PACK<C> - 1) / PACK<C>;
    std::fill(rows, rows + LANES * step, 0.0f);
    if (count < width) std::fill(panel.queries, panel.queries + depth * width, 0.0f);
    panel.all_from = panel.some_to = 0;
    panel.all_to = panel.some_from = INT_MAX;
    for (int c = 0; c < width; c++) {
        panel.maxima[c] = LOWEST;
        panel.totals[c] = 0;
        if (c >= count) {
            panel.from[c] = 0;
            panel.to[c] = INT_MAX;
            continue;
        }
        columns.visible(first + c, panel.from[c], panel.to[c]);
        panel.all_from = std::max(panel.all_from, panel.from[c]);
        panel.some_from = std::min(panel.some_from, panel.from[c]);
        panel.all_to = std::min(panel.all_to, panel.to[c]);
        panel.some_to = std::max(panel.some_to, panel.to[c]);
        const T* q = static_cast<const T*>(a.q) + columns.token(first + c) * a.q_token + columns.head(first + c, columns.item.head) * a.q_head;
        convert(q, a.head_dim, reinterpret_cast<C*>(rows + c % LANES * step), step * PACK<C>);
        if (c % LANES == LANES - 1 || c == count - 1) give_columns(rows, step, depth, panel.queries + c / LANES * LANES, width);
    }
}

template <class C, int VECS>
void compute_panel(
    const Panel& panel, const Scores& to_scores, bool scaled, const C* keys, int64_t k_size, int64_t depth,
    const uint32_t* values, int64_t tile_size, int64_t size, int32_t begin, int num_keys, const float* key_scales,
    const float* value_scales, float* scores, float* weights, Ahead& ahead
) {
    constexpr int WIDTH = VECS * LANES;
    alignas(64) float factors[WIDTH];
    bool masked = panel.all_from > begin || panel.all_to < begin + num_keys;
    multiply_panel<C, VECS>(keys, k_size / PACK<C>, panel.queries, depth, num_keys, scores, ahead);
    for (int v = 0; v < VECS; v++) {
        int at = v * LANES;
        auto softened = [&](auto masks, auto plain, auto scales) {
            return soften<C, decltype(masks)::value, decltype(plain)::value, decltype(scales)::value>(
                to_scores, scores + at, WIDTH, num_keys, begin, key_scales, value_scales, panel.from + at, panel.to + at,
                weights + at, panel.maxima + at, panel.totals + at);
        };
        std::true_type yes;
        std::false_type no;
        vec factor;
        if (scaled) factor = masked ? softened(yes, no, yes) : softened(no, no, yes);
        else if (to_scores.plain) factor = masked ? softened(yes, yes, no) : softened(no, yes, no);
        else factor = masked ? softened(yes, no, no) : softened(no, no, no);
        store(factors + at, factor);
    }
    add_panel<C, VECS>(values, tile_size, weights, (num_keys + PACK<C> - 1) / PACK<C>, factors, size, panel.weighted);
}

// Rows of LANES columns, `step` apart.
void take_columns(const float* weighted, int64_t width, int64_t size, float* rows, int64_t step) {
    int64_t d = 0;
#if defined(__AVX512F__)
    for (; d + LANES <= size; d += LANES) transpose(weighted + d * width, width, rows + d, step);
#endif
    for (; d < size; d++)
        for (int c = 0; c < LANES; c++) rows[c * step + d] = weighted[d * width + c];
}

// `rows` has room for LANES rows of `step` numbers.
template <class T>
void finish_panel(
    const Columns& columns, int first, const Panel& panel, const Partials& partials, float* rows, int64_t step
) {
    const Attention& a = columns.a;
    int width = panel.vecs * LANES, count = std::min(width, columns.count() - first);
    for (int c = 0; c < count; c++) {
        if (c % LANES == 0) take_columns(panel.weighted + c, width, a.v_head_dim, rows, step);
        const float* row = rows + c % LANES * step;
        int64_t token = columns.token(first + c), head = columns.head(first + c, columns.item.head), partial = columns.partial(first + c);
        if (partial < 0) finish<T>(a, token, head, row, panel.maxima[c], panel.totals[c]);
        else leave_partial(a, partials.at(partial, head), partials.size, row, panel.maxima[c], panel.totals[c]);
    }
}

template <class T, class S>
void run_wide(const Attention& a, const Step& step, const Item& item, const Partials& partials) {
    using C = Computed<T>;
    constexpr bool CONVERTS = std::is_same<S, int8_t>::value;
    const Columns columns{a, step, item};
    int vecs = (columns.count() + LANES - 1) / LANES, num_panels = (vecs + PANEL_VECS - 1) / PANEL_VECS;
    int64_t k_size = round_up(a.head_dim, STEP<C>), v_size = round_up(a.v_head_dim, STEP<C>);
    int64_t depth = (a.head_dim + PACK<C> - 1) / PACK<C>, size = round_up(a.v_head_dim, TILE_ROWS);
    int64_t width = PANEL_VECS * LANES;
    scratch.reserve(Arena::bytes<C>(WIDE_KEYS * k_size) + Arena::bytes<C>(2 * v_size) + Arena::bytes<float>(LANES * std::max(k_size, v_size)) +
                    Arena::bytes<uint32_t>(WIDE_KEYS / PACK<C> * v_size) + 2 * Arena::bytes<float>(WIDE_KEYS * width) +
                    2 * Arena::bytes<float>(WIDE_KEYS) + Arena::bytes<int64_t>(2 * WIDE_KEYS) +
                    size_t(num_panels) * (Arena::bytes<float>(depth * width) + Arena::bytes<float>(size * width) +
                                          4 * Arena::bytes<float>(width)));
    C* keys = scratch.take<C>(WIDE_KEYS * k_size);
    C* value_rows = scratch.take<C>(2 * v_size);
    float* rows = scratch.take<float>(LANES * std::max(k_size, v_size));
    uint32_t* values = scratch.take<uint32_t>(WIDE_KEYS / PACK<C> * v_size);
    float* scores = scratch.take<float>(WIDE_KEYS * width);
    float* weights = scratch.take<float>(WIDE_KEYS * width);
    float* key_scales = scratch.take<float>(WIDE_KEYS);
    float* value_scales = scratch.take<float>(WIDE_KEYS);
    int64_t* slots = scratch.take<int64_t>(2 * WIDE_KEYS);
    Panel panels[WIDE_COLUMNS];
    int firsts[WIDE_COLUMNS];
    for (int p = 0, first = 0; p < num_panels; p++) {
        Panel& panel = panels[p];
        panel.vecs = vecs / num_panels + (p < vecs % num_panels);
        panel.queries = scratch.take<float>(depth * width);
        panel.weighted = scratch.take<float>(size * width);
        panel.maxima = scratch.take<float>(width);
        panel.totals = scratch.take<float>(width);
        panel.from = scratch.take<int32_t>(width);
        panel.to = scratch.take<int32_t>(width);
        std::fill(panel.weighted, panel.weighted + size * panel.vecs * LANES, 0.0f);
        fill_panel<T, C>(columns, first, panel, rows, k_size / PACK<C>);
        firsts[p] = first;
        first += panel.vecs * LANES;
    }
    const Scores to_scores(a);
    const S* key_base = static_cast<const S*>(a.keys) + item.head * a.key_head;
    const S* value_base = static_cast<const S*>(a.values) + item.head * a.value_head;
    int64_t* next_slots = slots + WIDE_KEYS;
    int count = std::min(WIDE_KEYS, item.end - item.begin);
    find_slots(a, item.table, item.begin, count, slots);
    Ahead ahead{reinterpret_cast<const char*>(key_base), reinterpret_cast<const char*>(value_base),
                a.key_slot * int64_t(sizeof(S)), a.value_slot * int64_t(sizeof(S)),
                a.head_dim * int64_t(sizeof(S)), a.v_head_dim * int64_t(sizeof(S)), slots, count, count};
    ahead.ask();
    for (int32_t begin = item.begin; begin < item.end; begin += WIDE_KEYS) {
        int next_count = std::max(0, std::min(WIDE_KEYS, item.end - begin - WIDE_KEYS));
        find_slots(a, item.table, begin + WIDE_KEYS, next_count, next_slots);
        ahead.slots = next_slots, ahead.count = next_count, ahead.next = 0;
        ahead.at_a_time = (TILE_ROWS * next_count + WIDE_KEYS * num_panels - 1) / (WIDE_KEYS * num_panels);
        for (int j = 0; j < count; j++) {
            convert(key_base + slots[j] * a.key_slot, a.head_dim, keys + j * k_size, k_size);
            if (CONVERTS) {
                key_scales[j] = a.key_scales[slots[j] * a.num_kv_heads + item.head];
                value_scales[j] = a.value_scales[slots[j] * a.num_kv_heads + item.head];
            }
        }
        pack_values(value_base, a.value_slot, slots, count, a.v_head_dim, v_size, value_rows, values);
        for (int p = 0; p < num_panels; p++) {
            const Panel& panel = panels[p];
            if (panel.some_to <= begin || panel.some_from >= begin + count) continue;
            auto compute = [&](auto vecs_of) {
                compute_panel<C, decltype(vecs_of)::value>(
                    panel, to_scores, CONVERTS, keys, k_size, depth, values, (count + PACK<C> - 1) / PACK<C> * TILE_ROWS, size,
                    begin, std::min(count, panel.some_to - begin), key_scales, value_scales, scores, weights, ahead);
            };
            if (panel.vecs == 1) compute(std::integral_constant<int, 1>());
            if (panel.vecs == 2) compute(std::integral_constant<int, 2>());
            if (panel.vecs == 3) compute(std::integral_constant<int, 3>());
        }
        std::swap(slots, next_slots);
        count = next_count;
    }
    for (int p = 0; p < num_panels; p++) finish_panel<T>(columns, firsts[p], panels[p], partials, rows, v_size);
}

// ---- a step

constexpr int64_t WORTH_THREADS = 1 << 14;  // query-key pairs; fewer are done sooner than threads have begun

template <class T, class S>
void attend(const Attention& a) {
    static thread_local Step step;
    static thread_local Arena memory;
    plan(a, step);
    Partials partials{nullptr, round_up(a.v_head_dim, LANES) + LANES, a.num_heads};
    int64_t floats = step.total_partials * a.num_heads * partials.size;
    memory.reserve(Arena::bytes<float>(floats));
    partials.base = memory.take<float>(floats);
    const Step& todo = step;  // the thread's own; others read it
    int64_t num_items = int64_t(todo.items.size());
#pragma omp parallel for schedule(dynamic, 1) if (todo.total_cost > WORTH_THREADS && num_items > 1)
    for (int64_t i = 0; i < num_items; i++) {
        const Item& item = todo.items[size_t(i)];
        if (item.kind == NARROW) run_narrow<T, S>(a, todo, item, partials);
        else run_wide<T, S>(a, todo, item, partials);
    }
    if (todo.total_partials == 0) return;
    int64_t pairs = a.num_rows * a.num_heads;
#pragma omp parallel for schedule(static) if (floats > WORTH_THREADS)
    for (int64_t i = 0; i < pairs; i++) {
        size_t row = size_t(i / a.num_heads);
        if (todo.num_partials[row] > 1)
            merge<T>(a, partials, todo.tokens[row], todo.first_partial[row], todo.num_partials[row], i % a.num_heads);
    }
}

// ---- writing

// One row of the cache: the same numbers, or int8 with the factor that makes numbers of them.
template <class T, class S>
INLINE void write_row(const T* from, int64_t size, S* to, float*) {
    if constexpr (std::is_same<T, S>::value) std::memcpy(to, from, size_t(size) * sizeof(T));
    else {
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) store(to + i, load(from + i));
        for (; i < size; i++) to[i] = from_float<S>(to_float(from[i]));
    }
}

template <class T>
INLINE void write_row(const T* from, int64_t size, int8_t* to, float* scale) {
    float largest_of = 0, broken = 0;
    for (int64_t i = 0; i < size; i++) {
        float x = to_float(from[i]);
        largest_of = std::max(largest_of, std::fabs(x));
        broken += x * 0.0f;  // NaN of what is no number
    }
    *scale = largest_of / 127.0f + broken;
    float factor = largest_of > 0 ? 127.0f / largest_of : 0.0f;
    for (int64_t i = 0; i < size; i++) to[i] = int8_t(std::nearbyint(std::min(127.0f, std::max(-127.0f, to_float(from[i]) * factor))));
}

template <class T, class S>
void write(const Write& w) {
    int64_t numbers = w.num_tokens * w.num_kv_heads * (w.head_dim + (w.v ? w.v_head_dim : 0));
#pragma omp parallel for schedule(static) if (numbers > 1 << 17)
    for (int64_t t = 0; t < w.num_tokens; t++) {
        for (int64_t head = 0; head < w.num_kv_heads; head++) {
            int64_t at = w.slots[t] * w.num_kv_heads + head;
            const T* k = static_cast<const T*>(w.k) + t * w.k_token + head * w.k_head;
            write_row(k, w.head_dim, static_cast<S*>(w.keys) + at * w.head_dim, w.key_scales + at);
            if (!w.v) continue;
            const T* v = static_cast<const T*>(w.v) + t * w.v_token + head * w.v_head;
            write_row(v, w.v_head_dim, static_cast<S*>(w.values) + at * w.v_head_dim, w.value_scales + at);
        }
    }
}

}  // namespace

// Both return false where there is no code for the pair of types.
KERNEL bool paged_attention(const Attention* a) {
    if (a->activations == 0 && a->stored == 0) attend<float, float>(*a);
    else if (a->activations == 0 && a->stored == 1) attend<float, bf16>(*a);
    else if (a->activations == 0 && a->stored == 2) attend<float, int8_t>(*a);
    else if (a->activations == 1 && a->stored == 1) attend<bf16, bf16>(*a);
    else if (a->activations == 1 && a->stored == 2) attend<bf16, int8_t>(*a);
    else return false;
    return true;
}

KERNEL bool write_kv(const Write* w) {
    if (w->activations == 0 && w->stored == 0) write<float, float>(*w);
    else if (w->activations == 0 && w->stored == 1) write<float, bf16>(*w);
    else if (w->activations == 0 && w->stored == 2) write<float, int8_t>(*w);
    else if (w->activations == 1 && w->stored == 1) write<bf16, bf16>(*w);
    else if (w->activations == 1 && w->stored == 2) write<bf16, int8_t>(*w);
    else return false;
    return true;
}
