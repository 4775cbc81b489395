"""GPT-J (Wang and Komatsuzaki, 2021): attention and feed-forward side by side, rotated pairs next to each other."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rotary import get_rope
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class GPTJAttention(nn.Module):
    """Causal self-attention without biases; ``rotary_dim`` components of each head are rotated."""

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
        if not config.rotary_dim:
            raise ValueError("rotary_dim must be the number of components of a head that are rotated, got none")
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            head_dim,
            num_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.out_proj = RowParallelLinear(
            hidden_size, hidden_size, bias=False, quant_config=quant_config, prefix=add_prefix("out_proj", prefix)
        )
        self.rotary_emb = get_rope(
            head_dim,
            rotary_dim=config.rotary_dim,
            max_position=config.max_position_embeddings,
            is_neox_style=False,
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

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.out_proj(self.attn(q, k, v, forward_batch))
        return output


class GPTJBlock(nn.Module):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = GPTJAttention(config, layer_id, quant_config, add_prefix("attn", prefix))
        self.mlp = UngatedMLP(
            config.hidden_size,
            4 * config.hidden_size if config.n_inner is None else config.n_inner,
            config.activation_function,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
            names=("fc_in", "fc_out"),
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        normed = self.ln_1(hidden_states)
        return hidden_states + self.attn(positions, normed, forward_batch) + self.mlp(normed)


class GPTJModel(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.wte = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("wte", prefix)
        )
        self.h = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: GPTJBlock(config, idx, quant_config, prefix),
            prefix=add_prefix("h", prefix),
        )
        self.ln_f = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T] ids, or [T, hidden_size] embeddings in their place -> [T, hidden_size] after the last norm."""
        hidden_states = self.wte(input_ids) if input_embeds is None else input_embeds
        for layer in self.h:
            hidden_states = layer(positions, hidden_states, forward_batch)
        return self.ln_f(hidden_states)


class GPTJForCausalLM(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.transformer = GPTJModel(config, quant_config, add_prefix("transformer", prefix))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            bias=True,
            quant_config=quant_config,
            prefix=add_prefix("lm_head", prefix),
        )
        # The head has a bias and embeddings have none, so that tied ones are two parameters of the same values.
        self.weight_defaults = {"lm_head.weight": "transformer.wte.weight"} if config.tie_word_embeddings else {}
        self.logits_processor = LogitsProcessor(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        hidden_states = self.transformer(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)


EntryClass = GPTJForCausalLM
