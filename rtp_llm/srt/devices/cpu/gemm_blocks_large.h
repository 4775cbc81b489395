// Types of blocks of 256 inputs: see gemm_blocks_types.h.
#pragma once

#include "gemm_blocks_types.h"

namespace {

// They are arranged in parts of one run, two or four, each of which has its scales first, and then its units. So a block
// is read from its beginning to its end, and the processor itself reads ahead.

// Eight units of a run, from words in which each has BITS bits of every byte, those of `number` after each other.
INLINE uint32_t bits_of(const uint8_t* words, int word, int number, int bits) {
    uint32_t value;
    std::memcpy(&value, words + 4 * word, 4);
    return value >> number * bits & ((1u << bits) - 1) * 0x01010101;
}

// Four numbers of 6 bits in three bytes, as SixBits has units.
INLINE void pack_numbers(const uint8_t* numbers, uint8_t* to) {
    for (int i = 0; i < 3; i++) to[i] = uint8_t(numbers[i] | (numbers[3] >> 2 * i & 3) << 6);
}

INLINE ivec number_of(const uint8_t* at, int number, int v) {
    if (number < 3) return byte(at, number, v) & 63;
    return byte(at, 0, v) >> 6 | byte(at, 1, v) >> 6 << 2 | byte(at, 2, v) >> 6 << 4;
}

struct Q2_K {
    static constexpr int INPUTS = 256, BYTES = 84, OFFSET = 0, LARGEST = 3, PERIOD = 1, RUN_BYTES = 10;
    static constexpr bool HALVES = true, MINIMA = true, SIGNED = false, WHOLE_SCALES = true;
    static constexpr Field FIELDS[] = {{2, 1}, {2, 1}, {2, 1}, {4, 2}, {2, 1}, {4, 2}, {2, 1}, {4, 2}, {2, 1},
                                       {4, 2}, {2, 1}, {4, 2}, {2, 1}, {4, 2}, {2, 1}, {4, 2}, {2, 1}, {4, 2}};

    // ggml: a scale and a minimum of 4 bits for each half of a run; units of 128 inputs, twice; those of all.
    static void arrange(const uint8_t* block, uint8_t* to) {
        std::memcpy(to, block + 80, 4);
        to += 4;
        for (int run = 0; run < 8; run++) {
            uint32_t units[8];
            for (int u = 0; u < 8; u++) units[u] = bits_of(block + 16, run / 4 * 8 + u, run % 4, 2);
            std::memcpy(to, block + 2 * run, 2);
            to = write_run<TwoBits>(units, to + 2);
        }
    }

    static INLINE const uint8_t* part(const uint8_t* block, int run) { return block + (4 + run * RUN_BYTES) * PANEL; }
    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return TwoBits::unit(part(block, run) + 2 * PANEL, u, v);
    }
    static INLINE ivec levels(const uint8_t* block, int run, int v) {
        return signed_bytes(part(block, run), 0, v) & 0x000f000f;
    }
    static INLINE vec common_scale(const uint8_t* block, int v) { return half_float(block, v); }
    static INLINE vec scale(const uint8_t* block, int run, int half, int v) {
        return common_scale(block, v) * as_float(signed_bytes(part(block, run), 0, v) >> 16 * half & 15);
    }
    static INLINE vec minimum(const uint8_t* block, int run, int half, int v) {
        const ivec least = signed_bytes(part(block, run), 0, v) >> (16 * half + 4) & 15;
        return half_float(block + 2 * PANEL, v) * as_float(least);
    }
};

struct Q3_K {
    static constexpr int INPUTS = 256, BYTES = 110, OFFSET = 4, LARGEST = 7, PERIOD = 2, PART_BYTES = 27;
    static constexpr bool HALVES = true, MINIMA = false, SIGNED = false, WHOLE_SCALES = true;
    static constexpr Field FIELDS[] = {{2, 1}, {1, 3}, {4, 6}, {1, 3}, {4, 6}, {1, 3}, {4, 6}, {1, 3}, {4, 6}};

