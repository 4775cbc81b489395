"""Routing of mixtures of experts: which experts each token passes through, and with what weights.

Routing turns logits [T, num_experts] into ``(topk_weights, topk_ids)``, both [T, top_k]: float32 and int64. A model
takes one of the functions, a rule that is put together (``TopK``), or a router with a weight of its own
(``TopKRouter``).
"""

from dataclasses import dataclass, field

import torch

from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.device.provider import Kernel
from rtp_llm.srt.kernels.reference import in_top_groups
from rtp_llm.srt.layers.linear import GateLinear
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter

Routing = tuple[torch.Tensor, torch.Tensor]


def softmax_topk(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> Routing:
    """Route to the ``top_k`` largest of a softmax over all experts; ``renormalize``: a token's weights sum to one."""
    scores = router_logits.softmax(dim=-1, dtype=torch.float32)
    topk_weights, topk_ids = scores.topk(top_k, dim=-1)
    if renormalize:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    return topk_weights, topk_ids


def topk_softmax(router_logits: torch.Tensor, top_k: int) -> Routing:
    """Route to the ``top_k`` largest logits, weighted by a softmax over them alone (GPT-OSS, 2025)."""
    topk_logits, topk_ids = router_logits.topk(top_k, dim=-1)
    return topk_logits.softmax(dim=-1, dtype=torch.float32), topk_ids


def softmax_grouped_topk(
    router_logits: torch.Tensor,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
) -> Routing:
    """Group-limited greedy routing (DeepSeek-V2, 2024).

    Experts form ``num_expert_group`` groups of neighbours. The ``top_k`` largest of a softmax over all experts are
    taken from the ``topk_group`` groups with the largest single scores, and multiplied by ``routed_scaling_factor``.
    """
    scores = router_logits.softmax(dim=-1, dtype=torch.float32)
    group_scores = scores.unflatten(-1, (num_expert_group, -1)).amax(dim=-1)
    chosen = scores.masked_fill(~in_top_groups(group_scores, topk_group, scores.shape[-1]), 0.0)
    topk_weights, topk_ids = chosen.topk(top_k, dim=-1)
    if renormalize:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_weights * routed_scaling_factor, topk_ids


def sigmoid_grouped_topk(
    router_logits: torch.Tensor,
    correction_bias: torch.Tensor,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> Routing:
    """Grouped routing without auxiliary loss (DeepSeek-V3, 2024).

    Scores are sigmoids. ``correction_bias`` [num_experts] is added only to choose, never to the weights: first the
    ``topk_group`` groups with the largest sums of their two best experts, then the ``top_k`` best experts in them.
    """
    scores = router_logits.float().sigmoid()
    choice = scores + correction_bias.float()
    groups = choice.unflatten(-1, (num_expert_group, -1))
    group_scores = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
    choice = choice.masked_fill(~in_top_groups(group_scores, topk_group, scores.shape[-1]), float("-inf"))
    topk_ids = choice.topk(top_k, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if renormalize:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_weights * routed_scaling_factor, topk_ids


def sigmoid_topk(router_logits: torch.Tensor, top_k: int, renormalize: bool = False) -> Routing:
    """Route to the ``top_k`` largest logits, weighted by their sigmoids; ``renormalize``: they sum to one."""
    topk_logits, topk_ids = router_logits.topk(top_k, dim=-1)
    topk_weights = topk_logits.float().sigmoid()
    if renormalize:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    return topk_weights, topk_ids


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """A routing rule: ``topk_weights, topk_ids = rule(router_logits)``.

    Attributes:
        scoring_func: ``softmax`` over all experts, or ``sigmoid`` of each, in float32.
        renormalize: a token's weights are divided by their sum.
        correction_bias: [num_experts], added to scores only to choose, never to the weights.
        num_expert_group, topk_group: the experts are in so many groups of neighbours, of which the best ``topk_group``
            are taken: by the sum of their two best experts where there is a correction bias, else by their best one.
        routed_scaling_factor: a factor of the weights, applied last.
    """

    top_k: int
    scoring_func: str = "softmax"
    renormalize: bool = False
    correction_bias: torch.Tensor | None = None
    num_expert_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    kernel: Kernel = field(default_factory=lambda: pick("route", torch.float32), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown scoring_func {self.scoring_func!r}; have ['sigmoid', 'softmax']")

    def __call__(self, router_logits: torch.Tensor) -> Routing:
        routing: Routing = self.kernel(
            router_logits, self.top_k, self.scoring_func == "sigmoid", self.renormalize, self.correction_bias,
            self.num_expert_group, self.topk_group, self.routed_scaling_factor,
        )  # fmt: skip
        return routing


class TopKRouter(GateLinear):
    """A router: ``topk_weights, topk_ids = router(hidden_states)``. Its logits are those of GateLinear.

    Parameters: ``weight`` [num_experts, hidden_size]; ``bias`` [num_experts] with ``bias``;
    ``e_score_correction_bias`` [num_experts], float32, with ``has_correction_bias``.

    Args:
        has_correction_bias: see ``TopK.correction_bias``.
        params_dtype: of weight and product; None: torch's default.
        scoring_func, renormalize, num_expert_group, topk_group, routed_scaling_factor: as in TopK.
    """

    e_score_correction_bias: torch.nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        scoring_func: str = "softmax",
        renormalize: bool = False,
        has_correction_bias: bool = False,
        num_expert_group: int = 1,
        topk_group: int = 1,
        routed_scaling_factor: float = 1.0,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            hidden_size, num_experts, bias, params_dtype=params_dtype, quant_config=quant_config, prefix=prefix
        )
        data = torch.empty(num_experts, dtype=torch.float32)
        correction = make_parameter(data, default_weight_loader) if has_correction_bias else None
        self.register_parameter("e_score_correction_bias", correction)
        groups = (num_expert_group, topk_group)
        self.rule = TopK(top_k, scoring_func, renormalize, correction, *groups, routed_scaling_factor)

    def forward(self, x: torch.Tensor) -> Routing:  # type: ignore[override]
        """[T, hidden_size] -> routing."""
        return self.rule(self._multiply(x.to(self.params_dtype)))
