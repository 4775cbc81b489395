// Linear attention whose state, a matrix [k_dim, v_dim] for each head, is kept from step to step: the gated delta rule,
// with decays of heads or of channels, and the same without the rule (lightning attention, Mamba 2).
//
// In a prompt, a token costs one pass over the matrix: S = decay * S + k * d, where d is its value, or with the delta
// rule beta * (v - what S has for k). In the same pass the result, S * q, and what S has for the next token's k are
// summed up. Columns of the matrix do not depend on each other: a few of them stay in the first-level cache for a block
// of tokens, so that the matrix goes through memory once for each block. Matrix products of a chunk of tokens would
// need as many multiplications in float32 as this, within a quarter.
//
// A token by itself reads the matrix in the order of memory, a few rows at a time, and asks for the matrix of the next
// head meanwhile.
#include <algorithm>
#include <memory>
#include <type_traits>

#include "common.h"

constexpr int VECTORS = 2;  // of columns that are computed together
constexpr int COLUMNS = VECTORS * LANES;
constexpr int BLOCK = 16;                   // tokens whose queries and keys are prepared together
constexpr int WIDTH = 4;                    // vectors of a row that a token by itself takes together
constexpr int ROWS = 8;                     // of the matrix, likewise
constexpr int AHEAD = 2 * ROWS;             // distance of the prefetch
constexpr int64_t MOST_HEADS = 8;           // that a thread takes at a time
constexpr int64_t WORTH_THREADS = 1 << 16;  // elements of matrices times tokens

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

// What a block of tokens needs of a head besides its values; k_dim numbers for each token.
struct Prepared {
    float *q, *k, *seen;  // seen: keys times the decay before them, which read the matrix of the token before
    float* decays;        // of channels
    float decay[BLOCK], write[BLOCK];  // of the head; beta, or the factor of values
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

// One token's pass over some columns: `from` and `to` have strides of their own. `next`: keys of the next token.
template <Kind KIND, bool HAS_NEXT, bool WHOLE_TO>
static INLINE void pass(const Prepared& block, int64_t t, const float* tile, float* to, int64_t to_stride,
                        int64_t columns, const vec* written, vec* result, vec* memory) {
    constexpr bool IS_DELTA = KIND == DELTA || KIND == DELTA_OF_CHANNELS;
    const int64_t k_dim = block.k_dim;
    const float *q = block.q + t * k_dim, *k = block.k + t * k_dim, *next = block.seen + (t + 1) * k_dim;
    const float* decays = block.decays + t * k_dim;
    vec sum_q[VECTORS] = {}, sum_k[VECTORS] = {};
    for (int64_t r = 0; r < k_dim; r++) {
        vec s[VECTORS];
        load_columns<true>(tile + r * COLUMNS, COLUMNS, s);
        const float decay = KIND == DELTA_OF_CHANNELS ? decays[r] : block.decay[t];
        for (int j = 0; j < VECTORS; j++) {
            s[j] = s[j] * decay + written[j] * k[r];
            sum_q[j] += s[j] * q[r];
            if (IS_DELTA && HAS_NEXT) sum_k[j] += s[j] * next[r];
        }
        store_columns<WHOLE_TO>(to + r * to_stride, columns, s);
    }
    for (int j = 0; j < VECTORS; j++) result[j] = sum_q[j], memory[j] = sum_k[j];
}

// A block of tokens, for `columns` columns that begin at the pointers.
template <class T, Kind KIND, bool WHOLE>
static void run_columns(const Prepared& block, const float* from, float* to, int64_t stride, int64_t columns,
                        float* tile, const Heads<T>& v, const T* values, T* out, int64_t out_stride, float skip) {
    constexpr bool IS_DELTA = KIND == DELTA || KIND == DELTA_OF_CHANNELS;
    vec memory[VECTORS] = {};
    for (int64_t r = 0; r < block.k_dim; r++) {
        vec s[VECTORS];
        load_columns<WHOLE>(from + r * stride, columns, s);
        store_columns<true>(tile + r * COLUMNS, COLUMNS, s);
        if (IS_DELTA) {
            for (int j = 0; j < VECTORS; j++) memory[j] += s[j] * block.seen[r];
        }
    }
    for (int64_t t = 0; t < block.count; t++) {
        vec value[VECTORS], written[VECTORS], result[VECTORS];
        load_columns<WHOLE>(values + t * v.token_stride, columns, value);
        for (int j = 0; j < VECTORS; j++) written[j] = (IS_DELTA ? value[j] - memory[j] : value[j]) * block.write[t];
        if (t + 1 < block.count) {
            pass<KIND, true, true>(block, t, tile, tile, COLUMNS, COLUMNS, written, result, memory);
        } else {
            pass<KIND, false, WHOLE>(block, t, tile, to, stride, columns, written, result, memory);
        }
        if (KIND == MAMBA2) {
            for (int j = 0; j < VECTORS; j++) result[j] += value[j] * skip;
        }
        store_columns<WHOLE>(out + t * out_stride, columns, result);
    }
}

// ---- a token by itself

template <int VALUE>
using Constant = std::integral_constant<int, VALUE>;

// body(first column, vectors as a constant, whether they are whole as a constant, columns).
template <class F>
static INLINE void by_columns(int64_t columns, F body) {
    int64_t c = 0;
    for (; c + WIDTH * LANES <= columns; c += WIDTH * LANES)
        body(c, Constant<WIDTH>{}, std::true_type{}, WIDTH * LANES);
    for (; c + LANES <= columns; c += LANES) body(c, Constant<1>{}, std::true_type{}, LANES);
    if (c < columns) body(c, Constant<1>{}, std::false_type{}, columns - c);
}

// Some columns of a head's matrix, rows `stride` apart, and of the matrix that this thread computes next, or null.
struct Matrix {
    const float *from, *next;
    float* to;
    int64_t rows, columns, stride;

