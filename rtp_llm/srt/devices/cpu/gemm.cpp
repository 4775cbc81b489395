// Linear layers on packed weights: y = x W^T + bias, for bfloat16, int8 and int4 weights.
//
// A weight [N, K] is packed into panels of PANEL outputs. Within a panel the inputs run slowest, a few of them together
// in 32 bits (a *unit*: two bfloat16 or four int8), so that a panel is read once from its start to its end and every
// load fills whole registers:
//
//     bfloat16  [panels][units][PANEL][2]            a unit is 2 inputs
//     int8      [panels][units][PANEL][4]            a unit is 4 inputs
//     int4      [panels][units / 2][PANEL][4 bytes]  the lower halves of 4 bytes are a unit, the upper halves the next
//
// Rows of x are taken up to ROWS at a time against one panel, and all of the sums stay in registers: with few rows a
// product costs the reading of its weights, with many the multiplications. Many rows are first laid out in the order in
// which they are read. Threads share the panels; a row's result depends on nothing but itself.
#include "common.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int PANEL = 32;
constexpr int VECS = PANEL / LANES;
constexpr int ROWS = LANES == 16 ? 12 : 4;  // as many sums as there are registers for
constexpr int PANELS_AT_ONCE = 4;           // that a thread takes; a tile of rows stays in its cache meanwhile
constexpr int64_t UNITS_OF_EACH = 256;      // that one thread makes of a tile's rows
constexpr int ROWS_OF_EACH = 4;             // so few every thread prepares for itself
constexpr int FEW_TILES = 16;               // they go through a panel together
constexpr int FEWEST_THAT_ASK = 4;          // rows: fewer leave no time to ask for what comes after them
constexpr int UNITS_AHEAD = 24;             // weights are asked for so much before they are read

typedef int32_t ivec_unaligned __attribute__((vector_size(LANES * 4), aligned(4)));

typedef uint8_t bytes_vec __attribute__((vector_size(LANES), aligned(1)));
typedef int16_t shorts_vec __attribute__((vector_size(LANES * 2), aligned(2)));

INLINE ivec load_bits(const void* p) { return *static_cast<const ivec_unaligned*>(p); }

INLINE ivec larger(ivec a, ivec b) { return a > b ? a : b; }

INLINE int32_t largest(ivec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

INLINE int32_t sum(ivec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of the calling thread that is kept from call to call. Each SLOT is memory of its own.
template <class T, int SLOT>
T* scratch(int64_t count) {
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local int64_t capacity = 0;
    int64_t needed = count * int64_t(sizeof(T)) + 64;
    if (needed > capacity) {
        memory.reset(new char[needed]);
        capacity = needed;
#if defined(__linux__)  // in large pages, if it is large
        uintptr_t page = 2 << 20, start = (reinterpret_cast<uintptr_t>(memory.get()) + page - 1) / page * page;
        uintptr_t end = (reinterpret_cast<uintptr_t>(memory.get()) + needed) / page * page;
        if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
    }
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t(63));
}

// ---- what one unit of the inputs adds to the sums of one register of outputs

INLINE vec add_bf16(vec sum, uint32_t x, const uint32_t* w) {
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(int(x)));
#else
    ivec pair = load_bits(w);
    sum += splat(to_float(bf16{uint16_t(x)})) * (vec)(pair << 16);
    return sum + splat(to_float(bf16{uint16_t(x >> 16)})) * (vec)(pair & int32_t(0xffff0000));
#endif
}

// Four unsigned bytes of one factor and four signed ones of the other.
INLINE ivec add_bytes(ivec sum, ivec unsigned_bytes, ivec signed_bytes) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#else
    for (int i = 0; i < 4; i++)
        sum += ((unsigned_bytes >> (8 * i)) & 0xff) * ((signed_bytes << (24 - 8 * i)) >> 24);
    return sum;
#endif
}

// CACHE: 1, or 2, which waits for more of them at a time: to one row, which is all waiting, that is worth the longer
// way.
template <int CACHE = 1>
INLINE void ahead(const uint32_t* w) {
    __builtin_prefetch(w + UNITS_AHEAD * PANEL, 0, 4 - CACHE);
    __builtin_prefetch(w + UNITS_AHEAD * PANEL + PANEL / 2, 0, 4 - CACHE);
}

// ---- rows of x

// Cut into tiles of nearly equal size.
struct Tiles {
    int64_t rows, count;
    explicit Tiles(int64_t rows, int most = ROWS) : rows(rows), count(divide_up(rows, most)) {}
    int64_t start(int64_t tile) const { return rows * tile / count; }
};