    // ggml: the third bit of each unit; the lower two, of 128 inputs, twice; scales of 6 bits; one for all.
    static void arrange(const uint8_t* block, uint8_t* to) {
        const uint8_t* scales = block + 96;
        std::memcpy(to, block + 108, 2);
        to += 2;
        for (int run = 0; run < 8; run++) {
            uint32_t units[8];
            for (int u = 0; u < 8; u++)
                units[u] = bits_of(block + 32, run / 4 * 8 + u, run % 4, 2) | bits_of(block, u, run, 1) << 2;
            if (run % 2 == 0) {
                uint8_t numbers[4];
                for (int i = 0, n = 2 * run; i < 4; i++, n++)
                    numbers[i] = uint8_t((scales[n % 8] >> n / 8 * 4 & 15) | (scales[8 + n % 4] >> n / 4 * 2 & 3) << 4);
                pack_numbers(numbers, to);
                to += 3;
            }
            to = write_run<ThreeBits>(units, to);
        }
    }

    static INLINE const uint8_t* part(const uint8_t* block, int run) {
        return block + (2 + run / 2 * PART_BYTES) * PANEL;
    }
    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return ThreeBits::unit(part(block, run) + (3 + run % 2 * 12) * PANEL, u, v);
    }
    static INLINE ivec levels(const uint8_t* block, int run, int v) {
        const uint8_t* at = part(block, run);
        const ivec both = number_of(at, run % 2 * 2, v) | number_of(at, run % 2 * 2 + 1, v) << 16;
        return (ivec)((svec)both - (svec)(ivec{} + 0x00200020));
    }
    static INLINE vec common_scale(const uint8_t* block, int v) { return half_float(block, v); }
    static INLINE vec scale(const uint8_t* block, int run, int half, int v) {
        return common_scale(block, v) * as_float(number_of(part(block, run), run % 2 * 2 + half, v) - 32);
    }
};

// Of Q4_K and Q5_K: a scale and a minimum of 6 bits for each run.
template <int PART_BYTES>
struct Steps {
    // ggml: the first four of each are whole, the others are put together.
    static void pack(const uint8_t* steps, int run, uint8_t* to) {
        uint8_t numbers[4];
        for (int i = 0; i < 2; i++, run++) {
            numbers[2 * i] = run < 4 ? steps[run] & 63 : uint8_t((steps[run + 4] & 15) | steps[run - 4] >> 6 << 4);
            numbers[2 * i + 1] = run < 4 ? steps[run + 4] & 63 : uint8_t(steps[run + 4] >> 4 | steps[run] >> 6 << 4);
        }
        pack_numbers(numbers, to);
    }

    static INLINE const uint8_t* part(const uint8_t* block, int run) {
        return block + (4 + run / 2 * PART_BYTES) * PANEL;
    }
    static INLINE vec scale(const uint8_t* block, int run, int, int v) {
        return half_float(block, v) * as_float(number_of(part(block, run), run % 2 * 2, v));
    }
    static INLINE vec minimum(const uint8_t* block, int run, int, int v) {
        return half_float(block + 2 * PANEL, v) * as_float(number_of(part(block, run), run % 2 * 2 + 1, v));
    }
};

struct Q4_K : Steps<35> {
    static constexpr int INPUTS = 256, BYTES = 144, OFFSET = 0, LARGEST = 15, PERIOD = 2;
    static constexpr bool HALVES = false, MINIMA = true, SIGNED = false, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{2, 1}, {2, 1}, {1, 3}, {4, 8}, {1, 3}, {4, 8}, {1, 3}, {4, 8}, {1, 3}, {4, 8}};

    // ggml: a scale and a minimum of all; those of runs; units of 64 inputs, four times.
    static void arrange(const uint8_t* block, uint8_t* to) {
        std::memcpy(to, block, 4);
        to += 4;
        for (int run = 0; run < 8; run++) {
            uint32_t units[8];
            for (int u = 0; u < 8; u++) units[u] = bits_of(block + 16, run / 2 * 8 + u, run % 2, 4);
            if (run % 2 == 0) pack(block + 4, run, to), to += 3;
            to = write_run<FourBits>(units, to);
        }
    }

    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return FourBits::unit(part(block, run) + (3 + run % 2 * 16) * PANEL, u, v);
    }
};

struct Q5_K : Steps<43> {
    static constexpr int INPUTS = 256, BYTES = 176, OFFSET = 0, LARGEST = 31, PERIOD = 2;
    static constexpr bool HALVES = false, MINIMA = true, SIGNED = false, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{2, 1},  {2, 1}, {1, 3},  {4, 10}, {1, 3},
                                       {4, 10}, {1, 3}, {4, 10}, {1, 3},  {4, 10}};

    // ggml: as Q4_K, and before the units the fifth bit of each.
    static void arrange(const uint8_t* block, uint8_t* to) {
        std::memcpy(to, block, 4);
        to += 4;
        for (int run = 0; run < 8; run++) {
            uint32_t units[8];
            for (int u = 0; u < 8; u++)
                units[u] = bits_of(block + 48, run / 2 * 8 + u, run % 2, 4) | bits_of(block + 16, u, run, 1) << 4;
            if (run % 2 == 0) pack(block + 4, run, to), to += 3;
            to = write_run<FiveBits>(units, to);
        }
    }

    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return FiveBits::unit(part(block, run) + (3 + run % 2 * 20) * PANEL, u, v);
    }
};

