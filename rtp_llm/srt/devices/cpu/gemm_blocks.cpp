// Linear layers on weights in blocks, GGUF's and those of 4 bits of our own, which stay in their bits: y = x W^T + bias.
//
// A weight [N, K], padded to whole blocks, is packed into panels of PANEL outputs, [panels][blocks][bytes of a
// block][PANEL] by elements, so that a register holds the same element of as many outputs: see gemm_blocks_types.h,
// which has all that differs by type. Rows of x become bytes, with a scale for 32 inputs. For 32 inputs at a time the
// weights of one register of outputs become bytes, in registers, and are multiplied with up to MOST_ROWS rows; sums stay
// in the nearest cache. So with few rows the time is that of reading the weights, and with many, unpacking them hardly
// counts. Threads share the panels; a row's result depends only on that row.
#include "gemm_blocks_tiles.h"
#include "gemm_tiles.h"
#include "replay.h"

namespace {

constexpr int BYTES_ASKED_FOR = 8192;

// Byte i of the result has bits i, i + 4, i + 8, ...
uint32_t spread(uint32_t bits) {
    uint32_t result = 0;
    for (int u = 0; u < 8; u++) result |= (((bits >> 4 * u & 15) * 0x00204081) & 0x01010101) << u;
    return result;
}

// Copies element e to place e * PANEL.
template <class Element>
void scatter(const uint8_t* from, const Field& field, uint8_t* to) {
    for (int e = 0; e < field.count; e++) {
        Element element;
        std::memcpy(&element, from + e * sizeof element, sizeof element);
        if (sizeof element == 4 && field.spread) element = Element(spread(uint32_t(element)));
        std::memcpy(to + e * PANEL * sizeof element, &element, sizeof element);
    }
}

void pack_block(const BlockType& type, const uint8_t* block, int64_t n, uint8_t* to) {
    uint8_t arranged[MOST_BYTES];
    if (type.arrange) {
        type.arrange(block, arranged);
        block = arranged;
    }
    for (int f = 0; f < type.num_fields; f++) {
        const Field& field = type.fields[f];
        uint8_t* at = to + n * field.size;
        if (field.size == 4)
            scatter<uint32_t>(block, field, at);
        else if (field.size == 2)
            scatter<uint16_t>(block, field, at);
        else
            scatter<uint8_t>(block, field, at);
        block += field.size * field.count;
        to += field.size * field.count * PANEL;
    }
}

// One thread's tiles.
class Multiplier {
   public:
    Multiplier(const BlockType& type, int64_t blocks) : type_(type), blocks_(blocks) {}

    // Writes outputs of panel p, or with a gated activation of those of either half, for rows [row, last).
    void compute(const Output& output, const Run* x, int64_t row, int64_t last, const uint8_t* packed, int64_t p) {
        multiply(x, last - row, packed, p, sums_);
        if (output.is_gated()) multiply(x, last - row, packed, output.columns / 2 / PANEL + p, others_);
        for (int64_t r = 0; r < last - row; r++)
            for (int v = 0; v < VECS; v++) {
                if (output.is_gated())
                    output.write_gated(row + r, p * PANEL + v * LANES, sums_[r][v], others_[r][v]);
                else
                    output.write(row + r, p * PANEL + v * LANES, sums_[r][v]);
            }
    }

   private:
    void multiply(const Run* x, int64_t rows, const uint8_t* packed, int64_t p, vec (*sums)[VECS]) {
        type_.tile(x, int(rows), packed + p * blocks_ * type_.bytes * PANEL, blocks_, {sums, whole_});
    }

    const BlockType& type_;
    const int64_t blocks_;
    vec sums_[MOST_ROWS][VECS], others_[MOST_ROWS][VECS];
    ivec whole_[MOST_ROWS][VECS];
};

const void* bias_at(const void* bias, bool is_float, int64_t number) {
    return bias ? static_cast<const char*>(bias) + number * (is_float ? sizeof(float) : sizeof(bf16)) : nullptr;
}

// Asks for the bytes that a thread reads first, before it prepares the rows.
INLINE void ask_for(const uint8_t* packed) {
    for (int at = 0; at < BYTES_ASKED_FOR; at += 64) __builtin_prefetch(packed + at, 0, 2);
}

}  // namespace

// Each function returns whether there is such a type of blocks, and rows_blocks whether all ids are in range. In the
// first two K is a whole number of blocks.

// blocks [N][blocks of a row][bytes of a block] -> packed, ending in zeros.
KERNEL int pack_blocks(int number, const uint8_t* blocks, int64_t N, int64_t K, uint8_t* packed) {
    const BlockType* type = type_numbered(number);
    if (!type) return 0;
    const int64_t count = K / type->inputs, panels = divide_up(N, PANEL), panel_bytes = count * type->bytes * PANEL;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        uint8_t* panel = packed + p * panel_bytes;
        const int64_t rows = std::min<int64_t>(PANEL, N - p * PANEL);
        if (rows < PANEL) std::memset(panel, 0, panel_bytes);
        for (int64_t b = 0; b < count; b++)
            for (int64_t n = 0; n < rows; n++)
                pack_block(*type, blocks + ((p * PANEL + n) * count + b) * type->bytes, n,
                           panel + b * type->bytes * PANEL);
    }
    return 1;
}

