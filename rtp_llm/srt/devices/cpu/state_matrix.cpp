// Linear attention whose state, a matrix [k_dim, v_dim] for each head, is kept from step to step: the gated delta rule,
// with decays of heads or of channels, and the same without the rule (lightning attention, Mamba 2).
//
// For a token S = decay * S + k * d, where d is its value, or with the delta rule beta * (v - what S has for k); the
// result is S * q.
#include <memory>
#include <utility>

#include "replay.h"
#include "state_matrix_chunk.h"
#include "state_matrix_token.h"

constexpr int64_t MOST_TASKS = 8;           // that a thread takes at a time
constexpr int64_t WORTH_THREADS = 1 << 16;  // elements of matrices times tokens

// A thread's memory: of single tokens, or of blocks.
struct Memory {
    std::unique_ptr<float[]> floats;
    float* columns;  // of the matrix
    Tokens token;
    Block blocks[BLOCKS];

    Memory(int64_t k_dim, int64_t v_dim, bool has_blocks) {
        const int64_t size = has_blocks ? floats_of_block(k_dim) : 3 * k_dim + 32, count = has_blocks ? BLOCKS : 1;
        const int64_t of_columns = std::max((k_dim + BLOCK) * COLUMNS, 2 * (v_dim + LANES) + k_dim);
        floats.reset(new float[count * size + of_columns + 16]);
        float* next = floats.get() + (64 - reinterpret_cast<uintptr_t>(floats.get()) % 64) % 64 / 4;
        for (int64_t i = 0; has_blocks && i < count; i++) place_block(next + i * size, k_dim, blocks[i]);
        float* rows = next + 32;
        token = has_blocks ? blocks[0].tokens : Tokens{rows, rows + k_dim, rows + 2 * k_dim, next, next + 16, 1, k_dim};
        token.count = 1;
        columns = next + count * size;
    }
};

// Some columns of the matrices of some heads that share keys, for the tokens of a piece.
struct Task {
    int64_t piece, head, end_head, first_column, end_column;
};

template <class T>
static INLINE float* matrix_of(const Step<T>& step, const int64_t* slots, const Task& task, int64_t head) {
    return step.states + (slots[task.piece] * step.v_heads + head) * step.k_dim * step.v_dim + task.first_column;
}

// next: the task that this thread does afterwards, or null.
template <class T, Kind KIND>
static void run_token(const Step<T>& step, const Task& task, const Task* next, int64_t token, Memory& memory) {
    prepare_keys<T, KIND>(step, token, task.head / (step.v_heads / step.k_heads), memory.token);
    for (int64_t head = task.head; head < task.end_head; head++) {
        prepare_decays<T, KIND>(step, token, head, memory.token);
        const float* following = next ? matrix_of(step, step.load, *next, next->head) : nullptr;
        if (head + 1 < task.end_head) following = matrix_of(step, step.load, task, head + 1);
        const Matrix matrix{matrix_of(step, step.load, task, head), following, matrix_of(step, step.store, task, head),
                            step.k_dim, task.end_column - task.first_column, step.v_dim};
        run_token<T, KIND>(memory.token, matrix, step.v.at(token, head) + task.first_column,
                           step.out + (token * step.v_heads + head) * step.v_dim + task.first_column,
                           KIND == MAMBA2 && step.d ? step.d[head] : 0.0f, memory.columns);
    }
}

// Asks for queries, keys and values of tokens that are computed next: they lie far apart.
template <class T>
static void ask_for(const Step<T>& step, const Task& task, int64_t token, int64_t end) {
    auto ask = [](const T* x, int64_t size) {
        for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + i, 0, 2);
    };
    const int64_t k_head = task.head / (step.v_heads / step.k_heads);
    for (; token < end; token++) {
        ask(step.q.at(token, k_head), step.k_dim);
        ask(step.k.at(token, k_head), step.k_dim);
        ask(step.v.at(token, task.head) + task.first_column, task.end_column - task.first_column);
    }
}

