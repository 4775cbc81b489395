// Norms, gated activations and rotations of bfloat16.
#include "elementwise_kernels.h"

EXPORT_ELEMENTWISE(bf16, bf16)
