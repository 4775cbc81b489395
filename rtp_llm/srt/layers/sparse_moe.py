"""A feed-forward block of experts with its router, as most models with experts have it."""

import torch
from torch import nn

from rtp_llm.srt.layers.linear import ReplicatedLinear
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.moe import FusedMoE, Routing
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.routing import TopK
from rtp_llm.srt.utils import add_prefix


class SparseMoeBlock(nn.Module):
    """Experts, of which each token goes through the ``top_k`` that ``route`` chooses by the logits of ``gate``.

    ``route`` takes the largest of a softmax over all experts; a model with another rule overrides it.

    Args:
        intermediate_size: of each expert.
        renormalize: a token's weights sum to one.
        expert_names: names of an expert's gate, up and down projections in the checkpoint.
        gate_dtype: in which logits are computed; None: torch's default.
        shared: name and intermediate size of an expert for all tokens, which is added; of size 0: there is none.
        shared_bias: the shared expert has biases.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        renormalize: bool = True,
        expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        gate_dtype: torch.dtype | None = None,
        shared: tuple[str, int] = ("shared_experts", 0),
        shared_bias: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.renormalize = renormalize
        self.rule = TopK(top_k, renormalize=renormalize)
        self.gate = ReplicatedLinear(
            hidden_size, num_experts, bias=False, params_dtype=gate_dtype, prefix=add_prefix("gate", prefix)
        )
        self.experts = FusedMoE(
            num_experts,
            hidden_size,
            intermediate_size,
            activation=hidden_act,
            expert_names=expert_names,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )
        self.shared_name, shared_size = shared
        self.has_shared = shared_size > 0
        if self.has_shared:
            mlp = GatedMLP(
                hidden_size,
                shared_size,
                hidden_act,
                quant_config=quant_config,
                prefix=add_prefix(self.shared_name, prefix),
                bias=shared_bias,
            )
            self.add_module(self.shared_name, mlp)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        router_logits, _ = self.gate(hidden_states.to(self.gate.params_dtype))
        topk_weights, topk_ids = self.route(router_logits)
        routed = self.experts(hidden_states, topk_weights, topk_ids)
        return routed + self.get_submodule(self.shared_name)(hidden_states) if self.has_shared else routed

    def route(self, router_logits: torch.Tensor) -> Routing:
        """[T, num_experts] -> weights and ids of experts, [T, top_k] each."""
        return self.rule(router_logits)
