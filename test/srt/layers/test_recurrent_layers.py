"""Layers that keep a state: against transformers' modules, cut into steps and waves, and split over ranks."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from recurrent_rows import assert_near, batch_of, load_all, on_ranks, pool_of, rows_of
from torch import nn
from transformers import Mamba2Config, MambaConfig, MiniMaxConfig, RecurrentGemmaConfig
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.mamba.modeling_mamba import MambaMixer as TheirMambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

from rtp_llm.srt.cache.spec import StateSpec, StateTensor
from rtp_llm.srt.forward_batch import StateWave
from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.layers.delta_rule import GatedDeltaRule, log_decay
from rtp_llm.srt.layers.gated_norm import GatedRMSNorm
from rtp_llm.srt.layers.linear_attention import RGLRU, LightningAttention, LinearRecurrence
from rtp_llm.srt.layers.mamba import Mamba2Mixer, MambaMixer
from rtp_llm.srt.state_pool import StatePool

LENGTH = 37


@pytest.fixture(autouse=True)
def seed() -> None:
    value = random.randrange(1 << 31)
    print(f"seed {value}")
    torch.manual_seed(value)


def randomize(module: nn.Module) -> dict[str, torch.Tensor]:
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.4)
    return {name: tensor.detach() for name, tensor in module.named_parameters()}


def in_steps(layer: Any, x: torch.Tensor, *more: torch.Tensor, pool: StatePool | None = None) -> torch.Tensor:
    """One sequence in three steps: a chunk, one that is cut by a save, and single tokens."""
    pool = pool_of(layer) if pool is None else pool
    outputs = [layer(x[:11], *(y[:11] for y in more), batch_of(pool, rows_of([11], [0], [1])))]
    first, second = rows_of([9], [1], [2]), rows_of([14], [2], [1])
    first.tokens, second.tokens = torch.arange(9), torch.arange(9, 23)
    outputs.append(layer(x[11:34], *(y[11:34] for y in more), batch_of(pool, first, second)))
    for t in range(34, LENGTH):
        outputs.append(layer(x[t : t + 1], *(y[t : t + 1] for y in more), batch_of(pool, rows_of([1], [1], [1]))))
    return torch.cat(outputs)


def mamba2_layers(num_groups: int) -> tuple[nn.Module, Any]:
    config = Mamba2Config(
        num_heads=6, head_dim=5, hidden_size=15, expand=2, state_size=7, n_groups=num_groups, conv_kernel=3,
        num_hidden_layers=1, chunk_size=8, use_bias=True, time_step_limit=(0.1, 2.0),
    )  # fmt: skip

    def build() -> nn.Module:
        return Mamba2Mixer(15, 6, 5, num_groups, 7, 3, 0, proj_bias=True, dt_limit=(0.1, 2.0))

    return TheirMamba2Mixer(config, 0).eval(), build


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@torch.no_grad()
def test_mamba2(num_groups: int) -> None:
    theirs, build = mamba2_layers(num_groups)
    weights, x = randomize(theirs), torch.randn(LENGTH, 15)
    expected = theirs(x[None])[0]
    ours = build()
    load_all(ours, weights)
    assert_near(in_steps(ours, x), expected)


@pytest.mark.parametrize(("num_groups", "num_ranks"), [(1, 2), (2, 2), (1, 3), (3, 3)])
def test_mamba2_on_ranks(num_groups: int, num_ranks: int) -> None:
    theirs, build = mamba2_layers(num_groups)
    weights, x = randomize(theirs), torch.randn(LENGTH, 15)
    with torch.no_grad():
        expected = theirs(x[None])[0]
    for result in on_ranks(num_ranks, build, weights, lambda layer: in_steps(layer, x)):
        assert_near(result, expected)


def mamba_layers() -> tuple[nn.Module, Any]:
    config = MambaConfig(
        hidden_size=10, intermediate_size=12, state_size=5, time_step_rank=3, conv_kernel=4, num_hidden_layers=1
    )
    return TheirMambaMixer(config, 0).eval(), lambda: MambaMixer(10, 12, 5, 3, 4, 0)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_mamba(num_ranks: int) -> None:
    theirs, build = mamba_layers()
    weights, x = randomize(theirs), torch.randn(LENGTH, 10)
    with torch.no_grad():
        expected = theirs(x[None])[0]
    for result in on_ranks(num_ranks, build, weights, lambda layer: in_steps(layer, x)):
        assert_near(result, expected)


@torch.no_grad()
def test_lightning_attention() -> None:
    config = MiniMaxConfig(hidden_size=12, num_attention_heads=3, head_dim=4, num_hidden_layers=3, block_size=8)
    config.layer_types = ["linear_attention"] * 3
    theirs = MiniMaxLightningAttention(config, 1)
    x = torch.randn(LENGTH, 12)
    theirs.norm, theirs.out_proj = nn.Identity(), nn.Identity()
    expected = theirs(x[None], None, None)[0][0]
    qkv = theirs.act_fn(theirs.qkv_proj(x)).view(LENGTH, 3, 12)
    layer = LightningAttention(3, 4, theirs.slope_rate.flatten(), 0)
    result = in_steps(layer, *qkv.split(4, dim=-1))
    assert_near(theirs.output_gate(x).sigmoid() * result.flatten(1), expected)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_rg_lru(num_ranks: int) -> None:
    theirs = RecurrentGemmaRglru(RecurrentGemmaConfig(lru_width=12, num_attention_heads=4, num_hidden_layers=1))
    weights, x, positions = randomize(theirs), torch.randn(LENGTH, 12), torch.arange(LENGTH)
    with torch.no_grad():
        expected = theirs(x[None], positions[None])[0]

    def run(layer: Any) -> torch.Tensor:
        width, rank = layer.channels, layer.tp_group.rank
        return in_steps(layer, x[:, rank * width : (rank + 1) * width], positions)

    assert_near(torch.cat(on_ranks(num_ranks, lambda: RGLRU(12, 4, 0), weights, run), dim=1), expected)


@torch.no_grad()
def test_delta_rule_in_a_step_of_several_rows() -> None:
    """Rows of three lengths, one cut by a save, are what each gives alone; the saved state is the one at the cut."""
    layer = GatedDeltaRule(2, 4, 6, 5, layer_id=3)
    assert layer.state_spec() == StateSpec((StateTensor("recurrent", (4, 6, 5), "float32"),))
    q, k, v, a, beta = (torch.randn(24, size) for size in (12, 12, 20, 4, 4))
    tokens = (q, k, v, log_decay(a, -torch.rand(4), torch.randn(4)), beta.sigmoid())

    def alone(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        pool = pool_of(layer)
        result = layer(*(x[start:end] for x in tokens), batch_of(pool, rows_of([end - start], [0], [1])))
        return result, pool.tensor(3, "recurrent")[1]

    pool = pool_of(layer)
    first = rows_of([3, 1, 12], [0, 0, 0], [1, 2, 3])
    first.tokens = torch.arange(16)
    second = rows_of([8], [3], [4])
    second.tokens = torch.arange(16, 24)
    result = layer(*tokens, batch_of(pool, first, second))
    states = pool.tensor(3, "recurrent")
    for start, end, slot in [(0, 3, 1), (3, 4, 2), (4, 16, 3), (4, 24, 4)]:
        expected, state = alone(start, end)
        assert_near(result[start:end], expected)
        assert_near(states[slot], state)


def test_a_batch_without_states_says_so() -> None:
    layer, x = CausalConv1d([4], 3, 0), torch.randn(2, 4)
    with pytest.raises(ValueError, match="gives it a state_pool"):
        layer(x, batch_of(None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gives it state_waves"):
        layer(x, batch_of(pool_of(layer)))


def test_convolution_takes_its_ranks_part_of_each_size() -> None:
    weight, bias = torch.randn(14, 1, 3), torch.randn(14)

    def build() -> CausalConv1d:
        return CausalConv1d([8, 4, 2], 3, 0, bias=True, num_parts=[2, 2, 1])

    layers = on_ranks(2, build, {"weight": weight, "bias": bias}, lambda layer: layer)
    for layer, parts in zip(layers, ([0, 1, 2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 12, 13]), strict=True):
        assert torch.equal(layer.weight, weight[parts, 0].t())
        assert torch.equal(layer.bias, bias[parts])
        assert layer.state_spec() == StateSpec((StateTensor("conv", (2, 8), "float32"),))
    with pytest.raises(ValueError, match=r"expects a tensor of shape \(14, 1, 3\)"):
        load_all(layers[0], {"weight": weight[:12], "bias": bias})


@pytest.mark.parametrize("gates_first", [True, False])
def test_gated_norm_over_ranks(gates_first: bool) -> None:
    for num_groups in (1, 2):
        theirs = FalconH1RMSNormGated(12, 1e-3, num_groups, not gates_first)
        weights, x, gate = randomize(theirs), torch.randn(5, 12), torch.randn(5, 12)
        with torch.no_grad():
            expected = theirs(x[None], gate[None])[0]

        build = partial(GatedRMSNorm, 12, 1e-3, 12 // num_groups, gates_first, is_split=True)
        results = on_ranks(2, build, weights, partial(norm_part, x, gate))
        assert_near(torch.cat(results, dim=1), expected)


def norm_part(x: torch.Tensor, gate: torch.Tensor, norm: Any) -> torch.Tensor:
    part = slice(norm.tp_group.rank * 6, norm.tp_group.rank * 6 + 6)
    return norm(x[:, part], gate[:, part])


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="5 value heads cannot share 2 key heads"):
        GatedDeltaRule(2, 5, 4, 4, 0)
    with pytest.raises(ValueError, match=r"slopes must be of shape \(3,\)"):
        LightningAttention(3, 4, torch.ones(2), 0)
    with pytest.raises(ValueError, match="groups of 8 do not fit 6 components"):
        on_ranks(4, lambda: GatedRMSNorm(24, group_size=8, is_split=True), {}, lambda norm: norm)


def test_waves_are_computed_in_order() -> None:
    """A token's convolution sees what the wave before has stored."""
    layer = CausalConv1d([1], 2, 0)
    layer.weight.data.fill_(1.0)
    waves = []
    for token in range(4):
        wave: StateWave = rows_of([1], [min(token, 1)], [1])
        wave.tokens = torch.tensor([token])
        wave.first_token = token if token > 1 else None  # neighbours are sliced, others gathered
        waves.append(wave)
    result = layer(torch.tensor([[1.0], [2.0], [4.0], [8.0]]), batch_of(pool_of(layer), *waves))
    assert result.flatten().tolist() == [1, 3, 6, 12]


@pytest.mark.parametrize("is_constant", [True, False])
def test_linear_recurrence_of_any_decays(is_constant: bool) -> None:
    x, log_decay = torch.randn(LENGTH, 7), -torch.rand(LENGTH, 7)
    log_decay[20, :3] = -torch.inf
    if is_constant:
        log_decay = log_decay[20].clone()
    h, expected = torch.zeros(7), []
    for token, decay in zip(x, log_decay.exp().expand(LENGTH, 7), strict=True):
        h = decay * h + token
        expected.append(h)
    layer = LinearRecurrence(7, 0)
    if is_constant:
        assert_near(
            in_steps(lambda x, batch: layer(x, log_decay, batch), x, pool=pool_of(layer)), torch.stack(expected)
        )
    else:
        assert_near(in_steps(layer, x, log_decay), torch.stack(expected))


def test_linear_recurrence_of_other_channels_is_refused() -> None:
    layer = LinearRecurrence(7, 0)
    batch = batch_of(pool_of(layer), rows_of([2], [0], [1]))
    with pytest.raises(ValueError, match=r"x must be \[tokens, 7\], not \[2, 8\]"):
        layer(torch.randn(2, 8), torch.zeros(7), batch)
