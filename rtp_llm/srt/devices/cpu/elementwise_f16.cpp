// Norms, gated activations and rotations of float16.
#include "elementwise_kernels.h"

EXPORT_ELEMENTWISE(f16, f16)
