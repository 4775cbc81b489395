// Rows of x, copied to the order in which they are read.
#pragma once

#include "gemm_units.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace {

// Rows cut into tiles of nearly equal size.
struct Tiles {
    int64_t rows, count;
    explicit Tiles(int64_t rows, int most = ROWS) : rows(rows), count(divide_up(rows, most)) {}
    int64_t start(int64_t tile) const { return rows * tile / count; }
};

// Rows of groups, each cut by itself: tiles [firsts[i], firsts[i + 1]) are those of group ids[i].
struct GroupTiles {
    int64_t rows = 0, count = 0;
    std::vector<int64_t> ids, firsts{0};

    GroupTiles(const int64_t* rows_per_group, int64_t groups, int most) {
        for (int64_t g = 0; g < groups; rows += rows_per_group[g++]) {
            if (rows_per_group[g] == 0) continue;
            const Tiles tiles(rows_per_group[g], most);
            for (int64_t t = 0; t < tiles.count; t++) starts_.push_back(rows + tiles.start(t + 1));
            count += tiles.count;
            ids.push_back(g);
            firsts.push_back(count);
        }
    }

    int64_t start(int64_t tile) const { return starts_[tile]; }

   private:
    std::vector<int64_t> starts_{0};
};

// bfloat16 rows as units: unit u of row r of a tile of R rows is number u * R + r of the tile.
class Input {
   public:
    const Tiles tiles;

    Input(const bf16* x, int64_t stride, int64_t M, int64_t K)
        : Input(x, stride, M, K, scratch<Unit, 0>(M * divide_up(K, 2))) {}

    // memory: the caller's, [M * ceil(K / 2)].
    Input(const bf16* x, int64_t stride, int64_t M, int64_t K, Unit* memory)
        : Input(x, stride, M, K, divide_up(K, 2), memory) {}

    // Rows are padded with zeros to `units`; memory: [M * units]. most: rows of a tile.
    Input(const bf16* x, int64_t stride, int64_t M, int64_t K, int64_t units, Unit* memory, int most = ROWS)
        : tiles(M, most), x_(x), stride_(stride), K_(K), units_(units) {
        even_ = K % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0;
        packed_ = even_ && M == 1 && K == 2 * units ? nullptr : memory;  // a single row is in the right order
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

    // Of a tile of R rows.
    template <int R>
    const UnitOf<R>* rows(int64_t start) const {
        if (R == 1 && !packed_) return reinterpret_cast<const UnitOf<R>*>(x_);
        return reinterpret_cast<const UnitOf<R>*>(packed_ + start * units_);
    }

   private:
    void pack_tile(int64_t start, int64_t count, int64_t first, int64_t last) {
        Unit* to = packed_ + start * units_;
        if (count <= ROWS_OF_PAIRS)
            pack_rows(start, count, first, last, reinterpret_cast<uint32_t*>(to));
        else
            pack_rows(start, count, first, last, to);
    }

#if defined(__SSE2__)
    // Four units of four rows; `step` units are between those of one row.
    INLINE void pack_square(int64_t row, int64_t unit, int64_t step, uint32_t* to) {
        __m128i x[4], y[4];
        for (int i = 0; i < 4; i++) {
            const bf16* from = x_ + (row + i) * stride_ + 2 * unit;
            x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        }
        for (int i = 0; i < 2; i++) {
            y[2 * i] = _mm_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
            y[2 * i + 1] = _mm_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
        }
        for (int i = 0; i < 2; i++) {
            uint32_t* even = to + 2 * i * step;
            _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm_unpacklo_epi64(y[i], y[2 + i]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(even + step), _mm_unpackhi_epi64(y[i], y[2 + i]));
        }
    }
#endif

    template <class T>
    INLINE void pack_rows(int64_t start, int64_t count, int64_t first, int64_t last, T* to) {
        for (int64_t block = first; block < last; block += 16) {  // a cache line of each row at a time
            int64_t end = std::min(block + 16, last), there = std::min(end, divide_up(K_, 2)), r = 0;
#if defined(__SSE2__)
            if constexpr (std::is_same_v<T, uint32_t>)
                for (; even_ && there == block + 16 && r + 4 <= count; r += 4)
                    for (int64_t u = block; u < there; u += 4) pack_square(start + r, u, count, to + u * count + r);
#endif
            for (; r < count; r++) {
                const bf16* row = x_ + (start + r) * stride_;
                if (even_) {
                    const uint32_t* from = reinterpret_cast<const uint32_t*>(row);
                    for (int64_t u = block; u < there; u++) to[u * count + r] = unit_of<T>(from[u]);
                } else {
                    for (int64_t u = block; u < there; u++) {
                        uint32_t second = 2 * u + 1 < K_ ? row[2 * u + 1].bits : 0;
                        to[u * count + r] = unit_of<T>(row[2 * u].bits | second << 16);
                    }
                }
                for (int64_t u = std::max(block, there); u < end; u++) to[u * count + r] = T{};
            }
        }
    }

    const bf16* x_;
    int64_t stride_, K_, units_;
    bool even_;
    Unit* packed_;
};

// The largest magnitude; NaN if there is one: without signs, bits compare as magnitudes do, and NaN is the largest.
template <class T>
float amax(const T* x, int64_t count) {
    ivec most = ivec{};
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) most = larger(most, (ivec)load(x + k) & 0x7fffffff);
    if (k < count) most = larger(most, (ivec)load_part(x + k, int(count - k)) & 0x7fffffff);
    int32_t bits = largest(most);
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// The nearest integers, ties to even.
INLINE ivec nearest(vec x) {
#if defined(__AVX512F__)
    return (ivec)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtps_epi32((__m256)x);
#elif defined(__aarch64__)
    return (ivec)vcvtnq_s32_f32((float32x4_t)x);
#else
    return (ivec)(x + 12582912.0f) - (ivec)splat(12582912.0f);
#endif
}

// Rows as bytes, four to a unit, in the order of Input, padded with zeros. Each row has a scale, so that its largest
// becomes 127; OFFSET_OF_BYTES is added. Cut: Tiles or GroupTiles, of at most ROWS_OF_BYTES rows each.
template <class Cut>
class Bytes {
   public:
    const Cut& tiles;
    float* scales;  // [M]