// Rows `ids` of the weight -> [count, K] of float32 or bfloat16.
KERNEL int rows_blocks(int number, const uint8_t* packed, const int64_t* ids, int64_t count, int64_t N, int64_t K,
                       void* out, int out_is_float) {
    const BlockType* type = type_numbered(number);
    if (!type) return 0;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= N) return 0;
    const int64_t blocks = K / type->inputs;
#pragma omp parallel for schedule(static) if (count > most_rows(PREPARE_ALONE))
    for (int64_t i = 0; i < count; i++) {
        float* row = out_is_float ? static_cast<float*>(out) + i * K : scratch<float, 6>(K);
        type->row(packed + ids[i] / PANEL * blocks * type->bytes * PANEL, int(ids[i] % PANEL), blocks, row);
        if (!out_is_float)
            for (int64_t k = 0; k < K; k++) static_cast<bf16*>(out)[i * K + k] = from_float<bf16>(row[k]);
    }
    return 1;
}

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gated activation, of bfloat16 or float32 x.
KERNEL int gemm_blocks(int number, const void* x, int x_is_float, int64_t x_stride, int64_t M, const uint8_t* packed,
                       int64_t N, int64_t K, const void* bias, int bias_is_float, void* out, int64_t out_stride,
                       int out_is_float, int activation) {
    const BlockType* type = type_numbered(number);
    if (!type) return 0;
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Activation(activation)};
    RowTiles tiles;
    tiles.add(M);
    const int64_t blocks = divide_up(K, type->inputs);
    const Runs rows(tiles, x, x_is_float != 0, x_stride, K, blocks * type->inputs / RUN, type->together,
                    type->totals);
    Panels panels(output, tiles.count() == 1 ? IN_ORDER : PANELS_AT_ONCE);
#pragma omp parallel
    {
        Runs input = rows;
        Multiplier multiplier(*type, blocks);
        int64_t first, last;
        bool taken = panels.take(first, last);
        if (taken) ask_for(packed + first * blocks * type->bytes * PANEL);
        input.pack();
        for (; taken; taken = panels.take(first, last))
            for (int64_t t = 0; t < tiles.count(); t++)
                for (int64_t p = first; p < last; p++)
                    multiplier.compute(output, input.tile(t), tiles.starts[t], tiles.starts[t + 1], packed, p);
    }
    return 1;
}

// out [M, N] = x [M, K] times the weight, and plus the bias, of each row's group. Rows are sorted by group,
// rows_per_group of each. packed: [groups] weights; bias: [groups][N] or null. Also returns whether groups have M rows
// together.
KERNEL int grouped_gemm_blocks(int number, const void* x, int x_is_float, int64_t x_stride, int64_t M,
                               const int64_t* rows_per_group, int64_t groups, const uint8_t* const* packed, int64_t N,
                               int64_t K, const void* bias, int bias_is_float, void* out, int64_t out_stride,
                               int out_is_float) {
    const BlockType* type = type_numbered(number);
    if (!type) return 0;
    RowTiles tiles;
    std::vector<int64_t> ids, firsts;  // of groups with rows; each one's first tile
    for (int64_t g = 0; g < groups; g++) {
        if (rows_per_group[g] == 0) continue;
        ids.push_back(g);
        firsts.push_back(tiles.count());
        tiles.add(rows_per_group[g]);
    }
    firsts.push_back(tiles.count());
    if (tiles.starts.back() != M) return 0;
    const int64_t blocks = divide_up(K, type->inputs);
    const Runs rows(tiles, x, x_is_float != 0, x_stride, K, blocks * type->inputs / RUN, type->together,
                    type->totals);
    const int64_t panels = divide_up(N, PANEL);
    const int64_t at_once = panels_of_piece(M, int64_t(ids.size()), panels), pieces = divide_up(panels, at_once);
#pragma omp parallel
    {
        Runs input = rows;
        input.pack();
        Multiplier multiplier(*type, blocks);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < int64_t(ids.size()) * pieces; task++) {
            const int64_t i = task / pieces, first = task % pieces * at_once;
            const void* of_group = bias_at(bias, bias_is_float != 0, ids[i] * N);
            Output output{out, out_stride, N, of_group, out_is_float != 0, bias_is_float != 0};
            for (int64_t t = firsts[i]; t < firsts[i + 1]; t++)
                for (int64_t p = first; p < std::min(first + at_once, panels); p++)
                    multiplier.compute(output, input.tile(t), tiles.starts[t], tiles.starts[t + 1], packed[ids[i]], p);
        }
    }
    return 1;
}

// ---- calls from a list

REPLAYED(rows_blocks)
REPLAYED(gemm_blocks)
REPLAYED(grouped_gemm_blocks)
