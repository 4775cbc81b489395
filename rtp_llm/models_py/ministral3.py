"""Ministral 3 (Mistral AI, 2025): Mistral with queries that grow with their position, beyond the original context."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.models_py.mistral import MistralAttention
from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Ministral3Attention(MistralAttention):
    """Attention whose queries grow with the logarithm of the number of original contexts before them."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, quant_config, prefix)
        self.growth, self.context = (
            config.rope_parameters.get(name) for name in ("llama_4_scaling_beta", "original_max_position_embeddings")
        )
        if self.growth is None or not self.context:
            raise ValueError(
                "rope_parameters must have llama_4_scaling_beta and original_max_position_embeddings, by which queries "
                f"grow; they have {sorted(config.rope_parameters)}"
            )

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = super().prepare_queries_and_keys(positions, q, k)
        factors = 1.0 + self.growth * torch.log1p((positions // self.context).float())
        return q * factors.to(q.dtype).view(-1, *[1] * (q.dim() - 1)), k


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    scale = metadata["mistral3.rope.scaling.yarn_log_multiplier"]
    growth = metadata["mistral3.attention.temperature_scale"]
    config["rope_scaling"] |= {"mscale": scale, "mscale_all_dim": scale, "llama_4_scaling_beta": growth}


class Ministral3ForCausalLM(LlamaForCausalLM):
    attention_type = Ministral3Attention
    gguf = GGUFForm("mistral3", adapt=_from_gguf, changes=PERMUTED)


EntryClass = Ministral3ForCausalLM
