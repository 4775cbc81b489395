"""Layers that keep a state, under the names and with the arguments that vLLM's model files have, against those of
transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrent_rows import assert_near, batch_of, pool_of, rows_of
from torch import nn
from transformers import (
    FalconH1Config,
    FalconMambaConfig,
    JambaConfig,
    Lfm2Config,
    OlmoHybridConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer, compute_mup_vector
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from rtp_llm.srt.layers import recurrent
from rtp_llm.srt.layers.weights import declared_sources, fill

PREFIX = "model.layers.3.mixer"
LENGTH, SIZE = 13, 24
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5}
SPLIT = {"in_proj_qkv": ("in_proj_qkvz", (0, 1, 2)), "in_proj_z": ("in_proj_qkvz", 3)}
SPLIT |= {"in_proj_b": ("in_proj_ba", 0), "in_proj_a": ("in_proj_ba", 1)}
PACKED = {f"{name}_proj": ("in_proj_qkvg", number) for number, name in enumerate("qkvg")}
PACKED |= {f"{name}_conv1d": ("conv1d", number) for number, name in enumerate("qkv")}
Case = tuple[nn.Module, nn.Module, dict[str, Any], dict[str, Any]]  # theirs, ours, packed names, arguments of ours


def jamba() -> Case:
    config = JambaConfig(hidden_size=SIZE, mamba_d_state=5, mamba_dt_rank=3)
    ours = recurrent.MambaMixer(SIZE, 5, 4, 2 * SIZE, 3, True, False, True, rms_norm_eps=1e-6, prefix=PREFIX)
    return JambaMambaMixer(config, 0), ours, {}, {}


def falcon_mamba() -> Case:
    config = FalconMambaConfig(hidden_size=SIZE, intermediate_size=30, state_size=5, time_step_rank=3)
    options = {"use_rms_norm": True, "rms_norm_has_weight": False, "rms_norm_eps": config.mixer_rms_eps}
    ours = recurrent.MambaMixer(SIZE, 5, 4, 30, 3, use_conv_bias=True, use_bias=False, prefix=PREFIX, **options)
    return FalconMambaMixer(config, 0, initialize_mixer_weights=False), ours, {}, {}


def falcon_h1() -> Case:
    config = FalconH1Config(
        hidden_size=SIZE, mamba_d_ssm=24, mamba_n_heads=4, mamba_d_head=6, mamba_n_groups=2, mamba_d_state=5,
        mamba_rms_norm=True, mamba_norm_before_gate=False, ssm_multipliers=[0.5, 2.0, 0.7, 1.5, 3.0],
        mamba_chunk_size=8,
    )  # fmt: skip
    theirs = FalconH1Mixer(config, 0)
    theirs.register_buffer("mup_vector", compute_mup_vector(config), persistent=False)
    options = {"n_groups": 2, "num_heads": 4, "head_dim": 6, "rms_norm_eps": config.rms_norm_eps, "prefix": PREFIX}
    ours = recurrent.MambaMixer2(SIZE, 5, 4, 24, use_conv_bias=True, use_bias=False, **options)
    assert ours.n_groups == 2
    return theirs, ours, {}, {"mup_vector": theirs.mup_vector.view(1, -1)}


def lfm2() -> Case:
    config = Lfm2Config(hidden_size=SIZE, conv_bias=True, num_hidden_layers=1, layer_types=["conv"])
    ours = recurrent.ShortConv(config, SIZE, layer_idx=3, prefix=PREFIX)
    return Lfm2ShortConv(config, 0), ours, {}, {}


def qwen3_next() -> Case:
    config = Qwen3NextConfig(hidden_size=SIZE, num_hidden_layers=1, **LINEAR)
    ours = recurrent.QwenGatedDeltaNetAttention(config, prefix=PREFIX, gqa_interleaved_layout=True)
    return Qwen3NextGatedDeltaNet(config, 0), ours, {}, {}


def qwen3_5() -> Case:
    config = Qwen3_5TextConfig(hidden_size=SIZE, num_hidden_layers=1, **LINEAR)
    ours = recurrent.QwenGatedDeltaNetAttention(config, prefix=PREFIX)
    return Qwen3_5GatedDeltaNet(config, 0), ours, SPLIT, {}


def olmo_hybrid() -> Case:
    kinds = ["linear_attention", "full_attention"]
    options = LINEAR | {"layer_types": kinds, "linear_allow_neg_eigval": True}
    config = OlmoHybridConfig(hidden_size=SIZE, num_hidden_layers=2, **options)
    ours = recurrent.OlmoHybridGatedDeltaNetAttention(config, prefix=PREFIX)
    return OlmoHybridGatedDeltaNet(config, 0), ours, PACKED, {}


def load(layer: nn.Module, weights: dict[str, torch.Tensor], packed: dict[str, Any]) -> None:
    sources, loaded = declared_sources(layer), set()
    for name, tensor in weights.items():
        module, _, last = name.rpartition(".")
        holder, shard_id = packed.get(module, (module, None))
        target, own_id = sources.get(name, (f"{holder}.{last}".removeprefix("."), shard_id))
        fill(layer.get_parameter(target), tensor, own_id)
        loaded.add(target)
    assert loaded == {name for name, _ in layer.named_parameters()}


@pytest.mark.parametrize("make", [jamba, falcon_mamba, falcon_h1, lfm2, qwen3_next, qwen3_5, olmo_hybrid])
@torch.no_grad()
def test_a_layer_computes_what_transformers_does(make: Callable[[], Case]) -> None:
    torch.manual_seed(5)
    theirs, ours, packed, arguments = make()
    for parameter in theirs.parameters():
        parameter.copy_(0.4 * torch.randn_like(parameter))
    load(ours, dict(theirs.named_parameters()), packed)
    x = torch.randn(LENGTH, SIZE)
    expected = theirs.eval()(x[None])
    pool = pool_of(ours)
    batches = [batch_of(pool, rows_of([7], [0], [1])), batch_of(pool, rows_of([LENGTH - 7], [1], [1]))]
    parts = [ours(part, batch, **arguments) for part, batch in zip((x[:7], x[7:]), batches, strict=True)]
    assert_near(torch.cat(parts), (expected[0] if isinstance(expected, tuple) else expected)[0])
    assert {layer_id for layer_id, _ in pool.group.layers} == {3}


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"intermediate_size must be num_heads \* head_dim, 4 \* 6, not 25"):
        recurrent.MambaMixer2(SIZE, 5, 4, 25, True, False, num_heads=4, head_dim=6, prefix=PREFIX)
