// Attention of models in float32: as attention.cpp.
#include "attention_steps.h"
#include "replay.h"

KERNEL bool paged_attention(const Attention* a) {
    if (a->activations == 0 && a->stored == 0) attend<float, float>(*a);
    else if (a->activations == 0 && a->stored == 1) attend<float, bf16>(*a);
    else if (a->activations == 0 && a->stored == 2) attend<float, int8_t>(*a);
    else return false;
    return true;
}

KERNEL bool write_kv(const Write* w) {
    if (w->activations == 0 && w->stored == 0) write<float, float>(*w);
    else if (w->activations == 0 && w->stored == 1) write<float, bf16>(*w);
    else if (w->activations == 0 && w->stored == 2) write<float, int8_t>(*w);
    else return false;
    return true;
}

REPLAYED(paged_attention)
REPLAYED(write_kv)
