// Norms, gated activations and rotations of float32.
#include "elementwise_kernels.h"

EXPORT_ELEMENTWISE(f32, float)
