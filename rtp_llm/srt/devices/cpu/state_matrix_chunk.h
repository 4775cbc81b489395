// Tokens of a prompt, block by block, as products of small matrices.
//
// With S the matrix before a block, p[t] the product of decays from its beginning through token t, and d[t] what token
// t writes, a result is q[t] * p[t] * S, plus the sum over tokens j up to t of (q[t] * k[j]) * p[t] / p[j] * d[j]. What
// is written is the token's value v[t], or with the delta rule beta * (v[t] - the same sum for k[t], of earlier j): a
// triangular system. After the block S is p[end] * S, plus the sum of p[end] / p[j] * k[j] * d[j]. All quotients are
// products of decays, at most 1: none is divided.
//
// Columns of S do not depend on each other: a few of them stay in the nearest cache for several blocks.
#pragma once

#include <utility>

#include "state_matrix_tokens.h"

constexpr int BLOCK = 16;           // tokens
constexpr int BLOCKS = 4;           // that are prepared together
constexpr int SPAN = BLOCK / LANES;  // vectors of a number of each token
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE = 8;  // rows of a product whose sums stay in registers
#else
constexpr int TILE = 4;
#endif
constexpr int SCORE_TILE = 8 / SPAN;

// What the columns of a block share. Tokens from `count` to the next multiple of TILE are zeros.
struct Block {
    // Of a key head.
    Tokens tokens;
    float* keys;                      // [k_dim, BLOCK], transposed
    float *known_raw, *scores_raw;  // [BLOCK, BLOCK]: keys and queries times keys
    // Of a head. Decays of channels are multiplied into the queries and keys above, and the factors here are 1.
    float *known, *scores;   // [BLOCK, BLOCK]: times p[t] / p[j], those of keys times -beta, too
    float *since, *to_end;  // [BLOCK]: p[t]; p[end] / p[j]
    float* kept;             // p[end] of channels
};

static int64_t floats_of_block(int64_t k_dim) { return (4 * BLOCK + 16) * k_dim + 4 * BLOCK * BLOCK + 4 * BLOCK; }

// memory: aligned, of the size above.
static void place_block(float* memory, int64_t k_dim, Block& block) {
    auto take = [&](int64_t count) { return std::exchange(memory, memory + count); };
    for (float** square : {&block.known_raw, &block.scores_raw, &block.known, &block.scores})
        *square = take(BLOCK * BLOCK);
    for (float** row : {&block.tokens.decay, &block.tokens.write, &block.since, &block.to_end}) *row = take(BLOCK);
    for (float** rows : {&block.keys, &block.tokens.q, &block.tokens.k, &block.tokens.decays})
        *rows = take(BLOCK * k_dim);
    block.kept = take(k_dim);
    block.tokens.k_dim = k_dim;
}

// sums[i] += the sum of factors[i * stride + r] * matrix[r] for r below `count`; rows of the matrix are V vectors.
template <int N, int V>
static INLINE void add_product(const float* factors, int64_t stride, const float* matrix, int64_t count,
                               vec (&sums)[N][V]) {
    for (int64_t r = 0; r < count; r++) {
        vec row[V];
        for (int j = 0; j < V; j++) row[j] = load(matrix + (r * V + j) * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            const float factor = factors[i * stride + r];
            for (int j = 0; j < V; j++) sums[i][j] += row[j] * factor;
        }
    }
}

// ---- what all columns share

// scores[t] = rows[t] * keys, for tokens up to the next multiple of TILE.
static void score(const float* rows, const Block& block, float* scores) {
    for (int64_t first = 0; first < block.tokens.count; first += SCORE_TILE) {
        vec sums[SCORE_TILE][SPAN] = {};
        add_product<SCORE_TILE, SPAN>(rows + first * block.tokens.k_dim, block.tokens.k_dim, block.keys,
                                      block.tokens.k_dim, sums);
        for (int i = 0; i < SCORE_TILE; i++)
            for (int j = 0; j < SPAN; j++) store(scores + (first + i) * BLOCK + j * LANES, sums[i][j]);
    }
}

// Of a key head: queries, keys and their products.
template <class T, Kind KIND>
static void prepare_keys(const Step<T>& step, int64_t token, int64_t count, int64_t k_head, Block& block) {
    const Tokens& tokens = block.tokens;
    const int64_t k_dim = step.k_dim, padded = (count + TILE - 1) / TILE * TILE;
    block.tokens.count = count;
    prepare_keys<T, KIND>(step, token, k_head, tokens);
    std::fill(tokens.q + count * k_dim, tokens.q + padded * k_dim, 0.0f);
    std::fill(tokens.k + count * k_dim, tokens.k + padded * k_dim, 0.0f);
    if (KIND == DELTA_OF_CHANNELS) return;
    if (count < BLOCK) std::fill(block.keys, block.keys + BLOCK * k_dim, 0.0f);
    for (int64_t t = 0; t < count; t++)
        for (int64_t r = 0; r < k_dim; r++) block.keys[r * BLOCK + t] = tokens.k[t * k_dim + r];
    score(tokens.q, block, block.scores_raw);
    if (KIND == DELTA) score(tokens.k, block, block.known_raw);
}

