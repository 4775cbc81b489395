// Linear layers on weights in GGUF's blocks, which stay in their bits: y = x W^T + bias.
//
// A weight [N, K] is packed into panels of PANEL outputs, [panels][blocks][bytes of a block][PANEL] by elements, so that
// a register holds the same element of as many outputs: see gemm_blocks_types.h, which has all that differs by type.
// Rows of x become bytes, with a scale for 32 inputs. For 32 inputs at a time the weights of one register of outputs
// become bytes, in registers, and are multiplied with up to MOST_ROWS rows; sums stay in the nearest cache. So with few
// rows the time is that of reading the weights, and with many, unpacking them hardly counts. Threads share the panels; a
// row's result depends only on that row.
#include "gemm_blocks_tiles.h"
#include "gemm_tiles.h"

namespace {

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

}  // namespace

// Each function returns whether there is such a type of blocks, and rows_blocks whether all ids are in range.

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

// Rows `ids` of the weight -> [count, K].
KERNEL int rows_blocks(int number, const uint8_t* packed, const int64_t* ids, int64_t count, int64_t N, int64_t K,
                       float* out) {
    const BlockType* type = type_numbered(number);
    if (!type) return 0;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= N) return 0;
    const int64_t blocks = K / type->inputs;
#pragma omp parallel for schedule(static) if (count > ROWS_OF_EACH)
    for (int64_t i = 0; i < count; i++)
        type->row(packed + ids[i] / PANEL * blocks * type->bytes * PANEL, int(ids[i] % PANEL), blocks, out + i * K);
    return 1;
}

// out [M, N] = x [M, K] W^T + bias, or [M, N / 2] with a gate, of bfloat16 or float32 x.
KERNEL int gemm_blocks(int number, const void* x, int x_is_float, int64_t x_stride, int64_t M, const uint8_t* packed,
                       int64_t N, int64_t K, const void* bias, int bias_is_float, void* out, int64_t out_stride,
                       int out_is_float, int gate) {
    const BlockType* type = type_numbered(number);
    if (!type) return 0;
    const int64_t blocks = K / type->inputs, panel_bytes = blocks * type->bytes * PANEL;
    Output output{out, out_stride, N, bias, out_is_float != 0, bias_is_float != 0, Gate(gate)};
    const Runs rows(x, x_is_float != 0, x_stride, M, K, type->offset, type->halves);
    Panels panels(output);
#pragma omp parallel
    {
        Runs input = rows;
        input.pack();
        vec sums[MOST_ROWS][VECS], others[MOST_ROWS][VECS];
        int64_t first, last;
        while (panels.take(first, last))
            for (int64_t t = 0; t < input.tiles; t++) {
                const int64_t start = input.start(t);
                const int count = int(input.start(t + 1) - start);
                for (int64_t p = first; p < last; p++) {
                    type->tile(input.tile(t), count, packed + p * panel_bytes, blocks, sums);
                    if (gate) {
                        type->tile(input.tile(t), count, packed + (panels.count + p) * panel_bytes, blocks, others);
                        for (int r = 0; r < count; r++)
                            for (int v = 0; v < VECS; v++)
                                output.write_gated(start + r, p * PANEL + v * LANES, sums[r][v], others[r][v]);
                    } else {
                        for (int r = 0; r < count; r++)
                            for (int v = 0; v < VECS; v++) output.write(start + r, p * PANEL + v * LANES, sums[r][v]);
                    }
                }
            }
    }
    return 1;
}
