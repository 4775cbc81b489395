"""Small random values in place of a checkpoint's."""

import zlib

import torch
from torch import nn

from rtp_llm.srt.layers.weights import is_optional


def fill_with_dummy_weights(model: nn.Module) -> None:
    """Fill every parameter and persistent buffer with uniform values in [-0.05, 0.05), integer ones with zero.

    Optional ones keep their defaults.

    The values depend on the name only, so that replicas on other ranks are equal; and on the kind of device, which
    makes them.
    """
    for name, target in model.state_dict(keep_vars=True).items():
        if is_optional(target):
            continue
        if not target.is_floating_point():
            target.zero_()
            continue
        generator = torch.Generator(target.device).manual_seed(zlib.crc32(name.encode()))
        values = torch.rand(target.shape, generator=generator, dtype=torch.float32, device=target.device)
        target.copy_(values.mul_(0.1).sub_(0.05))