// bfloat16 rows as units. Unit u of row r of a tile of R rows is number u * R + r of the tile.
class Input {
   public:
    const Tiles tiles;

    Input(const bf16* x, int64_t stride, int64_t M, int64_t K)
        : Input(x, stride, M, K, scratch<uint32_t, 0>(M * divide_up(K, 2))) {}

    // In memory of the caller's, [M * ceil(K / 2)].
    Input(const bf16* x, int64_t stride, int64_t M, int64_t K, uint32_t* memory)
        : tiles(M), x_(x), stride_(stride), K_(K), units_(divide_up(K, 2)) {
        even_ = K % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0;
        packed_ = even_ && M == 1 ? nullptr : memory;  // a single row lies as it should
    }

    // To be called by all threads of a team.
    void pack() {
        if (!packed_) return;
        int64_t pieces = divide_up(units_, UNITS_OF_EACH);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tiles.count * pieces; i++) {
            int64_t t = i / pieces, first = i % pieces * UNITS_OF_EACH;
            pack_tile(tiles.start(t), tiles.start(t + 1) - tiles.start(t), first, std::min(first + UNITS_OF_EACH, units_));
        }
    }

    const uint32_t* rows(int64_t start) const {
        return packed_ ? packed_ + start * units_ : reinterpret_cast<const uint32_t*>(x_);
    }

   private:
    void pack_tile(int64_t start, int64_t count, int64_t first, int64_t last) {
        uint32_t* to = packed_ + start * units_;
        for (int64_t block = first; block < last; block += 16) {  // a cache line of each row at a time
            int64_t end = std::min(block + 16, last);
            for (int64_t r = 0; r < count; r++) {
                const bf16* row = x_ + (start + r) * stride_;
                if (even_) {
                    const uint32_t* from = reinterpret_cast<const uint32_t*>(row);
                    for (int64_t u = block; u < end; u++) to[u * count + r] = from[u];
                } else {
                    for (int64_t u = block; u < end; u++) {
                        uint32_t second = 2 * u + 1 < K_ ? row[2 * u + 1].bits : 0;
                        to[u * count + r] = row[2 * u].bits | second << 16;
                    }
                }
            }
        }
    }

    const bf16* x_;
    int64_t stride_, K_, units_;
    bool even_;
    uint32_t* packed_;
};

// Rows as bytes, four to a unit, in the order of Input. Each group of `group` inputs has a scale of its own, so that the
// largest becomes 127. `offset` is added to every byte. Rows end in zeros, so that groups are whole.
class Bytes {
   public:
    const Tiles tiles;
    const int64_t groups;
    float* scales;    // [M][groups]
    int32_t* totals;  // [M][groups], without the offset

    Bytes(const void* x, bool is_float, int64_t stride, int64_t M, int64_t K, int64_t group, int offset, int most)
        : tiles(M, most), groups(divide_up(K, group)), x_(x), is_float_(is_float), stride_(stride), K_(K),
          group_(group), units_(groups * group / 4), offset_(offset) {
        reserve();
    }

    // To be called by all threads of a team, each with a copy. Of few rows each makes bytes of its own, which takes
    // less time than to wait for one another.
    void pack() {
        if (tiles.rows <= ROWS_OF_EACH) {
            reserve();
            for (int64_t t = 0; t < tiles.count; t++) pack_tile(t);
            return;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles.count; t++) pack_tile(t);
    }

    const uint32_t* rows(int64_t start) const { return reinterpret_cast<const uint32_t*>(bytes_) + start * units_; }

   private:
    void reserve() {
        bytes_ = scratch<uint8_t, 1>(tiles.rows * units_ * 4);
        scales = scratch<float, 2>(tiles.rows * groups);
        totals = scratch<int32_t, 3>(tiles.rows * groups);
    }

    void pack_tile(int64_t t) {
        int64_t start = tiles.start(t), count = tiles.start(t + 1) - start;
        uint32_t* to = reinterpret_cast<uint32_t*>(bytes_) + start * units_;
        uint32_t* row = count == 1 ? to : scratch<uint32_t, 4>(units_);
        for (int64_t r = 0; r < count; r++) {
            if (is_float_)
                quantize(static_cast<const float*>(x_) + (start + r) * stride_, start + r, row);
            else
                quantize(static_cast<const bf16*>(x_) + (start + r) * stride_, start + r, row);
            if (count > 1)
                for (int64_t u = 0; u < units_; u++) to[u * count + r] = row[u];
        }
    }

