"""StarCoder2 (Lozhkov et al., 2024): Llama with layer norms, biases, a window, and feed-forward without a gate."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class Starcoder2Attention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.use_bias,
            o_bias=config.use_bias,
            sliding_window=config.sliding_window,
            quant_config=quant_config,
            prefix=prefix,
        )


class Starcoder2MLP(nn.Module):
    """``c_proj(act(c_fc(x)))``."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.c_fc = ColumnParallelLinear(
            config.hidden_size,
            config.intermediate_size,
            bias=config.use_bias,
            quant_config=quant_config,
            prefix=add_prefix("c_fc", prefix),
        )
        self.c_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.use_bias,
            quant_config=quant_config,
            prefix=add_prefix("c_proj", prefix),
        )
        self.act_fn = get_act_fn(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.c_fc(x)
        x, _ = self.c_proj(self.act_fn(x))
        return x


class Starcoder2DecoderLayer(nn.Module):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = Starcoder2Attention,
    ) -> None:
        super().__init__()
        self.self_attn = attention_type(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.mlp = Starcoder2MLP(config, quant_config, add_prefix("mlp", prefix))
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        attended = self.self_attn(positions, self.input_layernorm(hidden_states), forward_batch)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Starcoder2Model(nn.Module):
    def __init__(
        self,
        config: "PretrainedConfig",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = Starcoder2Attention,
        layer_type: type[nn.Module] = Starcoder2DecoderLayer,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("embed_tokens", prefix)
        )
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: layer_type(config, idx, quant_config, prefix, attention_type),
            prefix=add_prefix("layers", prefix),
        )
        self.norm = LayerNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T] ids, or [T, hidden_size] embeddings in their place -> [T, hidden_size] after the last norm."""
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states, forward_batch)
        return self.norm(hidden_states)


class Starcoder2ForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    attention_type = Starcoder2Attention
    layer_type = Starcoder2DecoderLayer
    base_model_type = Starcoder2Model
    gguf = GGUFForm(
        "starcoder2",
        config={"attention.layer_norm_epsilon": "norm_epsilon"},
        defaults={"sliding_window": None},
        presence={"blk.0.attn_q.bias": "use_bias"},
    )


EntryClass = Starcoder2ForCausalLM
