"""Zeta: so far a decoder of Llama's form, with every part in this file, to be changed."""

from dataclasses import dataclass

import torch
from torch import nn

from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.activation import SiluAndMul
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rotary import get_rope
from rtp_llm.srt.utils import add_prefix, make_layers


@dataclass
class ZetaConfig:
    """The fields of config.json that this file reads. Those without a default must be there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False


class ZetaMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ZetaConfig, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("gate_up_proj", prefix),
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("down_proj", prefix),
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)  # linear layers return (output, bias)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class ZetaAttention(nn.Module):
    def __init__(
        self, config: ZetaConfig, layer_id: int, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )
        self.rotary_emb = get_rope(config.head_dim, max_position=config.max_position_embeddings, base=config.rope_theta)
        # It reads and writes the cache. Heads are those of this rank.
        self.attn = RadixAttention(
            self.qkv_proj.num_heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.qkv_proj.q_size, self.qkv_proj.kv_size, self.qkv_proj.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v, forward_batch))
        return output


class ZetaDecoderLayer(nn.Module):
    def __init__(
        self, config: ZetaConfig, layer_id: int, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.self_attn = ZetaAttention(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.mlp = ZetaMLP(config, quant_config, add_prefix("mlp", prefix))
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """[T, hidden_size] -> the same, for the tokens of all requests in one row."""
        hidden_states = hidden_states + self.self_attn(positions, self.input_layernorm(hidden_states), forward_batch)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ZetaModel(nn.Module):
    def __init__(self, config: ZetaConfig, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("embed_tokens", prefix)
        )
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: ZetaDecoderLayer(config, idx, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states, forward_batch)
        return self.norm(hidden_states)


class ZetaForCausalLM(nn.Module):
    config_class = ZetaConfig
    # Modules of the checkpoint that are one here.
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, config: ZetaConfig, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        self.model = ZetaModel(config, quant_config, add_prefix("model", prefix))
        self.lm_head: nn.Module = self.model.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("lm_head", prefix)
            )
        self.logits_processor = LogitsProcessor(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)


EntryClass = ZetaForCausalLM
