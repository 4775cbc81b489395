// Types of blocks: how bytes of weights, their scales and their minima are made of a panel.
//
// A type says how many inputs and bytes a block has, of which fields it consists, and for a run of 32 inputs (`run`: its
// number in the block) and one register of outputs (`v`):
//
//     unit(block, run, u, v)      the bytes of four inputs of each output; `u`: their number in the run
//     scale(block, run, half, v)  of the first or last 16 inputs; without HALVES, half is 0
//     minimum(...)                with MINIMA; same arguments
//
// and with WHOLE_SCALES, where a scale is a whole number of 8 bits times one of the block:
//
//     levels(block, run, v)       the whole numbers of both halves, in 16 bits each
//     common_scale(block, v)
//
// A weight is scale * (byte - OFFSET), or scale * byte - minimum with MINIMA. Bytes are 0 to LARGEST, or SIGNED.
//
// In a panel the blocks of its outputs follow each other by their elements: all outputs' first elements, then all the
// second ones, so that a field which starts at byte `at` of a block starts at byte `at * PANEL` here. Where a type has
// `arrange`, that writes the fields of a block of a file: bits are put where taking them out takes fewest instructions.
// Of the runs of a block every PERIOD-th is read alike.
#pragma once

#include "gemm_blocks_bits.h"

namespace {

constexpr int MOST_BYTES = 256;  // of a block

// Elements of 1, 2 or 4 bytes. SPREAD: words of 32 bits, one for each input, of which byte i is to have those of
// inputs i, i + 4, i + 8, ...
struct Field {
    int size, count;
    bool spread = false;
};

// ---- blocks of 32 inputs

struct Q4_0 {
    static constexpr int INPUTS = 32, BYTES = 18, OFFSET = 8, LARGEST = 15, PERIOD = 1;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = false, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{2, 1}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) { return nibbles(block + 2 * PANEL, 0, u, v); }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
};

struct Q4_1 {
    static constexpr int INPUTS = 32, BYTES = 20, OFFSET = 0, LARGEST = 15, PERIOD = 1;
    static constexpr bool HALVES = false, MINIMA = true, SIGNED = false, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{2, 1}, {2, 1}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) { return nibbles(block + 4 * PANEL, 0, u, v); }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
    static INLINE vec minimum(const uint8_t* block, int, int, int v) { return -half_float(block + 2 * PANEL, v); }
};

struct Q5_0 {
    static constexpr int INPUTS = 32, BYTES = 22, OFFSET = 16, LARGEST = 31, PERIOD = 1;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = false, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{2, 1}, {4, 1, true}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) {
        return nibbles(block + 6 * PANEL, 0, u, v) | low(moved(word(block + 2 * PANEL, 0, v), u, 4), 16);
    }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
};

struct Q5_1 {
    static constexpr int INPUTS = 32, BYTES = 24, OFFSET = 0, LARGEST = 31, PERIOD = 1;
    static constexpr bool HALVES = false, MINIMA = true, SIGNED = false, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{2, 1}, {2, 1}, {4, 1, true}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) {
        return nibbles(block + 8 * PANEL, 0, u, v) | low(moved(word(block + 4 * PANEL, 0, v), u, 4), 16);
    }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
    static INLINE vec minimum(const uint8_t* block, int, int, int v) { return -half_float(block + 2 * PANEL, v); }
};

struct Q8_0 {
    static constexpr int INPUTS = 32, BYTES = 34, OFFSET = 0, LARGEST = 128, PERIOD = 1;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = true, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{2, 1}, {4, 8}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) { return word(block + 2 * PANEL, u, v); }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
};

struct IQ4_NL {
    static constexpr int INPUTS = 32, BYTES = 18, OFFSET = 0, LARGEST = 127, PERIOD = 1;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = true, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{2, 1}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) {
        return IQ4_VALUES.of(nibbles(block + 2 * PANEL, 0, u, v));
    }
    static INLINE vec scale(const uint8_t* block, int, int, int v) { return half_float(block, v); }
};

struct MXFP4 {
    static constexpr int INPUTS = 32, BYTES = 17, OFFSET = 12, LARGEST = 24, PERIOD = 1;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = false, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{1, 1}, {4, 4}};

    static INLINE ivec unit(const uint8_t* block, int, int u, int v) {
        return MXFP4_VALUES.of(nibbles(block + PANEL, 0, u, v));
    }
    // 2 ** (exponent - 128); the two smallest are subnormal
    static INLINE vec scale(const uint8_t* block, int, int, int v) {
        ivec exponent = byte(block, 0, v), small = (exponent << 21) + (1 << 21);
        return (vec)(exponent < 2 ? small : (exponent - 1) << 23);
    }
};

// ---- blocks of our own: a scale and, with ZEROS, a zero for a group of 16 inputs, 32 or more; scale * (level - zero)

template <int GROUP, bool ZEROS>
struct Int4 {
    static constexpr int GROUPS = GROUP < 32 ? 32 / GROUP : 1, HEAD = (ZEROS ? 3 : 2) * GROUPS;  // bytes before levels
    static constexpr int INPUTS = GROUP * GROUPS, BYTES = HEAD + INPUTS / 2, OFFSET = ZEROS ? 0 : 8, LARGEST = 15,
                         PERIOD = 1;
    static constexpr bool HALVES = GROUPS == 2, MINIMA = ZEROS, SIGNED = false, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{2, GROUPS}, {1, ZEROS ? GROUPS : 0}, {4, INPUTS / 8}};

    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return nibbles(block + HEAD * PANEL, 4 * run, u, v);
    }
    static INLINE vec scale(const uint8_t* block, int, int half, int v) {
        return half_float(block + 2 * half * PANEL, v);
    }
    static INLINE vec minimum(const uint8_t* block, int run, int half, int v) {
        return scale(block, run, half, v) * as_float(byte(block + 2 * GROUPS * PANEL, half, v));
    }
};

}  // namespace
