"""OLMo Hybrid (Ai2, 2026): three layers of Gated DeltaNet, which keep a state, to each of OLMo 2's attention."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import LlamaDecoderLayer, LlamaForCausalLM
from rtp_llm.models_py.olmo2 import Olmo2Attention, Olmo2Model, Olmo2RMSNorm
from rtp_llm.srt.distributed.parallel_state import get_tp_group
from rtp_llm.srt.layers.gated_delta_net import GatedDeltaNet
from rtp_llm.srt.layers.gated_norm import GatedRMSNorm
from rtp_llm.srt.layers.linear import MergedColumnParallelLinear
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import NoPositions
from rtp_llm.srt.layers.weights import ShardId, make_parameter
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class OlmoHybridAttention(Olmo2Attention):
    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        """Published checkpoints have no positions in attention: the other layers' states have an order."""
        has_positions = bool(config.rope_parameters) and config.rope_parameters.get("rope_theta") is not None
        return super().make_rope(config, layer_id) if has_positions else NoPositions()


class OlmoHybridGatedDeltaNet(GatedDeltaNet):
    """Gated DeltaNet that may write up to twice a token's value, so that a state can change its sign."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, quant_config, prefix)
        self.most_written = 2.0 if config.linear_allow_neg_eigval else 1.0
        self.norm = GatedRMSNorm(self.v_dim, 1e-5)
        self.conv1d.weight = make_parameter(self.conv1d.weight.data, self._load_filters)
        self._filters: dict[ShardId, torch.Tensor] = {}

    def _load_filters(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        """Load the filters of queries, keys and values as one: transformers saves them cut into equal thirds."""
        self._filters[shard_id] = tensor
        if shard_id is None or len(self._filters) == 3:
            self.conv1d.weight_loader(
                param, torch.cat([self._filters[part] for part in sorted(self._filters, key=str)])
            )
            self._filters.clear()

    def make_projections(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        ranks = get_tp_group().world_size
        own_sizes = [self.k_size, self.k_size, self.v_size, self.v_size, self.num_v_heads, self.num_v_heads]
        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [ranks * size for size in own_sizes],
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("in_proj", prefix),
        )
        self.sizes = [2 * self.k_size + self.v_size, *own_sizes[3:]]

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        projected, _ = self.in_proj(hidden_states)
        qkv, gate, a, b = projected.split(self.sizes, dim=-1)
        return qkv, gate.unflatten(-1, (self.num_v_heads, self.v_dim)), a, b


class OlmoHybridDecoderLayer(LlamaDecoderLayer):
    """Gated DeltaNet and feed-forward, each after a norm; or attention and feed-forward, each before one (OLMo 2)."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = OlmoHybridAttention,
    ) -> None:
        super().__init__(config, layer_id, quant_config, prefix, attention_type)
        if self.mixer_name == "self_attn":
            del self.input_layernorm
            self.post_feedforward_layernorm = self.make_norm(config)

    def make_mixer(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        attention_type: type[nn.Module],
    ) -> tuple[str, nn.Module]:
        kind = config.layer_types[layer_id]
        if kind == "linear_attention":
            mixer_prefix = add_prefix("linear_attn", prefix)
            return "linear_attn", OlmoHybridGatedDeltaNet(config, layer_id, quant_config, mixer_prefix)
        if kind != "full_attention":
            raise ValueError(f"layer_types[{layer_id}] must be 'linear_attention' or 'full_attention', not {kind!r}")
        return super().make_mixer(config, layer_id, quant_config, prefix, attention_type)

    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return Olmo2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mixer_name == "linear_attn":
            return super().forward(positions, hidden_states, forward_batch, residual)
        if residual is not None:
            hidden_states = residual + hidden_states
        attended = self.self_attn(positions, hidden_states, forward_batch)
        residual = hidden_states + self.post_attention_layernorm(attended)
        return self.post_feedforward_layernorm(self.feed(residual)), residual


class OlmoHybridForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping | {
        "in_proj": ["q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj"],
        "conv1d": ["q_conv1d", "k_conv1d", "v_conv1d"],
    }
    rename = [
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
        (r"\.linear_attn\.o_proj\.", ".linear_attn.out_proj."),
        (r"\.linear_attn\.o_norm\.", ".linear_attn.norm."),
    ]
    attention_type = OlmoHybridAttention
    layer_type = OlmoHybridDecoderLayer
    base_model_type = Olmo2Model


EntryClass = OlmoHybridForCausalLM
