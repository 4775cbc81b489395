"""Feed-forward blocks."""

import torch
from torch import nn

from rtp_llm.srt.layers.activation import get_act_and_mul_fn, get_act_fn
from rtp_llm.srt.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix


class GatedMLP(nn.Module):
    """Gated feed-forward block: ``down(act(gate(x)) * up(x))``."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size,
            [intermediate_size] * 2,
            bias=bias,
            quant_config=quant_config,
            prefix=add_prefix("gate_up_proj", prefix),
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            hidden_size,
            bias=bias,
            quant_config=quant_config,
            prefix=add_prefix("down_proj", prefix),
        )
        self.act_fn = get_act_and_mul_fn(hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.down_proj(self.gate_up_proj.activated(x, self.act_fn))
        return x


class UngatedMLP(nn.Module):
    """Feed-forward block without a gate: ``down(act(up(x)))``.

    Args:
        bias: both layers have one.
        names: the checkpoint's, of ``up`` and ``down``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        bias: bool = True,
        names: tuple[str, str] = ("up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        self.names = up, down = names
        prefixes = add_prefix(up, prefix), add_prefix(down, prefix)
        self.add_module(
            up,
            ColumnParallelLinear(hidden_size, intermediate_size, bias, quant_config=quant_config, prefix=prefixes[0]),
        )
        self.add_module(
            down, RowParallelLinear(intermediate_size, hidden_size, bias, quant_config=quant_config, prefix=prefixes[1])
        )
        self.act_fn = get_act_fn(hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (self.get_submodule(name) for name in self.names)
        x, _ = up(x)
        x, _ = down(self.act_fn(x))
        return x


class VisionMLP(nn.Module):
    """``fc2(act(fc1(x)))``."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(
            hidden_size, intermediate_size, quant_config=quant_config, prefix=add_prefix("fc1", prefix)
        )
        self.fc2 = RowParallelLinear(
            intermediate_size, hidden_size, quant_config=quant_config, prefix=add_prefix("fc2", prefix)
        )
        self.act_fn = get_act_fn(hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.fc1(x)
        x, _ = self.fc2(self.act_fn(x))
        return x