    template <class T>
    void quantize(const T* x, int64_t row, uint32_t* units) {
        uint8_t* to = reinterpret_cast<uint8_t*>(units);
        for (int64_t g = 0; g < groups; g++, to += group_) {
            int64_t first = g * group_, count = std::min(group_, K_ - first);
            float most = amax(x + first, count), scale = most / 127, inverse = most > 0 ? 127 / most : 0;
            ivec total = ivec{};
            int64_t k = 0;
            for (; k + LANES <= count; k += LANES) {
                ivec whole = nearest(load(x + first + k) * inverse);
                total += whole;
                bytes_vec bytes = __builtin_convertvector(whole + offset_, bytes_vec);
                std::memcpy(to + k, &bytes, LANES);
            }
            if (k < count) {
                ivec whole = nearest(load_part(x + first + k, int(count - k)) * inverse);
                total += whole;
                for (int i = 0; i < count - k; i++) to[k + i] = uint8_t(whole[i] + offset_);
            }
            for (k = count; k < group_; k++) to[k] = uint8_t(offset_);
            scales[row * groups + g] = scale;
            totals[row * groups + g] = sum(total);
        }
    }

    // The largest magnitude; NaN if there is one: without signs, bits compare as magnitudes do, and NaN is the largest.
    template <class T>
    static float amax(const T* x, int64_t count) {
        ivec most = ivec{};
        int64_t k = 0;
        for (; k + LANES <= count; k += LANES) most = larger(most, (ivec)load(x + k) & 0x7fffffff);
        if (k < count) most = larger(most, (ivec)load_part(x + k, int(count - k)) & 0x7fffffff);
        int32_t bits = largest(most);
        float result;
        std::memcpy(&result, &bits, 4);
        return result;
    }

    // The nearest integers; of two as near, the even one.
    static INLINE ivec nearest(vec x) {
#if defined(__AVX512F__)
        return (ivec)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
        return (ivec)_mm256_cvtps_epi32((__m256)x);
#else
        return (ivec)(x + 12582912.0f) - (ivec)splat(12582912.0f);
#endif
    }

    const void* x_;
    bool is_float_;
    int64_t stride_, K_, group_, units_;
    int offset_;
    uint8_t* bytes_;
};

// ---- results

// A function of the first half of the outputs that the second half is multiplied by.
enum Gate { NO_GATE, SILU, GELU_TANH };

struct Output {
    void* data;
    int64_t stride, columns;  // columns: outputs of the weight
    const void* bias;  // [columns] or null
    bool is_float, bias_is_float;
    Gate gate = NO_GATE;

    INLINE void write(int64_t row, int64_t column, vec value) const {
        if (column >= columns) return;
        int count = int(std::min<int64_t>(columns - column, LANES));
        put(row * stride + column, with_bias(value, column, count), count);
    }

    // Of a whole vector of columns of the first half, with those of the second. Rounded where it would be if each step
    // went through memory.
    INLINE void write_gated(int64_t row, int64_t column, vec first, vec second) const {
        first = round(with_bias(first, column, LANES));
        second = round(with_bias(second, columns / 2 + column, LANES));
        put(row * stride + column, round(gate == SILU ? silu(first) : gelu_tanh(first)) * second, LANES);
    }

   private:
    INLINE vec with_bias(vec value, int64_t column, int count) const {
        if (!bias) return value;
        return value + (bias_is_float ? read(static_cast<const float*>(bias) + column, count)
                                      : read(static_cast<const bf16*>(bias) + column, count));
    }

    INLINE vec round(vec value) const { return is_float ? value : rounded<bf16>(value); }

    INLINE void put(int64_t at, vec value, int count) const {
        if (is_float)
            write_to(static_cast<float*>(data) + at, value, count);
        else
            write_to(static_cast<bf16*>(data) + at, value, count);
    }

    template <class T>
    static INLINE vec read(const T* p, int count) {
        return count == LANES ? load(p) : load_part(p, count);
    }

    template <class T>
    static INLINE void write_to(T* p, vec value, int count) {
        count == LANES ? store(p, value) : store_part(p, value, count);
    }
};

// The number of rows of a tile's sums.
template <class Sums>
constexpr int ROWS_OF = std::extent<std::remove_reference_t<Sums>>::value;

// Calls f(constant) with the number of rows as a constant.
template <int R = ROWS, class F>
INLINE void with_rows(int64_t rows, F&& f) {
    if constexpr (R >= 1) {
        if (rows == R)
            f(std::integral_constant<int, R>{});
        else
            with_rows<R - 1>(rows, f);
    }
}

