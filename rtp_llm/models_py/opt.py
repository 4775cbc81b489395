"""OPT (Zhang et al., 2022): learned positions, norms before or after the blocks, embeddings perhaps of another size."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch

FIRST_POSITION = 2  # the row of the table of positions that belongs to the first token


class WeightlessLayerNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)


def make_norm(config: "PretrainedConfig") -> nn.Module:
    return LayerNorm(config.hidden_size) if config.layer_norm_elementwise_affine else WeightlessLayerNorm()


class OPTAttention(nn.Module):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        head_dim = hidden_size // num_heads
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            head_dim,
            num_heads,
            bias=config.enable_bias,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.out_proj = RowParallelLinear(
            hidden_size,
            hidden_size,
            bias=config.enable_bias,
            quant_config=quant_config,
            prefix=add_prefix("out_proj", prefix),
        )
        self.attn = RadixAttention(
            self.qkv_proj.num_heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.chunk(3, dim=-1)
        output, _ = self.out_proj(self.attn(q, k, v, forward_batch))
        return output


class OPTDecoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input, after a norm or before one (``do_layer_norm_before``)."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.norms_first = config.do_layer_norm_before
        self.self_attn = OPTAttention(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.self_attn_layer_norm = make_norm(config)
        self.fc1 = ColumnParallelLinear(
            config.hidden_size,
            config.ffn_dim,
            bias=config.enable_bias,
            quant_config=quant_config,
            prefix=add_prefix("fc1", prefix),
        )
        self.fc2 = RowParallelLinear(
            config.ffn_dim,
            config.hidden_size,
            bias=config.enable_bias,
            quant_config=quant_config,
            prefix=add_prefix("fc2", prefix),
        )
        self.act_fn = get_act_fn(config.activation_function)
        self.final_layer_norm = make_norm(config)

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        if self.norms_first:
            hidden_states = hidden_states + self.self_attn(self.self_attn_layer_norm(hidden_states), forward_batch)
            return hidden_states + self.feed_forward(self.final_layer_norm(hidden_states))
        hidden_states = self.self_attn_layer_norm(hidden_states + self.self_attn(hidden_states, forward_batch))
        return self.final_layer_norm(hidden_states + self.feed_forward(hidden_states))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.fc1(x)
        x, _ = self.fc2(self.act_fn(x))
        return x


class OPTDecoder(nn.Module):
    """Embeddings of ``word_embed_proj_dim`` components are projected to ``hidden_size`` and back if these differ."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        hidden_size, embedding_size = config.hidden_size, config.word_embed_proj_dim
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, embedding_size, quant_config=quant_config, prefix=add_prefix("embed_tokens", prefix)
        )
        self.embed_positions = nn.Embedding(config.max_position_embeddings + FIRST_POSITION, hidden_size)
        self.project_in = self.project_out = self.final_layer_norm = None
        if embedding_size != hidden_size:
            self.project_in = ReplicatedLinear(
                embedding_size, hidden_size, False, quant_config=quant_config, prefix=add_prefix("project_in", prefix)
            )
            self.project_out = ReplicatedLinear(
                hidden_size, embedding_size, False, quant_config=quant_config, prefix=add_prefix("project_out", prefix)
            )
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            self.final_layer_norm = make_norm(config)
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: OPTDecoderLayer(config, idx, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T] ids, or [T, word_embed_proj_dim] embeddings in their place -> [T, word_embed_proj_dim]."""
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        if self.project_in is not None:
            hidden_states, _ = self.project_in(hidden_states)
        hidden_states = hidden_states + self.embed_positions(positions + FIRST_POSITION)
        for layer in self.layers:
            hidden_states = layer(hidden_states, forward_batch)
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states, _ = self.project_out(hidden_states)
        return hidden_states


class OPTModel(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.decoder = OPTDecoder(config, quant_config, add_prefix("decoder", prefix))


class OPTForCausalLM(nn.Module):
    """
    Attributes:
        max_positions: the number of learned positions, and so the longest sequence.
    """

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    rename = [(r"^decoder\.", "model.decoder.")]  # saved from the base model

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.max_positions = config.max_position_embeddings
        self.model = OPTModel(config, quant_config, add_prefix("model", prefix))
        if config.tie_word_embeddings:
            self.lm_head = self.model.decoder.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.word_embed_proj_dim,
                quant_config=quant_config,
                prefix=add_prefix("lm_head", prefix),
            )
        self.logits_processor = LogitsProcessor(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.decoder.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        hidden_states = self.model.decoder(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)


EntryClass = OPTForCausalLM
