"""What the search for causes works on, and what it returns."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from rtp_llm.tools.verify.boundary_states import StatePair
from rtp_llm.tools.verify.locate import relative_error
from rtp_llm.tools.verify.replay import Replay
from rtp_llm.tools.verify.trace import Place, Trace


@dataclass(frozen=True)
class Finding:
    """The first difference. ``causes`` is empty if no experiment reproduced ours.

    Args:
        is_description: the causes say how ours and the reference's differ, and no experiment reproduced ours.
        look: the module whose code, or the call of which, is to be read; empty: ``module``'s.
    """

    module: str
    part: str
    error: float
    causes: list[str] = field(default_factory=list)
    is_description: bool = False
    look: str = ""

    @property
    def is_explained(self) -> bool:
        return bool(self.causes) and not self.is_description


@dataclass(frozen=True)
class Evidence:
    """Both sides' models and their traces of one prompt.

    Args:
        names: of the reference's modules, as our model file has them.
        states: what both sides keep after each piece of the prompt.
    """

    config: Any
    our_model: nn.Module
    their_model: nn.Module
    ours: Trace
    theirs: Trace
    tolerance: float
    names: dict[nn.Module, str]
    replay: Replay
    states: list[StatePair] = field(default_factory=list)

    def same(self, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        return ours.shape == theirs.shape and relative_error(ours, theirs) <= self.tolerance

    @cached_property
    def their_modules(self) -> dict[str, nn.Module]:
        """The reference's modules by our names."""
        return {name: module for module, name in self.names.items()}

    @cached_property
    def our_modules(self) -> dict[str, nn.Module]:
        return dict(self.our_model.named_modules())

    @cached_property
    def their_parameters(self) -> dict[str, torch.Tensor]:
        """The reference's parameters and buffers, float32 on the host, by our names."""
        return {
            f"{name}.{key}" if name else key: tensor.detach().to("cpu", torch.float32)
            for name, module in self.their_modules.items()
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }

    def wrong_states(self, module: str = "") -> list[StatePair]:
        """Return the states that differ, of a module or of all, those of earlier positions first."""
        return [pair for pair in self.states if module in ("", pair.module) and pair.error > self.tolerance]

    def pair(self, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Return our tensor and the reference's at a place."""
        return self.ours.tensors[place], self.theirs.tensors[place]