// Of a head, whose decays are the same for all channels.
template <bool IS_DELTA>
static void decay_of_head(Block& block) {
    const Tokens& tokens = block.tokens;
    float* between = block.to_end;  // p[t] / p[j] for a t; zero for later j
    std::fill(between, between + BLOCK, 0.0f);
    float since = 1.0f;
    for (int64_t t = 0; t < tokens.count; t++) {
        const float decay = tokens.decay[t], written = -tokens.write[t];
        const float *known = block.known_raw + t * BLOCK, *scores = block.scores_raw + t * BLOCK;
        float *known_to = block.known + t * BLOCK, *scores_to = block.scores + t * BLOCK;
        block.since[t] = since *= decay;
        for (int j = 0; j < BLOCK; j++) between[j] *= decay;
        for (int j = 0; IS_DELTA && j < BLOCK; j++) known_to[j] = known[j] * between[j] * written;
        between[t] = 1.0f;
        for (int j = 0; j < BLOCK; j++) scores_to[j] = scores[j] * between[j];
    }
}

// Of a head with a decay for each channel: the keys before a token decay one token after the other, while they are
// multiplied.
static void decay_of_channels(Block& block) {
    const Tokens& tokens = block.tokens;
    const int64_t k_dim = tokens.k_dim;
    std::fill(block.keys, block.keys + BLOCK * k_dim, 0.0f);
    std::fill(block.kept, block.kept + k_dim, 1.0f);
    std::fill(block.since, block.since + BLOCK, 1.0f);
    std::fill(block.to_end, block.to_end + BLOCK, 1.0f);
    for (int64_t t = 0; t < tokens.count; t++) {
        float *q = tokens.q + t * k_dim, *k = tokens.k + t * k_dim, *decays = tokens.decays + t * k_dim;
        alignas(64) float own[BLOCK] = {};  // 1 for this token
        own[t] = 1.0f;
        vec is_own[SPAN], of_q[SPAN] = {}, of_k[SPAN] = {};
        for (int j = 0; j < SPAN; j++) is_own[j] = load(own + j * LANES);
        for (int64_t r = 0; r < k_dim; r++)
            for (int j = 0; j < SPAN; j++) {
                float* place = block.keys + r * BLOCK + j * LANES;
                vec keys = load(place) * decays[r];
                of_k[j] += keys * k[r];
                keys += is_own[j] * k[r];
                of_q[j] += keys * q[r];
                store(place, keys);
            }
        for (int j = 0; j < SPAN; j++) {
            store(block.known + t * BLOCK + j * LANES, of_k[j] * -tokens.write[t]);
            store(block.scores + t * BLOCK + j * LANES, of_q[j]);
        }
        for (int64_t r = 0; r < k_dim; r++) {
            block.kept[r] *= decays[r];
            q[r] *= block.kept[r];
            k[r] *= block.kept[r];
        }
    }
}

template <class T, Kind KIND>
static void prepare_head(const Step<T>& step, int64_t token, int64_t head, Block& block) {
    prepare_decays<T, KIND>(step, token, head, block.tokens);
    std::fill(block.scores, block.scores + BLOCK * BLOCK, 0.0f);
    std::fill(block.known, block.known + BLOCK * BLOCK, 0.0f);
    if (KIND == DELTA_OF_CHANNELS) decay_of_channels(block);
    else decay_of_head<KIND == DELTA>(block);
}

// ---- columns

// What tokens write, [padded count, COLUMNS].
template <class T, Kind KIND, bool WHOLE>
static INLINE void write_columns(const Block& block, const float* tile, const Heads<T>& v, const T* values,
                                 int64_t columns, float* written) {
    const Tokens& tokens = block.tokens;
    for (int64_t first = 0; first < tokens.count; first += TILE) {
        constexpr bool IS_DELTA = KIND == DELTA || KIND == DELTA_OF_CHANNELS;
        vec sums[TILE][VECTORS] = {};
        if (IS_DELTA)
            add_product<TILE, VECTORS>(tokens.k + first * tokens.k_dim, tokens.k_dim, tile, tokens.k_dim, sums);
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) {
            const int64_t t = first + i;
            if (t >= tokens.count) break;
            vec value[VECTORS];
            load_columns<WHOLE>(values + t * v.token_stride, columns, value);
            for (int j = 0; j < VECTORS; j++)
                sums[i][j] = (IS_DELTA ? value[j] - sums[i][j] * block.since[t] : value[j]) * tokens.write[t];
        }
        if (IS_DELTA) {
            const float* known = block.known + first * BLOCK;
            add_product<TILE, VECTORS>(known, BLOCK, written, first, sums);
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++)
#pragma GCC unroll 8
                for (int later = i + 1; later < TILE; later++)
                    for (int j = 0; j < VECTORS; j++) sums[later][j] += sums[i][j] * known[later * BLOCK + first + i];
        }
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) store_columns<true>(written + (first + i) * COLUMNS, COLUMNS, sums[i]);
    }
}