// ---- one tile of rows times one panel

// What the tile after this one reads, and has to be nearer by then: `step` words for each unit.
struct Next {
    const uint32_t* at;
    int step;

    template <int R>
    INLINE void ask(int64_t unit) const {
        if (R >= FEWEST_THAT_ASK) __builtin_prefetch(at + unit * step, 0, 2);
    }
};

// What a tile can ask for: half `half` of the panel that is `panels` further on, or, 0 panels on, the next tile's rows.
struct Following {
    int64_t panels;
    int half;

    template <int R>
    INLINE Next of(const uint32_t* x, int64_t units, const uint32_t* panel, int64_t words) const {
        if (panels) return {panel + panels * words + half * words / 2, 16};
        return {x + units * R, R};
    }
};

template <int R>
NOINLINE void tile_bf16(const uint32_t* x, const uint32_t* panel, int64_t units, vec (&result)[R][VECS], Next next) {
    constexpr int CACHE = R == 1 ? 2 : 1;
    vec sums[R][VECS] = {};
    for (int64_t u = 0; u < units; u++) {
        const uint32_t* w = panel + u * PANEL;
        ahead<CACHE>(w);
        next.ask<R>(u);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++) sums[r][v] = add_bf16(sums[r][v], x[u * R + r], w + v * LANES);
    }
    std::memcpy(result, sums, sizeof sums);
}

template <int R>
NOINLINE void tile_int8(const uint32_t* x, const uint32_t* panel, int64_t units, ivec (&result)[R][VECS], Next next) {
    constexpr int CACHE = R == 1 ? 2 : 1;
    ivec sums[R][VECS] = {};
    for (int64_t u = 0; u < units; u++) {
        const uint32_t* w = panel + u * PANEL;
        ahead<CACHE>(w);
        next.ask<R>(u);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++)
                sums[r][v] = add_bytes(sums[r][v], ivec{} + int32_t(x[u * R + r]), load_bits(w + v * LANES));
    }
    std::memcpy(result, sums, sizeof sums);
}

template <int R>
INLINE void write_tile(const Output& out, int64_t row, int64_t column, const vec (&sums)[R][VECS]) {
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECS; v++) out.write(row + r, column + v * LANES, sums[r][v]);
}

template <int R>
INLINE void write_tile_gated(
    const Output& out, int64_t row, int64_t column, const vec (&first)[R][VECS], const vec (&second)[R][VECS]
) {
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECS; v++) out.write_gated(row + r, column + v * LANES, first[r][v], second[r][v]);
}

// Panels of outputs, for the threads of a team to take: several at a time, and fewer towards the end, so that all end
// together. With a gate, whose halves are whole panels, one of the first half stands for one of the second as well.
class Panels {
   public:
    const int64_t count;

    explicit Panels(const Output& out, int64_t most = PANELS_AT_ONCE)
        : count(out.gate ? out.columns / 2 / PANEL : divide_up(out.columns, PANEL)),
          most_(out.gate ? std::max<int64_t>(1, most / 2) : most) {}

    // Whether there were any left: [first, last).
    bool take(int64_t& first, int64_t& last) {
        first = next_.load(std::memory_order_relaxed);
        do {
            if (first >= count) return false;
            last = first + std::max<int64_t>(1, std::min(most_, (count - first) / (4 * omp_get_num_threads())));
        } while (!next_.compare_exchange_weak(first, last, std::memory_order_relaxed));
        return true;
    }

   private:
    const int64_t most_;
    std::atomic<int64_t> next_{0};
};

// Computes every tile of rows by every panel, to be called by all threads of a team; tile(panel, first row, sums,
// following) does one.
//
// Of few tiles all go through a panel before the next one, which is read from memory meanwhile: otherwise the first tile
// would wait for memory, and the others for the multipliers. Of many each goes through several panels.
template <class F>
void each_tile(const Output& out, const Tiles& tiles, Panels& panels, F&& tile) {
    auto compute = [&](int64_t p, int64_t t, Following following) {
        int64_t start = tiles.start(t);
        with_rows(tiles.start(t + 1) - start, [&](auto constant) {
            constexpr int R = decltype(constant)::value;
            vec sums[R][VECS], others[R][VECS];
            tile(p, start, sums, following);
            if (out.gate) {
                tile(panels.count + p, start, others, following);
                write_tile_gated<R>(out, start, p * PANEL, sums, others);
            } else {
                write_tile<R>(out, start, p * PANEL, sums);
            }
        });
    };
    // To know what it reads next, a thread takes that early; not where the others would be left with nothing.
    const bool few = tiles.count > 1 && tiles.count <= FEW_TILES;
    const bool early = few && panels.count >= 4 * omp_get_num_threads();
    int64_t first, last, next_first = 0, next_last = 0;
    bool taken = panels.take(first, last);
    while (taken) {
        bool next_taken = early && panels.take(next_first, next_last);
        if (few) {
            for (int64_t p = first; p < last; p++) {
                int64_t next = p + 1 < last ? p + 1 : next_taken ? next_first : p;
                for (int64_t t = 0; t < tiles.count; t++) compute(p, t, t < 2 ? Following{next - p, int(t)} : Following{});
            }
        } else {
            for (int64_t t = 0; t < tiles.count; t++)
                for (int64_t p = first; p < last; p++) compute(p, t, Following{});
        }
        taken = early ? next_taken : panels.take(first, last);
        if (early) first = next_first, last = next_last;
    }
}

}  // namespace