// Tokens [begin, end) of a piece that begins with `first`, not more than fit into the thread's blocks.
template <class T, Kind KIND>
static void run_blocks(const Step<T>& step, const Task& task, int64_t first, int64_t begin, int64_t end,
                       Memory& memory) {
    const int64_t count = (end - begin + BLOCK - 1) / BLOCK, out_stride = step.v_heads * step.v_dim;
    const int64_t* slots = begin == first ? step.load : step.store;
    for (int64_t head = task.head; head < task.end_head; head++) {
        for (int64_t i = 0; i < count; i++) {
            const int64_t token = begin + i * BLOCK, k_head = head / (step.v_heads / step.k_heads);
            // Decays of channels are multiplied into the keys, which are made anew for the next head.
            if (head == task.head || KIND == DELTA_OF_CHANNELS)
                prepare_keys<T, KIND>(step, token, std::min<int64_t>(BLOCK, end - token), k_head, memory.blocks[i]);
            prepare_head<T, KIND>(step, token, head, memory.blocks[i]);
        }
        const T* values = step.v.at(begin, head) + task.first_column;
        T* out = step.out + (begin * step.v_heads + head) * step.v_dim + task.first_column;
        const float* from = matrix_of(step, slots, task, head);
        float* to = matrix_of(step, step.store, task, head);
        for (int64_t c = 0; c < task.end_column - task.first_column; c += COLUMNS) {
            const int64_t columns = std::min<int64_t>(COLUMNS, task.end_column - task.first_column - c);
            auto run = columns == COLUMNS ? run_columns<T, KIND, true> : run_columns<T, KIND, false>;
            run(memory.blocks, count, from + c, to + c, step.v_dim, columns, step.v, values + c,
                KIND == MAMBA2 && step.d ? step.d[head] : 0.0f, out + c, out_stride, memory.columns);
        }
    }
}

template <class T, Kind KIND>
static void run_task(const Step<T>& step, const Task& task, const Task* next, Memory& memory) {
    const int64_t first = step.bounds ? step.bounds[task.piece] : task.piece;
    const int64_t end = step.bounds ? step.bounds[task.piece + 1] : task.piece + 1;
    if (end - first == 1) return run_token<T, KIND>(step, task, next, first, memory);
    for (int64_t begin = first; begin < end; begin += BLOCKS * BLOCK) {
        const int64_t until = std::min<int64_t>(begin + BLOCKS * BLOCK, end);
        ask_for(step, task, until, std::min<int64_t>(until + BLOCKS * BLOCK, end));
        run_blocks<T, KIND>(step, task, first, begin, until, memory);
    }
}

// The tasks of a step, in the order in which threads take them.
template <class T>
struct Tasks {
    const Step<T>& step;
    int64_t parts, columns, heads, runs, count;  // parts of columns; heads that share keys in a task, runs of them

    Tasks(const Step<T>& given, int64_t threads) : step(given) {
        const int64_t all = step.pieces * step.v_heads, strips = (step.v_dim + COLUMNS - 1) / COLUMNS;
        parts = std::min(strips, std::max<int64_t>(1, 2 * threads / std::max<int64_t>(all, 1)));
        columns = (strips + parts - 1) / parts * COLUMNS;
        const int64_t sharing = step.v_heads / step.k_heads;
        heads = std::min(sharing, std::max<int64_t>(1, all / (4 * threads)));
        runs = (sharing + heads - 1) / heads;
        count = step.pieces * step.k_heads * runs * parts;
    }

    Task task(int64_t number) const {
        const int64_t part = number % parts, run = number / parts % runs, k_head = number / parts / runs;
        const int64_t sharing = step.v_heads / step.k_heads, head = k_head % step.k_heads * sharing + run * heads;
        return {k_head / step.k_heads, head, std::min(head + heads, (k_head % step.k_heads + 1) * sharing),
                part * columns, std::min((part + 1) * columns, step.v_dim)};
    }
};

template <class T, Kind KIND>
static void run(const Step<T>& step, int64_t tokens) {
    const bool is_small = tokens * step.v_heads * step.k_dim * step.v_dim < WORTH_THREADS;
    const int64_t threads = is_small ? 1 : omp_get_max_threads();
    const Tasks<T> tasks(step, threads);
    const int64_t together = std::min(MOST_TASKS, std::max<int64_t>(1, tasks.count / (4 * threads)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Memory memory(step.k_dim, step.v_dim, step.bounds != nullptr);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < tasks.count; first += together) {
            const int64_t end = std::min(first + together, tasks.count);
            for (int64_t number = first; number < end; number++) {
                const Task task = tasks.task(number), next = tasks.task(number + 1);
                if (task.first_column < task.end_column)
                    run_task<T, KIND>(step, task, number + 1 < end ? &next : nullptr, memory);
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

REPLAYED(gated_delta_rule_f32)
REPLAYED(gated_delta_rule_bf16)
REPLAYED(linear_attention_f32)
REPLAYED(linear_attention_bf16)
REPLAYED(ssd_f32)
REPLAYED(ssd_bf16)