    // body(first row, end) for a few rows at a time; meanwhile asks for as many of `count` rows that begin at `needed`.
    template <class F>
    INLINE void by_rows(const float* needed, int64_t count, F body) const {
        for (int64_t first = 0; first < rows; first += ROWS) {
            const int64_t end = std::min(first + ROWS, rows);
            for (int64_t r = first; r < std::min(end, count); r++)
                for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(needed + r * stride + c, 1, 2);
            body(first, end);
        }
    }
};

// sums [columns, rounded up to vectors] = what the matrix has for a key.
static void recall(const Matrix& matrix, const float* key, float* sums) {
    matrix.by_rows(matrix.from + AHEAD * matrix.stride, matrix.rows - AHEAD, [&](int64_t first, int64_t end) {
        by_columns(matrix.columns, [&](int64_t c, auto vectors, auto whole, int64_t columns) {
            vec total[vectors] = {};
            if (first > 0) load_columns<true>(sums + c, columns, total);
            for (int64_t r = first; r < end; r++) {
                vec s[vectors];
                load_columns<whole>(matrix.from + r * matrix.stride + c, columns, s);
                for (int j = 0; j < vectors; j++) total[j] += s[j] * key[r];
            }
            store_columns<true>(sums + c, columns, total);
        });
    });
}

// S = decay * S + k * written; sums = S * q. `written` and `sums`: [columns, rounded up to vectors].
template <Kind KIND>
static void update(const Prepared& block, const Matrix& matrix, const float* written, float* sums) {
    matrix.by_rows(matrix.next, matrix.next ? matrix.rows : 0, [&](int64_t first, int64_t end) {
        by_columns(matrix.columns, [&](int64_t c, auto vectors, auto whole, int64_t columns) {
            vec total[vectors] = {}, d[vectors];
            if (first > 0) load_columns<true>(sums + c, columns, total);
            load_columns<true>(written + c, columns, d);
            for (int64_t r = first; r < end; r++) {
                const float decay = KIND == DELTA_OF_CHANNELS ? block.decays[r] : block.decay[0];
                vec s[vectors];
                load_columns<whole>(matrix.from + r * matrix.stride + c, columns, s);
                for (int j = 0; j < vectors; j++) {
                    s[j] = s[j] * decay + d[j] * block.k[r];
                    total[j] += s[j] * block.q[r];
                }
                store_columns<whole>(matrix.to + r * matrix.stride + c, columns, s);
            }
            store_columns<true>(sums + c, columns, total);
        });
    });
}

// memory: [2 * columns, rounded up to vectors].
template <class T, Kind KIND>
static void run_token(const Prepared& block, const Matrix& matrix, const T* values, T* out, float skip, float* memory) {
    constexpr bool IS_DELTA = KIND == DELTA || KIND == DELTA_OF_CHANNELS;
    float *sums = memory, *written = memory + (matrix.columns + LANES - 1) / LANES * LANES;
    if (IS_DELTA) recall(matrix, block.seen, sums);
    by_columns(matrix.columns, [&](int64_t c, auto vectors, auto whole, int64_t columns) {
        vec value[vectors], known[vectors] = {};
        load_columns<whole>(values + c, columns, value);
        if (IS_DELTA) load_columns<true>(sums + c, columns, known);
        for (int j = 0; j < vectors; j++) value[j] = (value[j] - known[j]) * block.write[0];
        store_columns<true>(written + c, columns, value);
    });
    update<KIND>(block, matrix, written, sums);
    by_columns(matrix.columns, [&](int64_t c, auto vectors, auto whole, int64_t columns) {
        vec value[vectors], result[vectors];
        load_columns<true>(sums + c, columns, result);
        if (KIND == MAMBA2) {
            load_columns<whole>(values + c, columns, value);
            for (int j = 0; j < vectors; j++) result[j] += value[j] * skip;
        }
        store_columns<whole>(out + c, columns, result);
    });
}

// ---- what tokens need of a head

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
static void prepare(const Step<T>& step, int64_t token, int64_t count, int64_t head, Prepared& block) {
    const int64_t k_dim = step.k_dim, k_head = head / (step.v_heads / step.k_heads);
    constexpr bool IS_DELTA = KIND == DELTA || KIND == DELTA_OF_CHANNELS;
    const float scale = IS_DELTA ? 1.0f / std::sqrt(float(k_dim)) : 1.0f;
    block.count = count;
    for (int64_t t = 0; t < count; t++) {
        float* k = block.k + t * k_dim;
        prepare_vector(step.q.at(token + t, k_head), k_dim, step.normalize, scale, block.q + t * k_dim);
        prepare_vector(step.k.at(token + t, k_head), k_dim, step.normalize, 1.0f, k);
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
        const int64_t place = (token + t) * step.v_heads + head;
        if (KIND == DELTA) {
            block.decay[t] = std::exp(step.g[place]);
            for (int64_t i = 0; i < k_dim; i++) block.seen[t * k_dim + i] = k[i] * block.decay[t];
        }
        if (KIND == DELTA_OF_CHANNELS) {
            float* decays = block.decays + t * k_dim;
            int64_t i = 0;
            for (; i + LANES <= k_dim; i += LANES) store(decays + i, exp(load(step.g + place * k_dim + i)));
            for (; i < k_dim; i++) decays[i] = std::exp(step.g[place * k_dim + i]);
            for (i = 0; i < k_dim; i++) block.seen[t * k_dim + i] = k[i] * decays[i];
        }
    }
}

// Some columns of a head's matrix, for the tokens of a piece.
struct Task {
    int64_t piece, head, first_column, end_column;
};

template <class T>
static INLINE float* matrix_of(const Step<T>& step, const int64_t* slots, const Task& task) {
    return step.states + (slots[task.piece] * step.v_heads + task.head) * step.k_dim * step.v_dim + task.first_column;
}

// next: the task that this thread does afterwards, or null.
template <class T, Kind KIND>
static void run_task(const Step<T>& step, const Task& task, const Task* next, Prepared& block, float* tile) {
    const int64_t begin = step.bounds ? step.bounds[task.piece] : task.piece, head = task.head;
    const int64_t end = step.bounds ? step.bounds[task.piece + 1] : task.piece + 1;
    const float* from = matrix_of(step, step.load, task);
    float* to = matrix_of(step, step.store, task);
    const float skip = KIND == MAMBA2 && step.d ? step.d[head] : 0.0f;
    const int64_t width = task.end_column - task.first_column, out_stride = step.v_heads * step.v_dim;
    T* out = step.out + (begin * step.v_heads + head) * step.v_dim + task.first_column;
    if (end - begin == 1) {
        prepare<T, KIND>(step, begin, 1, head, block);
        const float* following = next ? matrix_of(step, step.load, *next) : nullptr;
        const Matrix matrix{from, following, to, step.k_dim, width, step.v_dim};
        run_token<T, KIND>(block, matrix, step.v.at(begin, head) + task.first_column, out, skip, tile);
        return;
    }
    for (int64_t token = begin; token < end; token += BLOCK, out += BLOCK * out_stride) {
        prepare<T, KIND>(step, token, std::min<int64_t>(BLOCK, end - token), head, block);
        const T* values = step.v.at(token, head) + task.first_column;
        for (int64_t c = 0; c < width; c += COLUMNS) {
            const int64_t columns = std::min<int64_t>(COLUMNS, width - c);
            auto run = columns == COLUMNS ? run_columns<T, KIND, true> : run_columns<T, KIND, false>;
            run(block, from + c, to + c, step.v_dim, columns, tile, step.v, values + c, out + c, out_stride, skip);
        }
        from = to;
    }
}

template <class T, Kind KIND>
static void run(const Step<T>& step, int64_t tokens) {
    const int64_t heads = step.pieces * step.v_heads, strips = (step.v_dim + COLUMNS - 1) / COLUMNS;
    const bool is_small = tokens * step.v_heads * step.k_dim * step.v_dim < WORTH_THREADS;
    const int64_t threads = is_small ? 1 : omp_get_max_threads();
    const int64_t parts = std::min(strips, std::max<int64_t>(1, 2 * threads / std::max<int64_t>(heads, 1)));
    const int64_t columns = (strips + parts - 1) / parts * COLUMNS, tasks = heads * parts;
    const int64_t together = std::min(MOST_HEADS, std::max<int64_t>(1, tasks / (4 * threads)));
    auto task_of = [&](int64_t number) {
        const int64_t first = number % parts * columns, end = std::min(first + columns, step.v_dim);
        return Task{number / parts / step.v_heads, number / parts % step.v_heads, first, end};
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t rows = BLOCK * step.k_dim, tile_size = std::max(step.k_dim * COLUMNS, 2 * (step.v_dim + LANES));
        std::unique_ptr<float[]> memory(new float[4 * rows + tile_size + 16]);
        float* tile = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / 4;
        float* after = tile + tile_size;
        Prepared block{after, after + rows, after + 2 * rows, after + 3 * rows, {}, {}, 0, step.k_dim};
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < tasks; first += together) {
            const int64_t end = std::min(first + together, tasks);
            for (int64_t number = first; number < end; number++) {
                const Task task = task_of(number), next = task_of(number + 1);
                if (task.first_column >= task.end_column) continue;
                run_task<T, KIND>(step, task, number + 1 < end ? &next : nullptr, block, tile);
            }
        }
    }
}

