"""The experts that routed tokens are sent to (Shazeer et al., 2017). ``routing.py`` has the routing.

``FusedMoE`` takes ``(topk_weights, topk_ids)`` from any routing.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.distributed.parallel_state import (
    RankGroup,
    divide,
    get_ep_group,
    get_expert_tensor_group,
    get_tp_group,
    get_world,
)
from rtp_llm.srt.layers.activation import SwigluOAIAndMul, get_act_and_mul_fn, get_act_fn
from rtp_llm.srt.layers.quantization.base import ExpertsLayer, ExpertsMethodBase, QuantizationConfig
from rtp_llm.srt.layers.quantization.unquantized import UnquantizedExpertsMethod
from rtp_llm.srt.layers.routing import (
    Routing,
    sigmoid_grouped_topk,
    sigmoid_topk,
    softmax_grouped_topk,
    softmax_topk,
    topk_softmax,
)
from rtp_llm.srt.layers.token_exchange import token_exchange
from rtp_llm.srt.layers.weights import ShardId, WeightLoader, check_shape, load_part, make_parameter

__all__ = [
    "Experts",
    "FusedMoE",
    "Routing",
    "sigmoid_grouped_topk",
    "sigmoid_topk",
    "softmax_grouped_topk",
    "softmax_topk",
    "topk_softmax",
]

Activation = Callable[[torch.Tensor], torch.Tensor]


class Experts(ExpertsLayer):
    """Feed-forward experts: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` with ``gated=False``.

    Experts are divided over the ranks of the expert group, and each one's intermediate size over the ranks that share
    it (``--ep-size``; without it, all ranks share all experts). Every rank has all tokens, and computes them in its own
    experts; outputs are to be summed over ranks. Ranks with requests of their own (``--enable-dp-attention``) exchange
    tokens and sums (``token_exchange.py``). A subclass says how tokens are routed.

    Parameters, with E experts and an intermediate size I on this rank:
        w13_weight [E, 2 * I, hidden_size]: gate and up, laid out as the activation expects. Without gates
            [E, I, hidden_size]: up.
        w2_weight [E, hidden_size, I]: down.
        w13_bias [E, 2 * I or I], w2_bias [E, hidden_size]: with ``bias`` only.

    They load from experts stored one by one (``3.gate_proj.weight``) or from all in one tensor (``gate_up_proj`` of
    [num_experts, 2 * intermediate_size, hidden_size], or ``up_proj``, and ``down_proj``; their biases as
    ``gate_up_proj_bias`` or ``up_proj_bias``, and ``down_proj_bias``).

    Args:
        activation: a name for ``get_act_and_mul_fn`` (without gates: ``get_act_fn``), or the activation; with
            ``SwigluOAIAndMul`` gate and up take turns in ``w13``, and must do so in a fused tensor.
        expert_names: names of an expert's gate, up and down projections in the checkpoint, or of up and down; None:
            ``gate_proj``, ``up_proj``, ``down_proj``.
        is_transposed: fused weights are stored as [num_experts, inputs, outputs]; None: their shape decides.
        gated: whether each expert has a gate.
        tp_group: the ranks that share all experts; None: as the world divides them.

    Attributes:
        load: [num_experts] int64, tokens that were routed to each expert: on the first rank of several with experts of
            their own, and on each with requests of its own, of these; None on others.

    Raises:
        ValueError: ``expert_names`` repeats a name, or has not as many as there are projections.
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
        activation: str | Activation = "silu",
        bias: bool = False,
        reduce_results: bool = True,
        expert_names: tuple[str, ...] | None = None,
        is_transposed: bool | None = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        tp_group: RankGroup | None = None,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.halves = ("w1", "w3") if gated else ("w1",)  # the projections in w13
        self.act_fn = _activation(activation, gated)
        self.is_interleaved = isinstance(self.act_fn, SwigluOAIAndMul)
        self.reduce_results = reduce_results
        self.is_transposed = is_transposed
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.prefix = prefix
        self.name = prefix or type(self).__name__
        self.tp_group = tp_group or get_tp_group()
        self.expert_group = get_ep_group() if tp_group is None else RankGroup(0, 1)
        self.sharing_group = get_expert_tensor_group() if tp_group is None else tp_group
        parts, what = self.expert_group.world_size, f"{self.name}: number of experts"
        self.num_own_experts = divide(num_experts, parts, what, "ep_size")
        self.first_expert = self.expert_group.rank * self.num_own_experts
        has_own_requests = tp_group is None and get_world().shape.data > 1
        counts = parts > 1 and self.sharing_group.rank == 0 and (has_own_requests or self.expert_group.rank == 0)
        self.exchange = token_exchange(self.num_own_experts, self.params_dtype) if has_own_requests else None
        self.load = torch.zeros(num_experts, dtype=torch.int64) if counts else None
        self.expert_names = _checked_names(expert_names, gated, self.name)
        self.quant_method = _experts_method(self, quant_config, prefix)
        self.weight_sources = expert_sources(num_experts, self.expert_names, bias, self.quant_method)
        self._group_rows = pick("group_rows", self.params_dtype)
        self._gather_rows = pick("gather_rows", self.params_dtype)
        self._sum_rows = pick("sum_rows", self.params_dtype)
        self._create_parameters(bias)

    def _create_parameters(self, bias: bool) -> None:
        size = divide(self.intermediate_size, self.sharing_group.world_size, f"{self.name}: intermediate size")
        self.intermediate_size_per_partition = size
        self._create_weights("w13", len(self.halves) * size, self.hidden_size, self.hidden_size)
        self._create_weights("w2", self.hidden_size, size, self.intermediate_size)
        if bias:
            self.add_parameter("w13_bias", self.num_own_experts, len(self.halves) * size)
            self.add_parameter("w2_bias", self.num_own_experts, self.hidden_size)
        else:
            self.register_parameter("w13_bias", None)
            self.register_parameter("w2_bias", None)

    def _create_weights(self, name: str, outputs: int, inputs: int, input_size: int) -> None:
        self.quant_method.create_weights(self, name, (self.num_own_experts, outputs, inputs), input_size)

    def add_parameter(
        self,
        name: str,
        *shape: int,
        dtype: torch.dtype | None = None,
        weight_loader: WeightLoader | None = None,
        is_split: bool = True,
        is_optional: bool = False,
        in_order: bool = False,
    ) -> nn.Parameter:
        data = torch.empty(shape, dtype=dtype or self.params_dtype)
        loader, input_dim = self._of_own_experts(weight_loader or self.weight_loader), 2 if is_split else None
        param = make_parameter(data, loader, input_dim=input_dim, is_optional=is_optional)
        param.is_down = name.startswith("w2_")  # type: ignore[attr-defined]
        param.in_order = in_order  # type: ignore[attr-defined]
        self.register_parameter(name, param)
        return param

    def compute(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        weights_inputs: bool = False,
    ) -> torch.Tensor:
        """Compute each token's experts, weighted and summed: this rank's summand, or with requests of its own the sum.

        Args:
            hidden_states: [T, hidden_size]; topk_weights, topk_ids: [T, top_k].
            weights_inputs: an expert's input is multiplied by the token's weight, not its output (Llama 4, 2025).

        Returns:
            [T, hidden_size] in the dtype of ``hidden_states``.
        """
        if self.load is not None:
            self.load += topk_ids.flatten().bincount(minlength=self.num_experts)
        if self.exchange is not None:
            compute_own = partial(self._compute_own, weights_inputs=weights_inputs)
            return self.exchange.compute(hidden_states, topk_weights, topk_ids, compute_own)
        if self.expert_group.world_size > 1:
            return self._compute_own(hidden_states, topk_weights, topk_ids, weights_inputs)
        rows_per_expert, order, places = self._group_rows(topk_ids.flatten(), self.num_experts)
        rows = self._gather_rows(hidden_states, order, topk_ids.shape[1])
        if weights_inputs:
            rows = rows * topk_weights.flatten()[order, None].to(rows.dtype)
            topk_weights = torch.ones_like(topk_weights)
        return self._sum_rows(self._feed_forward(rows, rows_per_expert), places, topk_weights)

    def _compute_own(
        self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, weights_inputs: bool
    ) -> torch.Tensor:
        """As ``compute``, where other ranks have the other experts: rows of those come last, and add nothing."""
        ids, num_own = topk_ids.flatten(), self.num_own_experts
        own = ids - self.first_expert
        own = torch.where((own < 0) | (own >= num_own), num_own, own)
        rows_per_expert, order, places = self._group_rows(own, num_own + 1)
        num_rows = len(ids) - int(rows_per_expert[num_own])
        if num_rows == 0:
            return torch.zeros_like(hidden_states)
        order = order[:num_rows]
        rows = self._gather_rows(hidden_states, order, topk_ids.shape[1])
        if weights_inputs:
            rows = rows * topk_weights.flatten()[order, None].to(rows.dtype)
            topk_weights = torch.ones_like(topk_weights)
        rows = self._feed_forward(rows, rows_per_expert[:num_own])
        return self._sum_rows(F.pad(rows, (0, 0, 0, 1)), places.clamp(max=num_rows), topk_weights)  # a row of zeros

    def _feed_forward(self, rows: torch.Tensor, rows_per_expert: torch.Tensor) -> torch.Tensor:
        hidden = self.packed["w13"].apply(rows, rows_per_expert, self.w13_bias)
        # One rank adds the bias, as in RowParallelLinear.
        down_bias = self.w2_bias if self.sharing_group.rank == 0 else None
        return self.packed["w2"].apply(self.act_fn(hidden), rows_per_expert, down_bias)

    def _of_own_experts(self, weight_loader: WeightLoader) -> WeightLoader:
        """Return a loader that is called with all experts' tensors, for one that knows this rank's experts only."""
        if self.expert_group.world_size == 1:
            return weight_loader

        def load(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
            first, count = self.first_expert, self.num_own_experts
            if not isinstance(shard_id, tuple):
                of_all = tensor.dim() > 0 and len(tensor) == self.num_experts
                weight_loader(param, tensor[first : first + count] if of_all else tensor, shard_id)
            elif not 0 <= shard_id[0] < self.num_experts:
                raise ValueError(f"{self.name}: expert {shard_id[0]} is not below {self.num_experts}")
            elif first <= shard_id[0] < first + count:
                weight_loader(param, tensor, (shard_id[0] - first, shard_id[1]))

        return load

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's part of a checkpoint tensor into ``param``.

        Args:
            tensor: the whole checkpoint tensor; it is cut before it is copied.
            shard_id: ``(expert, "w1" | "w3" | "w2")`` for gate, up or down of one expert (without gates ``"w1"`` is
                up); None: all experts' at once.

        Raises:
            ValueError: the tensor's shape or the shard id does not fit.
        """
        is_down: bool = param.is_down  # type: ignore[attr-defined]
        if shard_id is None:
            in_order: bool = param.in_order  # type: ignore[attr-defined]
            if param.dim() == 3 and tensor.dim() == 3 and not in_order and self._stores_transposed(tensor, is_down):
                tensor = tensor.transpose(1, 2)
            self._load_down(param, param.data, tensor, 2) if is_down else self._load_gate_up(param.data, tensor)
            return
        names = ("w2",) if is_down else self.halves
        count = self.num_own_experts
        if not isinstance(shard_id, tuple) or shard_id[1] not in names or not 0 <= shard_id[0] < count:
            raise ValueError(f"{self.name}: unknown shard_id {shard_id!r}; have (expert below {count}, one of {names})")
        expert, name = shard_id
        if is_down:
            self._load_down(param, param.data[expert], tensor, 1)
        else:
            self._load_outputs(self._half(param.data[expert], name, 0), tensor, 0)

    def _stores_transposed(self, tensor: torch.Tensor, is_down: bool) -> bool:
        """Whether inputs come before outputs in a tensor of all experts' weights."""
        if self.is_transposed is None:
            return tensor.shape[1] != (self.hidden_size if is_down else len(self.halves) * self.intermediate_size)
        return self.is_transposed

    def _load_gate_up(self, target: torch.Tensor, tensor: torch.Tensor) -> None:
        outputs = len(self.halves) * self.intermediate_size
        check_shape(tensor, (self.num_own_experts, outputs, *target.shape[2:]), self.name)
        for name in self.halves:
            self._load_outputs(self._half(target, name, 1), self._half(tensor, name, 1), 1)

    def _half(self, tensor: torch.Tensor, name: str, dim: int) -> torch.Tensor:
        """A view of gate ("w1") or up ("w3") within the dimension that holds both; without gates all of it."""
        if len(self.halves) == 1:
            return tensor
        half = 0 if name == "w1" else 1
        if self.is_interleaved:
            return tensor.unflatten(dim, (-1, 2)).select(dim + 1, half)
        return tensor.unflatten(dim, (2, -1)).select(dim, half)

    def _load_outputs(self, target: torch.Tensor, tensor: torch.Tensor, dim: int) -> None:
        load_part(target, tensor, dim, self.sharing_group.rank, self.sharing_group.world_size, self.name)

    def _load_down(self, param: nn.Parameter, target: torch.Tensor, tensor: torch.Tensor, input_dim: int) -> None:
        is_split = param.input_dim is not None and target.dim() > input_dim  # type: ignore[attr-defined]
        dim = input_dim if is_split else None  # a bias and scales of whole outputs are not split
        load_part(target, tensor, dim, self.sharing_group.rank, self.sharing_group.world_size, self.name)


class FusedMoE(Experts):
    """Experts to which each token is routed by the model: ``experts(hidden_states, topk_weights, topk_ids)``.

    ``reduce_results=False``: each rank returns its summand. Other arguments as in Experts.
    """

    def forward(self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] and a routing function's [T, top_k] weights and ids -> [T, hidden_size]."""
        output = self.compute(hidden_states, topk_weights, topk_ids)
        return self.tp_group.all_reduce(output) if self.reduce_results else output


def _activation(activation: str | Activation, gated: bool) -> Activation:
    if not isinstance(activation, str):
        return activation
    return get_act_and_mul_fn(activation) if gated else get_act_fn(activation)


def _checked_names(names: tuple[str, ...] | None, gated: bool, layer_name: str) -> tuple[str, ...]:
    wanted = ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
    if names is None:
        return wanted
    if len(set(names)) != len(names) or len(names) != len(wanted):
        raise ValueError(
            f"{layer_name}: expert_names must be {len(wanted)} different names, such as {wanted}, not {names}; experts "
            f"that have {'no gate take gated=False' if gated else 'a gate take gated=True'}"
        )
    return names


def _experts_method(layer: Experts, quant_config: QuantizationConfig | None, prefix: str) -> ExpertsMethodBase:
    method = quant_config.get_quant_method(layer, prefix) if quant_config else None
    if method is None:
        return UnquantizedExpertsMethod()
    if not isinstance(method, ExpertsMethodBase):
        raise TypeError(f"{layer.name}: experts need an ExpertsMethodBase, got {type(method).__name__}")
    return method


def expert_sources(
    num_experts: int, expert_names: tuple[str, ...], bias: bool, method: ExpertsMethodBase
) -> dict[str, tuple[str, ShardId]]:
    """Checkpoint names, relative to the layer's own -> the parameter that each fills and its shard id.

    ``expert_names``: gate, up and down, or up and down.
    """
    *firsts, down = expert_names
    fused = "gate_up_proj" if len(firsts) == 2 else "up_proj"
    sources: dict[str, tuple[str, ShardId]] = {}
    together = [(kind, method.fused_suffixes[kind]) for kind in method.kinds if kind in method.fused_suffixes]
    for kind, suffix in (*together, ("bias", "_bias")) if bias else together:
        sources |= {f"{fused}{suffix}": (f"w13_{kind}", None), f"down_proj{suffix}": (f"w2_{kind}", None)}
    for kind in (*method.kinds, "bias") if bias else method.kinds:
        for expert in range(num_experts):
            for name, half in zip(firsts, ("w1", "w3"), strict=False):
                sources[f"{expert}.{name}.{kind}"] = f"w13_{kind}", (expert, half)
            sources[f"{expert}.{down}.{kind}"] = f"w2_{kind}", (expert, "w2")
    return sources