KERNEL int64_t panel_size() { return PANEL; }

// ---- bfloat16

// weight [N, K], rows `stride` apart -> packed [panels][ceil(K / 2)][PANEL][2], ending in zeros.
KERNEL void pack_bf16(const bf16* weight, int64_t stride, int64_t N, int64_t K, bf16* packed) {
    int64_t units = divide_up(K, 2), panels = divide_up(N, PANEL);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        bf16* panel = packed + p * units * PANEL * 2;
        for (int64_t n = 0; n < PANEL; n++) {
            const bf16* row = weight + (p * PANEL + n) * stride;
            bool there = p * PANEL + n < N;
            for (int64_t k = 0; k < 2 * units; k++)
                panel[(k / 2) * PANEL * 2 + n * 2 + k % 2] = there && k < K ? row[k] : bf16{0};
        }
    }
}

// Rows `ids` of the weight [N, K] that was packed -> [count, K]. Returns whether all ids are in range.
KERNEL int rows_bf16(const bf16* packed, const int64_t* ids, int64_t count, int64_t N, int64_t K, bf16* out) {
    int64_t units = divide_up(K, 2);
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= N) return 0;
        const bf16* row = packed + (ids[i] / PANEL) * units * PANEL * 2 + (ids[i] % PANEL) * 2;
        for (int64_t k = 0; k < K; k++) out[i * K + k] = row[(k / 2) * PANEL * 2 + k % 2];
    }
    return 1;
}

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gate. x: rows `x_stride` elements apart; bias: [N] or null.
KERNEL void gemm_bf16(const bf16* x, int64_t x_stride, int64_t M, const bf16* packed, int64_t N, int64_t K,
                      const void* bias, int bias_is_float, void* out, int64_t out_stride, int out_is_float, int gate) {
    int64_t units = divide_up(K, 2);
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Gate(gate)};
    Input input(x, x_stride, M, K);
    Panels panels(output);
#pragma omp parallel
    {
        input.pack();
        each_tile(output, input.tiles, panels, [&](int64_t p, int64_t start, auto& sums, Following following) {
            constexpr int R = ROWS_OF<decltype(sums)>;
            const uint32_t* rows = input.rows(start);
            const uint32_t* panel = reinterpret_cast<const uint32_t*>(packed) + p * units * PANEL;
            tile_bf16<R>(rows, panel, units, sums, following.of<R>(rows, units, panel, units * PANEL));
        });
    }
}

