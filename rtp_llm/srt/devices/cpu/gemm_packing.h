// Rows of a weight to units of a panel.
#pragma once

#include "gemm_panels.h"

#include <algorithm>

namespace {

constexpr int64_t UNITS_PACKED = 16;  // of a row at a time: a line of the cache

// Rows of `size` bytes, `stride` apart, of which there are `num_rows` -> the units of a panel [units][PANEL][4 bytes],
// ending in zeros.
inline void pack_units(const char* rows, int64_t stride, int64_t num_rows, int64_t size, int64_t units, char* panel) {
    for (int64_t start = 0; start < units; start += UNITS_PACKED) {
        int64_t end = std::min(start + UNITS_PACKED, units), whole = std::min(end, size / 4);
        for (int64_t n = 0; n < PANEL; n++) {
            const char* row = rows + n * stride;
            bool there = n < num_rows;
            int64_t unit = start;
            if (there)
                for (; unit < whole; unit++) std::memcpy(panel + (unit * PANEL + n) * 4, row + unit * 4, 4);
            for (; unit < end; unit++) {
                std::memset(panel + (unit * PANEL + n) * 4, 0, 4);
                if (there && unit * 4 < size) std::memcpy(panel + (unit * PANEL + n) * 4, row + unit * 4, size % 4);
            }
        }
    }
}

}  // namespace
