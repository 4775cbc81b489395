// Arguments of the attention kernels.
#pragma once

#include "common.h"

// Filled by devices/cpu/attention.py. Strides are in elements; the last dimension is contiguous everywhere.
struct Attention {
    const void* q;  // [T, num_heads, head_dim]
    int64_t q_token, q_head;
    const void* keys;  // [slots, num_kv_heads, head_dim]
    int64_t key_slot, key_head;
    const void* values;  // [slots, num_kv_heads, v_head_dim]
    int64_t value_slot, value_head;
    const float* key_scales;  // [slots, num_kv_heads], of an int8 cache
    const float* value_scales;
    void* out;  // [T, num_heads, v_head_dim], contiguous
    const int32_t* page_table;
    int64_t table_row, page_size;
    const int32_t* rows;  // per row of the batch: its row of the page table,
    const int32_t* starts;  // the position of its first token,
    const int32_t* counts;  // and the number of tokens that it computes
    int64_t num_rows;
    const int32_t* shared;  // [num_shared, 3]: end (keys begin at the end of the previous prefix), first member, count
    const int32_t* members;  // rows of the batch
    int64_t num_shared;
    const int64_t* visible_ends;  // [T] or null
    const float* sinks;  // [num_heads] or null
    const float* alibi_slopes;  // [num_heads] or null
    int64_t num_heads, num_kv_heads, head_dim, v_head_dim;
    int64_t window;  // visible tokens, the query's own included; 0: all
    int64_t chunk;  // tokens in a chunk, of which a query sees its own alone; 0: no chunks
    double scaling, logit_cap;  // cap 0: none
    int64_t activations, stored;  // 0: float32, 1: bfloat16, 2: int8 (only stored), 3: float16
};

struct Write {
    const void* k;  // [T, num_kv_heads, head_dim]
    int64_t k_token, k_head;
    const void* v;  // [T, num_kv_heads, v_head_dim]; null: latent
    int64_t v_token, v_head;
    void* keys;  // contiguous [slots, num_kv_heads, head_dim]
    void* values;
    float* key_scales;
    float* value_scales;
    const int64_t* slots;  // [T]
    int64_t num_tokens, num_kv_heads, head_dim, v_head_dim;
    int64_t activations, stored;
};