// out [M, N] = x [M, K] times a weight and plus a bias of each row's group, for all groups in one call. Rows are sorted
// by group, rows_per_group of each. packed: [groups] weights, one after the other; bias: [groups][N] bfloat16 or null.
// Returns whether groups have M rows together.
KERNEL int grouped_gemm_bf16(const bf16* x, int64_t x_stride, int64_t M, const int64_t* rows_per_group, int64_t groups,
                             const bf16* packed, int64_t N, int64_t K, const bf16* bias, bf16* out,
                             int64_t out_stride) {
    int64_t rows = 0;
    for (int64_t g = 0; g < groups; g++) rows += rows_per_group[g];
    if (rows != M) return 0;
    int64_t units = divide_up(K, 2), panels = divide_up(N, PANEL), pieces = divide_up(panels, PANELS_AT_ONCE);
    uint32_t* memory = scratch<uint32_t, 0>(M * units);
    std::vector<int64_t> ids, starts;  // of groups that have rows
    std::vector<Input> inputs;
    for (int64_t g = 0, start = 0; g < groups; start += rows_per_group[g++]) {
        if (rows_per_group[g] == 0) continue;
        ids.push_back(g);
        starts.push_back(start);
        inputs.emplace_back(x + start * x_stride, x_stride, rows_per_group[g], K, memory + start * units);
    }
    int64_t tasks = int64_t(ids.size()) * pieces;
#pragma omp parallel
    {
        for (Input& input : inputs) input.pack();
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const Input& input = inputs[task / pieces];
            int64_t g = ids[task / pieces], first = task % pieces * PANELS_AT_ONCE;
            int64_t last = std::min(first + PANELS_AT_ONCE, panels);
            bf16* rows_out = out + starts[task / pieces] * out_stride;
            Output output{rows_out, out_stride, N, bias ? bias + g * N : nullptr, false, false};
            const uint32_t* weight = reinterpret_cast<const uint32_t*>(packed) + g * panels * units * PANEL;
            for (int64_t t = 0; t < input.tiles.count; t++) {
                int64_t start = input.tiles.start(t);
                with_rows(input.tiles.start(t + 1) - start, [&](auto constant) {
                    constexpr int R = decltype(constant)::value;
                    for (int64_t p = first; p < last; p++) {
                        vec sums[R][VECS];
                        const uint32_t* rows = input.rows(start);
                        const uint32_t* panel = weight + p * units * PANEL;
                        tile_bf16<R>(rows, panel, units, sums, Following{}.of<R>(rows, units, panel, units * PANEL));
                        write_tile<R>(output, start, p * PANEL, sums);
                    }
                });
            }
        }
    }
    return 1;
}

// ---- int8: weights with a scale per output; rows of x become bytes, each with a scale of its own

// weight [N, K] -> packed [panels][ceil(K / 4)][PANEL][4], ending in zeros, and each output's sum, [panels * PANEL].
KERNEL void pack_int8(const int8_t* weight, int64_t N, int64_t K, int8_t* packed, int32_t* totals) {
    int64_t units = divide_up(K, 4), panels = divide_up(N, PANEL);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        int8_t* panel = packed + p * units * PANEL * 4;
        for (int64_t n = 0; n < PANEL; n++) {
            const int8_t* row = weight + (p * PANEL + n) * K;
            bool there = p * PANEL + n < N;
            int32_t total = 0;
            for (int64_t k = 0; k < 4 * units; k++) {
                int8_t value = there && k < K ? row[k] : 0;
                panel[(k / 4) * PANEL * 4 + n * 4 + k % 4] = value;
                total += value;
            }
            totals[p * PANEL + n] = total;
        }
    }
}

// Rows `ids` of the weight [N, K] that was packed, times their scales -> [count, K]. Returns whether all ids are in
// range.
KERNEL int rows_int8(const int8_t* packed, const float* scales, const int64_t* ids, int64_t count, int64_t N,
                     int64_t K, void* out, int out_is_float) {
    int64_t units = divide_up(K, 4);
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= N) return 0;
        const int8_t* row = packed + (ids[i] / PANEL) * units * PANEL * 4 + (ids[i] % PANEL) * 4;
        for (int64_t k = 0; k < K; k++) {
            float value = float(row[(k / 4) * PANEL * 4 + k % 4]) * scales[ids[i]];
            if (out_is_float)
                static_cast<float*>(out)[i * K + k] = value;
            else
                static_cast<bf16*>(out)[i * K + k] = from_float<bf16>(value);
        }
    }
    return 1;
}

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gate, of bfloat16 or float32 x. scales, totals:
// [panels * PANEL].
KERNEL void gemm_int8(const void* x, int x_is_float, int64_t x_stride, int64_t M, const int8_t* packed,
                      const float* scales, const int32_t* totals, int64_t N, int64_t K, const void* bias,
                      int bias_is_float, void* out, int64_t out_stride, int out_is_float, int gate) {
    int64_t units = divide_up(K, 4);
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Gate(gate)};
    const Bytes rows(x, x_is_float != 0, x_stride, M, K, 4 * units, 128, ROWS);
    Panels panels(output);
#pragma omp parallel
    {
        Bytes input = rows;
        input.pack();
        each_tile(output, input.tiles, panels, [&](int64_t p, int64_t start, auto& results, Following following) {
            constexpr int R = ROWS_OF<decltype(results)>;
            ivec sums[R][VECS];
            const uint32_t* rows = input.rows(start);
            const uint32_t* panel = reinterpret_cast<const uint32_t*>(packed) + p * units * PANEL;
            tile_int8<R>(rows, panel, units, sums, following.of<R>(rows, units, panel, units * PANEL));
            for (int v = 0; v < VECS; v++) {
                ivec total = load_bits(totals + p * PANEL + v * LANES);
                vec scale = load(scales + p * PANEL + v * LANES);
                for (int r = 0; r < R; r++)  // a byte of x is 128 more than what it stands for
                    results[r][v] = __builtin_convertvector(sums[r][v] - 128 * total, vec) *
                                    (scale * splat(input.scales[start + r]));
            }
        });
    }
}

