// Norms, gated activations and rotations of float32 and bfloat16.
#include "elementwise_kernels.h"

EXPORT_ELEMENTWISE(f32, float)
EXPORT_ELEMENTWISE(bf16, bf16)