#define EXPORT_DELTA_RULE(name, T)                                                                                   \
    KERNEL void name(const T* q, int64_t q_token, int64_t q_head, const T* k, int64_t k_token, int64_t k_head,       \
                     const T* v, int64_t v_token, int64_t v_head, const float* g, bool of_channels, const T* beta,   \
                     int64_t beta_token, float* states, const int64_t* load, const int64_t* store,                   \
                     const int64_t* bounds, int64_t pieces, int64_t tokens, int64_t k_heads, int64_t v_heads,        \
                     int64_t k_dim, int64_t v_dim, bool normalize, T* out) {                                         \
        Step<T> step{{q, q_token, q_head}, {k, k_token, k_head}, {v, v_token, v_head}, g, {beta, beta_token, 1},     \
                     nullptr, nullptr, nullptr, 0, 0, states, load, store, bounds, pieces, k_heads, v_heads, k_dim,  \
                     v_dim, normalize, out};                                                                         \
        if (of_channels) run<T, DELTA_OF_CHANNELS>(step, tokens);                                                    \
        else run<T, DELTA>(step, tokens);                                                                            \
    }
EXPORT_DELTA_RULE(gated_delta_rule_f32, float)
EXPORT_DELTA_RULE(gated_delta_rule_bf16, bf16)