// ---- int4: weights (q - zero) * scale, with scale and zero per output and group of neighbouring inputs

namespace {

// Rows are multiplied as bytes where the processor does so; elsewhere a panel at a time is written out in bfloat16.
#if defined(__AVX512VNNI__)
constexpr bool AS_BYTES = true;
#else
constexpr bool AS_BYTES = false;
#endif
constexpr int ROWS_OF_INT4 = 6;  // in a tile: it keeps two sets of sums

struct Int4 {
    const uint8_t* packed;   // [panels][units / 2][PANEL][4]
    const int16_t* scales;   // [panels][groups][PANEL], times what `steps` says
    const uint8_t* zeros;    // [panels][groups][PANEL], or null: all 8
    const float* steps;      // [panels * PANEL]
    int64_t groups, group;   // group: inputs of one, a multiple of 8

    const uint8_t* quarters(int64_t panel) const { return packed + panel * groups * group / 2 * PANEL; }

    INLINE vec scale(int64_t panel, int64_t g, int v) const {
        const int16_t* at = scales + (panel * groups + g) * PANEL + v * LANES;
        return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const shorts_vec*>(at), ivec), vec);
    }

    INLINE vec zero(int64_t panel, int64_t g, int v) const {
        if (!zeros) return splat(8.0f);
        bytes_vec bytes = *reinterpret_cast<const bytes_vec*>(zeros + (panel * groups + g) * PANEL + v * LANES);
        return __builtin_convertvector(__builtin_convertvector(bytes, ivec), vec);
    }

    INLINE vec step(int64_t panel, int v) const { return load(steps + panel * PANEL + v * LANES); }
};

// One panel times rows that were made bytes, group by group. For few rows there are registers for sums of the upper
// halves as they are, 16 times what they stand for, which saves shifting the weights.
template <int R>
NOINLINE void tile_int4(
    const Bytes& input, int64_t start, const Int4& weight, int64_t panel, vec (&result)[R][VECS], Following following
) {
    constexpr bool FEW = R <= 4;
    const uint32_t* x = input.rows(start);
    const uint8_t* w = weight.quarters(panel);
    const int64_t units = weight.groups * weight.group / 4;
    const Next next = following.of<R>(x, units, reinterpret_cast<const uint32_t*>(w), units / 2 * PANEL);
    vec sums[R][VECS] = {};
    int64_t unit = 0;
    for (int64_t g = 0; g < weight.groups; g++) {
        const int32_t* totals = input.totals + start * input.groups + g;
        const float* scales = input.scales + start * input.groups + g;
        ivec products[R][VECS], shifted[R][VECS] = {};
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++) products[r][v] = ivec{} + (weight.zeros ? 0 : -8 * totals[r * input.groups]);
        for (int64_t end = unit + weight.group / 4; unit < end; unit += 2, w += PANEL * 4) {
            ahead(reinterpret_cast<const uint32_t*>(w));
            next.ask<R>(unit / 2);
            ivec lower[VECS], upper[VECS];
            for (int v = 0; v < VECS; v++) {
                ivec both = load_bits(w + v * LANES * 4);
                lower[v] = both & 0x0f0f0f0f, upper[v] = FEW ? both & int32_t(0xf0f0f0f0) : (both >> 4) & 0x0f0f0f0f;
            }
            for (int r = 0; r < R; r++) {
                ivec first = ivec{} + int32_t(x[unit * R + r]), second = ivec{} + int32_t(x[(unit + 1) * R + r]);
                for (int v = 0; v < VECS; v++) {
                    products[r][v] = add_bytes(products[r][v], lower[v], first);
                    ivec& sum = FEW ? shifted[r][v] : products[r][v];
                    sum = add_bytes(sum, upper[v], second);
                }
            }
        }
        for (int v = 0; v < VECS; v++) {
            vec scale = weight.scale(panel, g, v), zero = weight.zeros ? weight.zero(panel, g, v) : vec{};
            for (int r = 0; r < R; r++) {
                vec product = __builtin_convertvector(products[r][v] + (shifted[r][v] >> 4), vec);
                if (weight.zeros) product -= zero * splat(float(totals[r * input.groups]));
                sums[r][v] += product * (scale * splat(scales[r * input.groups]));
            }
        }
    }
    for (int v = 0; v < VECS; v++)
        for (int r = 0; r < R; r++) result[r][v] = sums[r][v] * weight.step(panel, v);
}

