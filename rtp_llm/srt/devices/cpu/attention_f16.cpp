// Attention of models in float16: as attention.cpp.
#include "attention_steps.h"
#include "replay.h"

KERNEL bool paged_attention(const Attention* a) {
    if (a->activations == 3 && a->stored == 3) attend<f16, f16>(*a);
    else if (a->activations == 3 && a->stored == 2) attend<f16, int8_t>(*a);
    else return false;
    return true;
}

KERNEL bool write_kv(const Write* w) {
    if (w->activations == 3 && w->stored == 3) write<f16, f16>(*w);
    else if (w->activations == 3 && w->stored == 2) write<f16, int8_t>(*w);
    else return false;
    return true;
}

REPLAYED(paged_attention)
REPLAYED(write_kv)