#define EXPORT_LINEAR(name, T)                                                                                       \
    KERNEL void name(const T* q, int64_t q_token, int64_t q_head, const T* k, int64_t k_token, int64_t k_head,       \
                     const T* v, int64_t v_token, int64_t v_head, const float* log_decay, float* states,             \
                     const int64_t* load, const int64_t* store, const int64_t* bounds, int64_t pieces,               \
                     int64_t tokens, int64_t heads, int64_t k_dim, int64_t v_dim, T* out) {                          \
        Step<T> step{{q, q_token, q_head}, {k, k_token, k_head}, {v, v_token, v_head}, log_decay, {}, nullptr,       \
                     nullptr, nullptr, 0, 0, states, load, store, bounds, pieces, heads, heads, k_dim, v_dim,        \
                     false, out};                                                                                    \
        run<T, LINEAR>(step, tokens);                                                                                \
    }
EXPORT_LINEAR(linear_attention_f32, float)
EXPORT_LINEAR(linear_attention_bf16, bf16)

#define EXPORT_SSD(name, T)                                                                                          \
    KERNEL void name(const T* x, int64_t x_token, int64_t x_head, const T* dt, int64_t dt_token, const float* a,     \
                     const T* b, int64_t b_token, int64_t b_group, const T* c, int64_t c_token, int64_t c_group,     \
                     const float* d, const float* dt_bias, float dt_least, float dt_most, float* states,             \
                     const int64_t* load, const int64_t* store, const int64_t* bounds, int64_t pieces,               \
                     int64_t tokens, int64_t groups, int64_t heads, int64_t state_size, int64_t head_dim, T* out) {  \
        Step<T> step{{c, c_token, c_group}, {b, b_token, b_group}, {x, x_token, x_head}, nullptr,                    \
                     {dt, dt_token, 1}, a, d, dt_bias, dt_least, dt_most, states, load, store, bounds, pieces,       \
                     groups, heads, state_size, head_dim, false, out};                                               \
        run<T, MAMBA2>(step, tokens);                                                                                \
    }
EXPORT_SSD(ssd_f32, float)
EXPORT_SSD(ssd_bf16, bf16)