INLINE ivec bf16_bits(vec x) {
    ivec bits = (ivec)x;
    return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
}

// One panel in bfloat16: [groups * group / 2][PANEL][2].
void write_out(const Int4& weight, int64_t panel, uint32_t* out) {
    const uint8_t* w = weight.quarters(panel);
    for (int64_t g = 0; g < weight.groups; g++) {
        vec scales[VECS], offsets[VECS];
        for (int v = 0; v < VECS; v++) {
            scales[v] = weight.scale(panel, g, v) * weight.step(panel, v);
            offsets[v] = weight.zero(panel, g, v);
        }
        for (int64_t pair = 0; pair < weight.group / 8; pair++, w += PANEL * 4, out += 4 * PANEL)
            for (int v = 0; v < VECS; v++) {
                ivec bits = load_bits(w + v * LANES * 4);
                for (int two = 0; two < 4; two++) {  // inputs 2 * two and 2 * two + 1 of eight
                    int shift = two < 2 ? 16 * two : 16 * (two - 2) + 4;
                    vec first = __builtin_convertvector((bits >> shift) & 15, vec);
                    vec second = __builtin_convertvector((bits >> (shift + 8)) & 15, vec);
                    ivec made = bf16_bits((first - offsets[v]) * scales[v]) |
                                bf16_bits((second - offsets[v]) * scales[v]) << 16;
                    std::memcpy(out + two * PANEL + v * LANES, &made, sizeof made);
                }
            }
    }
}

}  // namespace

// values [N, groups * group] of 0..15, a byte each -> packed [panels][groups * group / 8][PANEL][4], ending in zeros.
KERNEL void pack_int4(const uint8_t* values, int64_t N, int64_t inputs, uint8_t* packed) {
    int64_t pairs = inputs / 8, panels = divide_up(N, PANEL);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t n = 0; n < PANEL; n++) {
            const uint8_t* row = values + (p * PANEL + n) * inputs;
            bool there = p * PANEL + n < N;
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int64_t i = 0; i < 4; i++)
                    packed[((p * pairs + pair) * PANEL + n) * 4 + i] =
                        there ? uint8_t(row[pair * 8 + i] | row[pair * 8 + 4 + i] << 4) : 0;
        }
}

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gate, of bfloat16 x; see Int4 for what the weight consists of.
KERNEL void gemm_int4(const bf16* x, int64_t x_stride, int64_t M, const uint8_t* packed, const int16_t* scales,
                      const uint8_t* zeros, const float* steps, int64_t group, int64_t N, int64_t K, const void* bias,
                      int bias_is_float, void* out, int64_t out_stride, int out_is_float, int gate) {
    Int4 weight{packed, scales, zeros, steps, divide_up(K, group), group};
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Gate(gate)};
    if constexpr (AS_BYTES) {
        const Bytes rows(x, false, x_stride, M, K, group, 0, ROWS_OF_INT4);
        Panels panels(output);
#pragma omp parallel
        {
            Bytes input = rows;
            input.pack();
            each_tile(output, input.tiles, panels, [&](int64_t p, int64_t start, auto& sums, Following following) {
                constexpr int R = ROWS_OF<decltype(sums)>;
                if constexpr (R <= ROWS_OF_INT4) tile_int4<R>(input, start, weight, p, sums, following);
            });
        }
    } else {
        Input input(x, x_stride, M, K);
        Panels panels(output, 1);
        int64_t units = divide_up(K, 2), panel_units = weight.groups * group / 2 * PANEL;
#pragma omp parallel
        {
            int64_t written[2] = {-1, -1};  // panels that are in memory now, of either half
            uint32_t* memory = scratch<uint32_t, 5>(2 * panel_units);
            input.pack();
            each_tile(output, input.tiles, panels, [&](int64_t p, int64_t start, auto& sums, Following) {
                constexpr int R = ROWS_OF<decltype(sums)>;
                int half = output.gate != NO_GATE && 2 * p * PANEL >= N;
                uint32_t* panel = memory + half * panel_units;
                if (written[half] != p) write_out(weight, p, panel);
                written[half] = p;
                const uint32_t* rows = input.rows(start);
                tile_bf16<R>(rows, panel, units, sums, Following{}.of<R>(rows, units, panel, panel_units));
            });
        }
    }
}