template <class T, Kind KIND, bool WHOLE>
static INLINE void read_columns(const Block& block, const float* tile, const float* written, const Heads<T>& v,
                                const T* values, int64_t columns, float skip, T* out, int64_t out_stride) {
    const Tokens& tokens = block.tokens;
    for (int64_t first = 0; first < tokens.count; first += TILE) {
        const int64_t end = std::min(first + TILE, tokens.count);
        vec sums[TILE][VECTORS] = {};
        add_product<TILE, VECTORS>(tokens.q + first * tokens.k_dim, tokens.k_dim, tile, tokens.k_dim, sums);
#pragma GCC unroll 8
        for (int i = 0; KIND != DELTA_OF_CHANNELS && i < TILE; i++)
            for (int j = 0; j < VECTORS; j++) sums[i][j] *= block.since[first + i];
        add_product<TILE, VECTORS>(block.scores + first * BLOCK, BLOCK, written, end, sums);
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) {
            if (first + i >= tokens.count) break;
            if (KIND == MAMBA2) {
                vec value[VECTORS];
                load_columns<WHOLE>(values + (first + i) * v.token_stride, columns, value);
                for (int j = 0; j < VECTORS; j++) sums[i][j] += value[j] * skip;
            }
            store_columns<WHOLE>(out + (first + i) * out_stride, columns, sums[i]);
        }
    }
}

// N rows of the matrix after the block.
template <int N, Kind KIND>
static INLINE void update_rows(const Block& block, const float* written, int64_t row, float* tile) {
    vec sums[N][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
        const float kept = KIND == DELTA_OF_CHANNELS ? block.kept[row + i] : block.since[block.tokens.count - 1];
        load_columns<true>(tile + (row + i) * COLUMNS, COLUMNS, sums[i]);
        for (int j = 0; j < VECTORS; j++) sums[i][j] *= kept;
    }
    add_product<N, VECTORS>(block.keys + row * BLOCK, BLOCK, written, block.tokens.count, sums);
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) store_columns<true>(tile + (row + i) * COLUMNS, COLUMNS, sums[i]);
}

// `blocks` of tokens, for `columns` columns that begin at the pointers. memory: [k_dim + BLOCK, COLUMNS].
template <class T, Kind KIND, bool WHOLE>
static void run_columns(const Block* blocks, int64_t count, const float* from, float* to, int64_t stride,
                        int64_t columns, const Heads<T>& v, const T* values, float skip, T* out, int64_t out_stride,
                        float* memory) {
    const int64_t k_dim = blocks->tokens.k_dim;
    float *written = memory, *tile = memory + BLOCK * COLUMNS;
    for (int64_t r = 0; r < k_dim; r++) {
        vec s[VECTORS];
        load_columns<WHOLE>(from + r * stride, columns, s);
        store_columns<true>(tile + r * COLUMNS, COLUMNS, s);
    }
    for (const Block* block = blocks; block < blocks + count; block++) {
        write_columns<T, KIND, WHOLE>(*block, tile, v, values, columns, written);
        read_columns<T, KIND, WHOLE>(*block, tile, written, v, values, columns, skip, out, out_stride);
        if (KIND != DELTA_OF_CHANNELS)
            for (int64_t t = 0; t < block->tokens.count; t++)
                for (int i = 0; i < COLUMNS; i++) written[t * COLUMNS + i] *= block->to_end[t];
        int64_t r = 0;
        for (; r + TILE <= k_dim; r += TILE) update_rows<TILE, KIND>(*block, written, r, tile);
        for (; r < k_dim; r++) update_rows<1, KIND>(*block, written, r, tile);
        values += BLOCK * v.token_stride, out += BLOCK * out_stride;
    }
    for (int64_t r = 0; r < k_dim; r++) {
        vec s[VECTORS];
        load_columns<true>(tile + r * COLUMNS, COLUMNS, s);
        store_columns<WHOLE>(to + r * stride, columns, s);
    }
}
