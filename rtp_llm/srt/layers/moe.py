"""Mixtures of experts (Shazeer et al., 2017): routing functions, and the experts that routed tokens are sent to.

Routing turns logits [T, num_experts] into ``(topk_weights, topk_ids)``, both [T, top_k]: float32 and int64.
``FusedMoE`` takes these from any routing function.
"""

import torch
from torch import nn

from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.distributed.parallel_state import TPGroup, divide, get_tp_group
from rtp_llm.srt.layers.activation import SwigluOAIAndMul, get_act_and_mul_fn
from rtp_llm.srt.layers.quantization.base import ExpertsLayer, ExpertsMethodBase, QuantizationConfig
from rtp_llm.srt.layers.quantization.unquantized import UnquantizedExpertsMethod
from rtp_llm.srt.layers.weights import ShardId, WeightLoader, check_shape, load_part, make_parameter

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
    chosen = scores.masked_fill(~_in_top_groups(group_scores, topk_group, scores.shape[-1]), 0.0)
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
    choice = choice.masked_fill(~_in_top_groups(group_scores, topk_group, scores.shape[-1]), float("-inf"))
    topk_ids = choice.topk(top_k, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if renormalize:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_weights * routed_scaling_factor, topk_ids


def _in_top_groups(group_scores: torch.Tensor, topk_group: int, num_experts: int) -> torch.Tensor:
    """[T, groups] -> [T, num_experts] bool: whether the expert is in one of the token's best groups."""
    best = group_scores.topk(topk_group, dim=-1).indices
    is_best = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, best, True)
    return is_best.repeat_interleave(num_experts // group_scores.shape[-1], dim=-1)


class FusedMoE(ExpertsLayer):
    """Gated feed-forward experts, of which each token passes through the few it was routed to.

    Each rank holds a part of the intermediate size of every expert; outputs are summed over ranks.

    Parameters, with I the intermediate size on this rank:
        w13_weight [num_experts, 2 * I, hidden_size]: gate and up, laid out as the activation expects.
        w2_weight [num_experts, hidden_size, I]: down.
        w13_bias [num_experts, 2 * I], w2_bias [num_experts, hidden_size]: with ``bias`` only.

    They load from experts stored one by one (``3.gate_proj.weight``) or from all in one tensor (``gate_up_proj`` of
    [num_experts, 2 * intermediate_size, hidden_size] and ``down_proj``; their biases as ``gate_up_proj_bias`` and
    ``down_proj_bias``).

    Args:
        activation: a name for ``get_act_and_mul_fn``, or a gated activation; with ``SwigluOAIAndMul`` gate and up take
            turns in ``w13``, and must do so in a fused tensor.
        reduce_results: False: each rank returns its summand.
        expert_names: names of an expert's gate, up and down projections in the checkpoint.
        is_transposed: fused weights are stored as [num_experts, inputs, outputs]; None: their shape decides.
    """

    w13_weight: nn.Parameter
    w2_weight: nn.Parameter
    w13_bias: nn.Parameter | None
    w2_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str | nn.Module = "silu",
        bias: bool = False,
        reduce_results: bool = True,
        expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        is_transposed: bool | None = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        tp_group: TPGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.act_fn = get_act_and_mul_fn(activation) if isinstance(activation, str) else activation
        self.is_interleaved = isinstance(self.act_fn, SwigluOAIAndMul)
        self.reduce_results = reduce_results
        self.is_transposed = is_transposed
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.prefix = prefix
        self.name = prefix or type(self).__name__
        self.tp_group = tp_group or get_tp_group()
        self.expert_names = expert_names
        self.quant_method = _experts_method(self, quant_config, prefix)
        self.weight_sources = expert_sources(num_experts, expert_names, bias, self.quant_method.kinds)
        self._group_rows = pick("group_rows", self.params_dtype)
        self._gather_rows = pick("gather_rows", self.params_dtype)
        self._sum_rows = pick("sum_rows", self.params_dtype)
        self._create_parameters(bias)

    def _create_parameters(self, bias: bool) -> None:
        size = divide(self.intermediate_size, self.tp_group.world_size, f"{self.name}: intermediate size")
        self.intermediate_size_per_partition = size
        self._create_weights("w13", 2 * size, self.hidden_size, self.hidden_size)
        self._create_weights("w2", self.hidden_size, size, self.intermediate_size)
        if bias:
            self.add_parameter("w13_bias", self.num_experts, 2 * size)
            self.add_parameter("w2_bias", self.num_experts, self.hidden_size)
        else:
            self.register_parameter("w13_bias", None)
            self.register_parameter("w2_bias", None)

    def _create_weights(self, name: str, outputs: int, inputs: int, input_size: int) -> None:
        self.quant_method.create_weights(self, name, (self.num_experts, outputs, inputs), input_size)

    def add_parameter(
        self,
        name: str,
        *shape: int,
        dtype: torch.dtype | None = None,
        weight_loader: WeightLoader | None = None,
        is_split: bool = True,
        is_optional: bool = False,
    ) -> nn.Parameter:
        data = torch.empty(shape, dtype=dtype or self.params_dtype)
        loader, input_dim = weight_loader or self.weight_loader, 2 if is_split else None
        param = make_parameter(data, loader, input_dim=input_dim, is_optional=is_optional)
        param.is_down = name.startswith("w2_")  # type: ignore[attr-defined]
        self.register_parameter(name, param)
        return param

    def forward(self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Compute each token's experts, weighted and summed.

        Args:
            hidden_states: [T, hidden_size]; topk_weights, topk_ids: [T, top_k], from a routing function.

        Returns:
            [T, hidden_size] in the dtype of ``hidden_states``.
        """
        rows_per_expert, order, places = self._group_rows(topk_ids.flatten(), self.num_experts)
        rows = self._gather_rows(hidden_states, order, topk_ids.shape[1])
        gate_up = self.packed["w13"].apply(rows, rows_per_expert, self.w13_bias)
        # One rank adds the bias, as in RowParallelLinear.
        down_bias = self.w2_bias if self.tp_group.rank == 0 else None
        rows = self.packed["w2"].apply(self.act_fn(gate_up), rows_per_expert, down_bias)
        output = self._sum_rows(rows, places, topk_weights)
        return self.tp_group.all_reduce(output) if self.reduce_results else output

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's part of a checkpoint tensor into ``param``.

        Args:
            tensor: the whole checkpoint tensor; it is cut before it is copied.
            shard_id: ``(expert, "w1" | "w3" | "w2")`` for gate, up or down of one expert; None: all experts' at once.

        Raises:
            ValueError: the tensor's shape or the shard id does not fit.
        """
        is_down: bool = param.is_down  # type: ignore[attr-defined]
        if shard_id is None:
            if param.dim() == 3 and tensor.dim() == 3 and self._stores_transposed(tensor, is_down):
                tensor = tensor.transpose(1, 2)
            self._load_down(param.data, tensor, 2) if is_down else self._load_gate_up(param.data, tensor)
            return
        names = ("w2",) if is_down else ("w1", "w3")
        if not isinstance(shard_id, tuple) or shard_id[1] not in names or not 0 <= shard_id[0] < self.num_experts:
            raise ValueError(
                f"{self.name}: unknown shard_id {shard_id!r}; have (expert below {self.num_experts}, one of {names})"
            )
        expert, name = shard_id
        if is_down:
            self._load_down(param.data[expert], tensor, 1 if param.input_dim is not None else 2)  # type: ignore[attr-defined]
        else:
            self._load_outputs(self._half(param.data[expert], name, 0), tensor, 0)

    def _stores_transposed(self, tensor: torch.Tensor, is_down: bool) -> bool:
        """Whether inputs come before outputs in a tensor of all experts' weights."""
        if self.is_transposed is None:
            return tensor.shape[1] != (self.hidden_size if is_down else 2 * self.intermediate_size)
        return self.is_transposed

    def _load_gate_up(self, target: torch.Tensor, tensor: torch.Tensor) -> None:
        check_shape(tensor, (self.num_experts, 2 * self.intermediate_size, *target.shape[2:]), self.name)
        for name in ("w1", "w3"):
            self._load_outputs(self._half(target, name, 1), self._half(tensor, name, 1), 1)

    def _half(self, tensor: torch.Tensor, name: str, dim: int) -> torch.Tensor:
        """A view of gate ("w1") or up ("w3") within the dimension that holds both."""
        half = 0 if name == "w1" else 1
        if self.is_interleaved:
            return tensor.unflatten(dim, (-1, 2)).select(dim + 1, half)
        return tensor.unflatten(dim, (2, -1)).select(dim, half)

    def _load_outputs(self, target: torch.Tensor, tensor: torch.Tensor, dim: int) -> None:
        load_part(target, tensor, dim, self.tp_group.rank, self.tp_group.world_size, self.name)

    def _load_down(self, target: torch.Tensor, tensor: torch.Tensor, input_dim: int) -> None:
        dim = input_dim if target.dim() > input_dim else None  # a bias and scales of whole outputs are not split
        load_part(target, tensor, dim, self.tp_group.rank, self.tp_group.world_size, self.name)


def _experts_method(layer: FusedMoE, quant_config: QuantizationConfig | None, prefix: str) -> ExpertsMethodBase:
    method = quant_config.get_quant_method(layer, prefix) if quant_config else None
    if method is None:
        return UnquantizedExpertsMethod()
    if not isinstance(method, ExpertsMethodBase):
        raise TypeError(f"{layer.name}: experts need an ExpertsMethodBase, got {type(method).__name__}")
    return method


def expert_sources(
    num_experts: int, expert_names: tuple[str, str, str], bias: bool, kinds: tuple[str, ...] = ("weight",)
) -> dict[str, tuple[str, ShardId]]:
    """Checkpoint names, relative to the layer's own -> the parameter that each fills and its shard id."""
    gate, up, down = expert_names
    sources: dict[str, tuple[str, ShardId]] = {}
    if "weight" in kinds:
        sources = {"gate_up_proj": ("w13_weight", None), "down_proj": ("w2_weight", None)}
    if bias:
        sources |= {"gate_up_proj_bias": ("w13_bias", None), "down_proj_bias": ("w2_bias", None)}
    for kind in (*kinds, "bias") if bias else kinds:
        for expert in range(num_experts):
            sources[f"{expert}.{gate}.{kind}"] = f"w13_{kind}", (expert, "w1")
            sources[f"{expert}.{up}.{kind}"] = f"w13_{kind}", (expert, "w3")
            sources[f"{expert}.{down}.{kind}"] = f"w2_{kind}", (expert, "w2")
    return sources
