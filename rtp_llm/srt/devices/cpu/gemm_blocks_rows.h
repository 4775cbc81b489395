// Rows of x as bytes for products with blocks: 32 neighbouring inputs have a scale of their own.
#pragma once

#include "gemm_rows.h"

namespace {

constexpr int RUN = 32;           // inputs that are multiplied together, with one scale
constexpr int MOST_TOGETHER = 4;  // runs with one scale
constexpr int MOST_ROWS = 32;     // of a tile, a multiple of ROWS_IN_STEP
constexpr int ROWS_IN_STEP = 4;   // tiles start at a multiple of it
constexpr int64_t RUNS_OF_EACH = 16;  // of a tile's rows, that one thread prepares at a time

// What weights need of the sums of a run's bytes.
struct RunTotals {
    int offset;   // of the weights; 0: totals are wanted as they are
    bool halves;  // each half of a run has a total
    bool paired;  // with an offset: of both halves in 16 bits each, times -offset / 2
};

// A run of one row. The totals are those of its bytes, or of each half's; for weights that have an offset they are whole
// numbers times -offset, from which sums start.
struct Run {
    int8_t bytes[RUN];
    float scale;
    union {
        float totals[2];
        int32_t starts[2];
    };

    INLINE ivec unit(int number) const {
        int32_t bits;
        std::memcpy(&bits, bytes + 4 * number, 4);
        return ivec{} + bits;
    }
};

// Rows cut into tiles: tile t is of rows starts[t] to starts[t + 1].
struct RowTiles {
    std::vector<int64_t> starts{0};

    int64_t count() const { return int64_t(starts.size()) - 1; }

    // Adds tiles of nearly equal size for the next rows.
    void add(int64_t rows) {
        const int64_t first = starts.back(), tiles = divide_up(rows, MOST_ROWS), steps = divide_up(rows, ROWS_IN_STEP);
        for (int64_t t = 1; t <= tiles; t++) starts.push_back(first + std::min(rows, steps * t / tiles * ROWS_IN_STEP));
    }
};

// In a tile of R rows, run g of row r is number g * R + r.
class Runs {
   public:
    // Rows are padded with zeros to `runs`, of which `together` have one scale, and the total of all.
    Runs(const RowTiles& tiles, const void* x, bool is_float, int64_t stride, int64_t K, int64_t runs, int together,
         const RunTotals& totals)
        : starts_(tiles.starts.data()), tiles_(tiles.count()), x_(x), is_float_(is_float), stride_(stride), K_(K),
          runs_(runs), together_(together), totals_(totals) {
        reserve();
    }

    const Run* tile(int64_t number) const { return to_ + starts_[number] * runs_; }

    // To be called by all threads of a team, each with a copy: see Bytes::pack.
    void pack() {
        if (starts_[tiles_] <= most_rows(PREPARE_ALONE)) {
            reserve();
            for (int64_t t = 0; t < tiles_; t++) pack_tile(t, 0, runs_);
            return;
        }
        int64_t pieces = divide_up(runs_, RUNS_OF_EACH);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tiles_ * pieces; i++) {
            int64_t first = i % pieces * RUNS_OF_EACH;
            pack_tile(i / pieces, first, std::min(first + RUNS_OF_EACH, runs_));
        }
    }

   private:
    void reserve() { to_ = scratch<Run, 0>(starts_[tiles_] * runs_); }

    // Writes one place after another: lines of memory go from one processor's cache to another's as few times as may be.
    void pack_tile(int64_t tile, int64_t first, int64_t last) {
        int64_t row = starts_[tile], count = starts_[tile + 1] - row;
        Run* to = to_ + row * runs_ + first * count;
        for (int64_t g = first; g < last; g += together_, to += (together_ - 1) * count)
            for (int64_t r = row; r < row + count; r++, to++) {
                if (is_float_)
                    prepare(static_cast<const float*>(x_) + r * stride_ + g * RUN, K_ - g * RUN, to, count);
                else
                    prepare(static_cast<const bf16*>(x_) + r * stride_ + g * RUN, K_ - g * RUN, to, count);
            }
    }

    // Runs with one scale, `step` apart. rest: inputs that there are from here on.
    template <class T>
    INLINE void prepare(const T* x, int64_t rest, Run* to, int64_t step) const {
        const int64_t inputs = together_ * RUN;
        if (rest >= inputs) return quantize(x, to, step);
        T padded[MOST_TOGETHER * RUN] = {};
        std::copy_n(x, std::max<int64_t>(rest, 0), padded);
        quantize(padded, to, step);
    }

    template <class T>
    INLINE void quantize(const T* x, Run* to, int64_t step) const {
        const float most = amax(x, together_ * RUN), inverse = most > 0 ? 127 / most : 0;
        ivec total[2] = {};
        for (int i = 0; i < together_; i++) {
            for (int k = 0; k < RUN; k += LANES) {
                ivec whole = nearest(load(x + i * RUN + k) * inverse);
                total[2 * k / RUN] += whole;
                store_bytes(to[i * step].bytes + k, whole);
            }
        }
        if (!totals_.halves) total[0] += total[1];
        const int32_t sums[2] = {sum(total[0]), totals_.halves ? sum(total[1]) : 0};
        for (int i = 0; i < together_; i++, to += step) {
            to->scale = most / 127;
            write_totals(*to, sums);
        }
    }

    INLINE void write_totals(Run& to, const int32_t (&sums)[2]) const {
        if (totals_.paired) {
            const int factor = -totals_.offset / 2;
            to.starts[0] = int32_t((uint32_t(factor * sums[0]) & 0xffff) | uint32_t(factor * sums[1]) << 16);
            return;
        }
        for (int half = 0; half <= int(totals_.halves); half++) {
            if (totals_.offset)
                to.starts[half] = -totals_.offset * sums[half];
            else
                to.totals[half] = float(sums[half]);
        }
    }

    const int64_t* starts_;
    int64_t tiles_;
    const void* x_;
    bool is_float_;
    int64_t stride_, K_, runs_;
    int together_;
    RunTotals totals_;
    Run* to_;
};

}  // namespace
