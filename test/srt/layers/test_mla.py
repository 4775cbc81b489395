"""Latent attention in vLLM's form against the model file of DeepSeek-V2, which is tested against transformers."""

from typing import Any

import pytest
import torch
import transformers
from dense_forward import make_batch
from torch import nn

from rtp_llm.models_py.deepseek_v2 import DeepseekV2Attention
from rtp_llm.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from rtp_llm.srt.layers.mla import MLAModules, MultiHeadLatentAttentionWrapper
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.rotary_embedding import get_rope
from rtp_llm.srt.models.weight_loading import load_weights_declaratively

HIDDEN, HEADS, NOPE, ROPE, VALUE, LATENT, LOW_RANK = 24, 3, 6, 4, 5, 10, 7


def config_of(q_lora_rank: int | None, rope: dict[str, Any]) -> transformers.DeepseekV2Config:
    return transformers.DeepseekV2Config(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        kv_lora_rank=LATENT,
        q_lora_rank=q_lora_rank,
        max_position_embeddings=64,
        rope_parameters=rope,
    )


class Block(nn.Module):
    """As the attention block of vLLM's file is written."""

    packed_modules_mapping = {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}

    def __init__(self, config: Any, scale: float, is_gated: bool = False, has_output: bool = True) -> None:
        super().__init__()
        query_size, rank = HEADS * (NOPE + ROPE), config.q_lora_rank
        if rank is None:
            self.q_proj = ColumnParallelLinear(HIDDEN, query_size, bias=False)
            self.kv_a_proj_with_mqa = ReplicatedLinear(HIDDEN, LATENT + ROPE, bias=False)
        else:
            self.fused_qkv_a_proj = MergedColumnParallelLinear(
                HIDDEN, [rank, LATENT + ROPE], bias=False, disable_tp=True
            )
            self.q_a_layernorm = RMSNorm(rank)
            self.q_b_proj = ColumnParallelLinear(rank, query_size, bias=False)
        self.kv_a_layernorm = RMSNorm(LATENT)
        self.kv_b_proj = ColumnParallelLinear(LATENT, HEADS * (NOPE + VALUE), bias=False)
        self.o_proj = RowParallelLinear(HEADS * VALUE, HIDDEN, bias=False)
        self.g_proj = ColumnParallelLinear(HIDDEN, HEADS * VALUE, bias=False) if is_gated else None
        rope = dict(config.rope_parameters)
        if rope["rope_type"] == "yarn":
            rope["rope_type"] = "deepseek_yarn"
        modules = MLAModules(
            kv_a_layernorm=self.kv_a_layernorm,
            kv_b_proj=self.kv_b_proj,
            rotary_emb=get_rope(ROPE, 64, is_neox_style=False, rope_parameters=rope),
            o_proj=self.o_proj if has_output else nn.Identity(),
            fused_qkv_a_proj=getattr(self, "fused_qkv_a_proj", None),
            kv_a_proj_with_mqa=getattr(self, "kv_a_proj_with_mqa", None),
            q_a_layernorm=getattr(self, "q_a_layernorm", None),
            q_b_proj=getattr(self, "q_b_proj", None),
            q_proj=getattr(self, "q_proj", None),
            g_proj=self.g_proj,
        )
        sizes = (HIDDEN, HEADS, scale, NOPE, ROPE, VALUE, rank, LATENT)
        self.mla_attn = MultiHeadLatentAttentionWrapper(*sizes, modules, prefix="model.layers.3.self_attn")


def randomised(module: nn.Module) -> dict[str, torch.Tensor]:
    for parameter in module.parameters():
        parameter.data.normal_()
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("q_lora_rank", [None, LOW_RANK])
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_as_the_model_file(q_lora_rank: int | None, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 100.0}
    if kind == "yarn":
        rope |= {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.8}
    config = config_of(q_lora_rank, rope)
    theirs = DeepseekV2Attention(config, 0)
    weights = randomised(theirs)
    ours = Block(config, theirs.attn.scaling)
    load_weights_declaratively(ours, weights.items())
    theirs.finish_load(), ours.mla_attn.finish_load()
    assert ours.mla_attn.attn.layer_id == 3 and not list(ours.mla_attn.parameters())
    x = torch.randn(9, HIDDEN)
    batch = make_batch(list(range(9)), 0, 9)
    expected = theirs(batch.positions, x, batch)
    batch = make_batch(list(range(9)), 0, 9)
    torch.testing.assert_close(ours.mla_attn(batch.positions, x, batch), expected, atol=1e-4, rtol=1e-4)


def test_a_gate_and_a_factor_of_queries() -> None:
    """A factor of queries is one of scores; the gate multiplies what o_proj gets."""
    config, x = config_of(None, {"rope_type": "default", "rope_theta": 100.0}), torch.randn(5, HIDDEN)

    def output_of(block: Block, factor: torch.Tensor | None = None) -> torch.Tensor:
        block.load_state_dict(weights, strict=False)
        block.mla_attn.finish_load()
        batch = make_batch(list(range(5)), 0, 5)
        return block.mla_attn(batch.positions, x, batch, factor)

    weights = randomised(Block(config, 0.3, is_gated=True))
    gated = output_of(Block(config, 0.3, is_gated=True, has_output=False), torch.full((5, 1, 1), 2.0))
    plain = output_of(Block(config, 0.6, has_output=False))
    torch.testing.assert_close(gated, plain * (x @ weights["g_proj.weight"].T).sigmoid(), atol=1e-4, rtol=1e-4)


def test_what_is_not_supported() -> None:
    one = nn.Identity()
    needed = {"kv_a_layernorm": one, "kv_b_proj": one, "rotary_emb": None, "o_proj": one}
    with pytest.raises(ValueError, match="chosen tokens"):
        MLAModules(**needed, q_proj=one, kv_a_proj_with_mqa=one, indexer=one)
    with pytest.raises(ValueError, match="chosen tokens"):
        MLAModules(**needed, q_proj=one, kv_a_proj_with_mqa=one, is_sparse=True)
    with pytest.raises(ValueError, match="needs kv_a_proj_with_mqa and q_proj, or"):
        MLAModules(**needed, q_proj=one)
