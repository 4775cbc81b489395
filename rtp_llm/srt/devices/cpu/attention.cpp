// Attention over a paged cache, and writes to that cache.
//
// Softmax is computed online (Milakov and Gimelshein, 2018; FlashAttention: Dao et al., 2022), with powers of two
// instead of e. Work is cut into items, which run on any thread in any order. An item with only a part of a query's
// keys writes a partial result (weighted sum, maximum, sum of weights), and a second pass merges these. The cuts of a
// row depend only on its own length, never on the batch or on the number of threads.
//
//   narrow items: one token, few query heads per key head (decode). Keys and values are read in place, once, at the
//       speed of memory; each product ends in a horizontal sum.
//   wide items: a block of queries ("columns") by one key head. Products are tiles of registers: rows of the cache, one
//       32-bit unit broadcast at a time, by vectors of columns. Scores are transposed, [keys, columns], so that softmax
//       needs no horizontal operation.
#include "attention_steps.h"
#include "replay.h"

// Of models in bfloat16; attention_f32.cpp and attention_f16.cpp have the others. Both return false if there is no code
// for the pair of types.
KERNEL bool paged_attention(const Attention* a) {
    if (a->activations == 1 && a->stored == 1) attend<bf16, bf16>(*a);
    else if (a->activations == 1 && a->stored == 2) attend<bf16, int8_t>(*a);
    else return false;
    return true;
}

KERNEL bool write_kv(const Write* w) {
    if (w->activations == 1 && w->stored == 1) write<bf16, bf16>(*w);
    else if (w->activations == 1 && w->stored == 2) write<bf16, int8_t>(*w);
    else return false;
    return true;
}

// ---- calls from a list

REPLAYED(paged_attention)
REPLAYED(write_kv)