    Bytes(const void* x, bool is_float, int64_t stride, const Cut& tiles, int64_t K)
        : tiles(tiles), x_(x), is_float_(is_float), stride_(stride), K_(K), units_(divide_up(K, 4)) {
        reserve();
    }

    // To be called by all threads of a team, each with a copy. With few rows each thread converts all of them, which
    // takes less time than waiting for the others.
    void pack() {
        if (tiles.rows <= most_rows(PREPARE_ALONE)) {
            reserve();
            for (int64_t t = 0; t < tiles.count; t++) pack_tile(t);
            return;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles.count; t++) pack_tile(t);
    }

    // Of a tile of R rows.
    template <int R>
    const FourOf<R>* rows(int64_t start) const {
        return reinterpret_cast<const FourOf<R>*>(units_of_rows_ + start * units_);
    }

   private:
    void reserve() {
        units_of_rows_ = scratch<Four, 1>(tiles.rows * units_);
        scales = scratch<float, 2>(tiles.rows);
    }

    void pack_tile(int64_t t) {
        int64_t start = tiles.start(t), count = tiles.start(t + 1) - start;
        Four* to = units_of_rows_ + start * units_;
        if (count <= ROWS_OF_FOURS)
            pack_rows(start, count, reinterpret_cast<uint32_t*>(to));
        else
            pack_rows(start, count, to);
    }

    template <class T>
    INLINE void pack_rows(int64_t start, int64_t count, T* to) {
        uint32_t* row = count == 1 ? reinterpret_cast<uint32_t*>(to) : scratch<uint32_t, 4>(units_);
        for (int64_t r = 0; r < count; r++) {
            if (is_float_)
                quantize(static_cast<const float*>(x_) + (start + r) * stride_, start + r, row);
            else
                quantize(static_cast<const bf16*>(x_) + (start + r) * stride_, start + r, row);
            if (count > 1)
                for (int64_t u = 0; u < units_; u++) to[u * count + r] = four_of<T>(row[u]);
        }
    }

    template <class T>
    void quantize(const T* x, int64_t row, uint32_t* units) {
        uint8_t* to = reinterpret_cast<uint8_t*>(units);
        float most = amax(x, K_), inverse = most > 0 ? 127 / most : 0;
        int64_t k = 0;
        for (; k + LANES <= K_; k += LANES) {
            ivec whole = nearest(load(x + k) * inverse) + OFFSET_OF_BYTES;
            store_bytes(to + k, whole);
        }
        if (k < K_) {
            ivec whole = nearest(load_part(x + k, int(K_ - k)) * inverse) + OFFSET_OF_BYTES;
            for (int i = 0; i < K_ - k; i++) to[k + i] = uint8_t(whole[i]);
        }
        for (k = K_; k < 4 * units_; k++) to[k] = OFFSET_OF_BYTES;
        scales[row] = most / 127;
    }

    const void* x_;
    bool is_float_;
    int64_t stride_, K_, units_;
    Four* units_of_rows_;
};

}  // namespace