struct Q6_K {
    static constexpr int INPUTS = 256, BYTES = 210, OFFSET = 32, LARGEST = 63, PERIOD = 1, RUN_BYTES = 26;
    static constexpr bool HALVES = true, MINIMA = false, SIGNED = false, WHOLE_SCALES = true;
    static constexpr Field FIELDS[] = {{2, 1}, {2, 1}, {4, 6}, {2, 1}, {4, 6}, {2, 1}, {4, 6}, {2, 1}, {4, 6},
                                       {2, 1}, {4, 6}, {2, 1}, {4, 6}, {2, 1}, {4, 6}, {2, 1}, {4, 6}};

    // ggml: the lower four bits of 128 inputs, twice; the upper two, twice; scales of 8 bits; one for all.
    static void arrange(const uint8_t* block, uint8_t* to) {
        std::memcpy(to, block + 208, 2);
        to += 2;
        for (int run = 0; run < 8; run++) {
            uint32_t units[8];
            for (int u = 0; u < 8; u++)
                units[u] = bits_of(block, run / 4 * 16 + run % 2 * 8 + u, run % 4 / 2, 4) |
                           bits_of(block + 128, run / 4 * 8 + u, run % 4, 2) << 4;
            std::memcpy(to, block + 192 + 2 * run, 2);
            to = write_run<SixBits>(units, to + 2);
        }
    }

    static INLINE const uint8_t* part(const uint8_t* block, int run) { return block + (2 + run * RUN_BYTES) * PANEL; }
    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return SixBits::unit(part(block, run) + 2 * PANEL, u, v);
    }
    static INLINE ivec levels(const uint8_t* block, int run, int v) { return signed_bytes(part(block, run), 0, v); }
    static INLINE vec common_scale(const uint8_t* block, int v) { return half_float(block, v); }
    static INLINE vec scale(const uint8_t* block, int run, int half, int v) {
        const ivec both = levels(block, run, v);
        return common_scale(block, v) * as_float(half ? both >> 16 : both << 16 >> 16);
    }
};

struct IQ4_XS {
    static constexpr int INPUTS = 256, BYTES = 136, OFFSET = 0, LARGEST = 127, PERIOD = 4, PART_BYTES = 67;
    static constexpr bool HALVES = false, MINIMA = false, SIGNED = true, WHOLE_SCALES = false;
    static constexpr Field FIELDS[] = {{2, 1}, {1, 3}, {4, 16}, {1, 3}, {4, 16}};

    // ggml: a scale of all; of the 6 bits of those of runs the upper two, and the lower four; units.
    static void arrange(const uint8_t* block, uint8_t* to) {
        const int upper = block[2] | block[3] << 8;
        std::memcpy(to, block, 2);
        to += 2;
        for (int run = 0; run < 8; run += 4, to += PART_BYTES) {
            uint8_t numbers[4];
            for (int i = 0, n = run; i < 4; i++, n++)
                numbers[i] = uint8_t((block[4 + n / 2] >> n % 2 * 4 & 15) | (upper >> 2 * n & 3) << 4);
            pack_numbers(numbers, to);
            std::memcpy(to + 3, block + 8 + run * 16, 64);
        }
    }

    static INLINE const uint8_t* part(const uint8_t* block, int run) {
        return block + (2 + run / 4 * PART_BYTES) * PANEL;
    }
    static INLINE ivec unit(const uint8_t* block, int run, int u, int v) {
        return IQ4_VALUES.of(nibbles(part(block, run) + 3 * PANEL, run % 4 * 4, u, v));
    }
    static INLINE vec scale(const uint8_t* block, int run, int, int v) {
        return half_float(block, v) * as_float(number_of(part(block, run), run % 4, v) - 32);
    }
};

// The type's `arrange`, or null.
template <class T>
constexpr auto arrange_of(T*) -> decltype(&T::arrange) {
    return &T::arrange;
}

template <class T>
constexpr auto arrange_of(...) -> void (*)(const uint8_t*, uint8_t*) {
    return nullptr;
}

}  // namespace
