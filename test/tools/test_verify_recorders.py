"""The hooks of ``rtp-llm verify``, where a model is built in an unusual way."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.tools.verify.recorders import RECORDING, OurRecorder, TheirRecorder
from rtp_llm.tools.verify.trace import Trace


class TwoCaches(nn.Module):
    """A layer whose module has its attention and a cache of what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = RadixAttention(1, 1, 1.0, num_kv_heads=1, v_head_dim=8, layer_id=3, window=2)
        self.attn = RadixAttention(2, 4, 0.5, num_kv_heads=2, layer_id=1)


def test_a_further_cache_goes_by_its_own_name() -> None:
    model = nn.ModuleDict({"layer": TwoCaches()})
    recorder = OurRecorder(model, Trace(1))
    layer = model["layer"]
    assert isinstance(layer, TwoCaches)
    assert recorder._attention_name("layer.attn", layer.attn) == "layer"
    assert recorder._attention_name("layer.shift", layer.shift) == "layer.shift"


class PartsWithoutAttention(nn.Module):
    """A reference that has parts without attention, which therefore support none by name."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Linear(2, 2)
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.functions: list[str] = []

    def _can_set_attn_implementation(self) -> bool:
        return True

    def set_attn_implementation(self, name: str) -> None:
        if name == "sdpa":
            raise ValueError("the eye does not support an attention implementation through sdpa")
        self.functions.append(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.eye(x)


def test_a_part_without_attention_does_not_end_the_search() -> None:
    model = PartsWithoutAttention()
    with TheirRecorder(model, Trace(1)):
        assert model.functions == [RECORDING]
    assert model.functions == [RECORDING, "eager"]
    with pytest.raises(AttributeError):
        model.eye.rtp_llm_recorder  # noqa: B018
