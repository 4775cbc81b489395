"""Mamba 2 (Dao and Gu, 2024): state-space layers alone, which keep a state; there is no attention."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.gguf.recurrent import MAMBA2_CHANGES, state_head_dim
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.mamba import Mamba2Mixer
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class Mamba2Block(nn.Module):
    """A mixer after a norm; the residual, perhaps in float32, is returned separately."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(
            config.hidden_size,
            config.num_heads,
            config.head_dim,
            config.n_groups,
            config.state_size,
            config.conv_kernel,
            layer_id,
            conv_bias=config.use_conv_bias,
            proj_bias=config.use_bias,
            eps=config.layer_norm_epsilon,
            dt_limit=config.time_step_limit,
            activation=config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mixer", prefix),
        )

    def forward(self, residual: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        """[T, hidden_size] to the same, in the residual's dtype."""
        normed = self.norm(residual.to(self.norm.weight.dtype))
        return residual + self.mixer(normed, forward_batch)


class Mamba2Model(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.embeddings = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("embeddings", prefix)
        )
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: Mamba2Block(config, idx, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )
        self.norm_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.residual_in_fp32 = config.residual_in_fp32

    def forward(
        self,
        input_ids: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T] ids, or [T, hidden_size] embeddings in their place -> [T, hidden_size] after the last norm."""
        hidden_states = self.embeddings(input_ids) if input_embeds is None else input_embeds
        dtype = hidden_states.dtype
        if self.residual_in_fp32:
            hidden_states = hidden_states.float()
        for layer in self.layers:
            hidden_states = layer(hidden_states, forward_batch)
        return self.norm_f(hidden_states.to(dtype))


_GGUF_CONFIG = {
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
    "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "num_heads",
}


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    config["head_dim"] = state_head_dim(metadata)
    config["expand"] = config["num_heads"] * config["head_dim"] // config["hidden_size"]


class Mamba2ForCausalLM(nn.Module):
    rename = [(r"^backbone\.embedding\.", "backbone.embeddings.")]  # the name in the first published checkpoints
    gguf = GGUFForm(
        "mamba2",
        config=_GGUF_CONFIG,
        presence={"blk.0.ssm_in.bias": "use_bias", "blk.0.ssm_conv1d.bias": "use_conv_bias"},
        adapt=_from_gguf,
        changes=MAMBA2_CHANGES,
        names={"blk.{bid}.ssm_dt.bias": "backbone.layers.{bid}.mixer.dt_bias"},
        has_attention=False,
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.backbone = Mamba2Model(config, quant_config, add_prefix("backbone", prefix))
        self.lm_head: nn.Module = (
            self.backbone.embeddings
            if config.tie_word_embeddings
            else ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=add_prefix("lm_head", prefix),
            )
        )
        self.logits_processor = LogitsProcessor(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        hidden_states = self.backbone(input_ids, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)


EntryClass = Mamba2ForCausalLM
