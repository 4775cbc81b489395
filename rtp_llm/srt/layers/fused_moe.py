"""Experts with their routing inside, as vLLM's model files call them: ``experts(hidden_states, router_logits)``."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.layers.activation import SiluAndMulWithClamp, SwigluStepAndMul
from rtp_llm.srt.layers.linear import GateLinear, RowParallelLinear
from rtp_llm.srt.layers.moe import Activation, Experts
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.routing import Routing, TopK
from rtp_llm.srt.layers.weights import ShardId, WeightLoader

__all__ = [
    "FusedMoE",
    "FusedMoEFactory",
    "GateLinear",
    "RoutedExperts",
    "RoutedMoE",
    "SharedFusedMoE",
    "activation_without_mul",
    "fused_moe_make_expert_params_mapping",
]

NUM_DIMS = 3  # of a tensor of all experts' weights
WITHOUT_GATE = "_no_mul"  # how the name of an activation ends for experts without gates


class RoutedMoE(Experts):
    """Experts, their routing, and what goes with them, in vLLM's words.

    ``gate``, ``shared_experts`` and the transforms belong to the block that makes this layer, which has them as its own
    attributes; they are called here, and not registered a second time.

    Args:
        params_dtype, quant_config, prefix, has_bias: of the experts, see ``moe.Experts``.
        ckpt_names: names of an expert's gate, down and up projections in the checkpoint; without gates of up and down,
            and None.
        is_fused_checkpoint_transposed: as ``is_transposed`` there.
        activation: a name for ``get_act_and_mul_fn``; with ``_no_mul`` behind it the experts have no gates.
        swiglu_limit: silu's gate and up are cut at this number.
        top_k, renormalize, scoring_func, num_expert_group, topk_group: see ``routing.TopK``; the groups count only with
            ``use_grouped_topk``.
        e_score_correction_bias: the correction bias; a parameter, of the block or only of this layer.
        custom_routing_function: called with hidden_states, gating_output, topk and renormalize in place of all these.
        routed_scaling_factor: a factor of the weights; with ``apply_routed_scale_to_output`` of the experts' output.
        apply_router_weight_on_input: weights multiply the experts' inputs, not their outputs.
        gate: makes the logits from the hidden states; ``router_logits`` is then not read.
        shared_experts: for every token; its output, of this rank only (``reduce_results=False``), is added.
        routed_input_transform, routed_output_transform: around the routed experts.
        reduce_results: False: each rank returns its summand.
        zero_expert_type: "identity": logits beyond those of ``num_experts`` are of experts that return their input
            (LongCat-Flash, 2025); None: there are none.
        routed_experts_cls, routed_experts_args: a subclass of RoutedExperts whose ``weight_loader`` reads the
            checkpoint, and arguments for it.
    """

    # long: half of it is the signature, which is vLLM's
    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        params_dtype: torch.dtype | None = None,
        renormalize: bool = True,
        use_grouped_topk: bool = False,
        num_expert_group: int | None = None,
        topk_group: int | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        custom_routing_function: Callable[..., Routing] | None = None,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        swiglu_limit: float | None = None,
        e_score_correction_bias: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        activation: str = "silu",
        has_bias: bool = False,
        reduce_results: bool = True,
        ckpt_names: tuple[str, str, str | None] | None = None,
        is_fused_checkpoint_transposed: bool = False,
        gate: nn.Module | None = None,
        shared_experts: nn.Module | None = None,
        routed_input_transform: nn.Module | None = None,
        routed_output_transform: nn.Module | None = None,
        apply_routed_scale_to_output: bool = False,
        zero_expert_type: str | None = None,
        routed_experts_cls: "type[RoutedExperts] | None" = None,
        routed_experts_args: Mapping[str, Any] | None = None,
    ) -> None:
        if zero_expert_type not in (None, "identity"):
            raise ValueError(f"{prefix}: unknown zero_expert_type {zero_expert_type!r}; have ['identity', None]")
        super().__init__(
            num_experts,
            hidden_size,
            intermediate_size,
            _activation(activation, swiglu_limit),
            has_bias,
            reduce_results,
            _expert_names(ckpt_names),
            is_fused_checkpoint_transposed,
            params_dtype,
            quant_config,
            prefix,
            gated=not activation.endswith(WITHOUT_GATE),
        )
        self.e_score_correction_bias = e_score_correction_bias  # under this name too, if it is a parameter
        self.top_k = top_k
        self.renormalize = renormalize
        self.custom_routing_function = custom_routing_function
        self.weights_inputs = apply_router_weight_on_input
        self.output_scale = routed_scaling_factor if apply_routed_scale_to_output else 1.0
        self.returns_inputs = zero_expert_type is not None
        self.rule = TopK(
            top_k,
            scoring_func,
            renormalize,
            e_score_correction_bias,
            (num_expert_group or 1) if use_grouped_topk else 1,
            (topk_group or 1) if use_grouped_topk else 1,
            1.0 if apply_routed_scale_to_output else routed_scaling_factor,
        )
        _check_shared(self.name, shared_experts)
        if routed_output_transform is not None and not reduce_results:
            raise ValueError(f"{self.name}: routed_output_transform takes a whole sum: reduce_results must be True")
        # In a tuple, so that they are not registered here.
        self._around = (gate, shared_experts, routed_input_transform, routed_output_transform)
        if routed_experts_cls is not None:
            for param in self.parameters(recurse=False):
                loader: Any = param.weight_loader  # type: ignore[attr-defined]
                reader = routed_experts_cls(self, loader, **(routed_experts_args or {}))
                param.weight_loader = reader.weight_loader  # type: ignore[attr-defined]

    @property
    def is_internal_router(self) -> bool:
        return self._around[0] is not None

    def forward(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] and logits [T, num_experts] -> [T, hidden_size]."""
        gate, shared_experts, input_transform, output_transform = self._around
        shared = None if shared_experts is None else _output_of(shared_experts(hidden_states))
        if gate is not None:
            router_logits = _output_of(gate(hidden_states))
        routed = hidden_states if input_transform is None else _output_of(input_transform(hidden_states))
        output = self._routed(routed, *self.route(routed, router_logits))
        if self.output_scale != 1.0:
            output = output * self.output_scale
        if output_transform is not None:
            output = _output_of(output_transform(self.tp_group.all_reduce(output)))
            return output if shared is None else output + self.tp_group.all_reduce(shared)
        output = output if shared is None else shared + output
        return self.tp_group.all_reduce(output) if self.reduce_results else output

    def route(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> Routing:
        """Return each token's weights and experts, [T, top_k] each."""
        if self.custom_routing_function is None:
            return self.rule(router_logits)
        topk_weights, topk_ids = self.custom_routing_function(
            hidden_states=hidden_states, gating_output=router_logits, topk=self.top_k, renormalize=self.renormalize
        )
        return topk_weights.float(), topk_ids.long()

    def _routed(self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """The experts' weighted outputs, this rank's summand; one rank adds the inputs of those that return them."""
        if not self.returns_inputs:
            return self.compute(hidden_states, topk_weights, topk_ids, self.weights_inputs)
        is_input = topk_ids >= self.num_experts
        factors = topk_weights.masked_fill(~is_input, 0.0).sum(dim=-1, keepdim=True).to(hidden_states.dtype)
        topk_weights, topk_ids = topk_weights.masked_fill(is_input, 0.0), topk_ids.masked_fill(is_input, 0)
        output = self.compute(hidden_states, topk_weights, topk_ids, self.weights_inputs)
        return output + hidden_states * factors if self.tp_group.rank == 0 else output

    @property
    def expert_map(self) -> torch.Tensor | None:
        """[num_experts]: places among this rank's experts, -1 for those of other ranks; None: this rank has all."""
        if self.expert_group.world_size == 1:
            return None
        places = torch.arange(self.num_experts) - self.first_expert
        return torch.where((places < 0) | (places >= self.num_own_experts), -1, places)

    @property
    def moe_config(self) -> SimpleNamespace:
        """Sizes by the names that model files ask for: nothing is padded."""
        parallel = SimpleNamespace(tp_size=self.sharing_group.world_size, tp_rank=self.sharing_group.rank)
        return SimpleNamespace(
            hidden_dim=self.hidden_size,
            num_experts=self.num_experts,
            intermediate_size_per_partition=self.intermediate_size_per_partition,
            moe_parallel_config=parallel,
            **vars(parallel),
        )

    def add_parameter(self, name: str, *shape: int, **options: Any) -> nn.Parameter:
        param = super().add_parameter(name, *shape, **options)
        param.weight_loader = called_by_expert(param.weight_loader)  # type: ignore[attr-defined]
        return param


class RoutedExperts:
    """How experts read a checkpoint: a model file overrides ``weight_loader`` for tensors of a form of their own.

    It writes into ``param.data``, which has this rank's part of its experts (see ``moe.Experts``).

    Args:
        experts: the layer that has the parameters.
        loader: that layer's own, which ``super().weight_loader(...)`` calls.
    """

    def __init__(self, experts: RoutedMoE, loader: Callable[..., bool | None]) -> None:
        self.moe_config = experts.moe_config
        self.quant_method = experts.quant_method
        self._first_expert, self._num_own = experts.first_expert, experts.num_own_experts
        self._load = loader

    def weight_loader(
        self,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> bool | None:
        """Copy this rank's part of a tensor; see ``called_by_expert``."""
        return self._load(param, loaded_weight, weight_name, shard_id, expert_id, return_success)

    def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
        """Return an expert's place among this rank's; -1: other ranks have it."""
        place = expert_id - self._first_expert
        return place if 0 <= place < self._num_own else -1


FusedMoE = SharedFusedMoE = FusedMoEFactory = RoutedMoE


def called_by_expert(weight_loader: WeightLoader) -> Callable[..., bool | None]:
    """Return a loader that is also called as vLLM's ``load_weights`` do.

    That is ``(param, tensor, name, shard_id="w1", expert_id=3)``, where the tensor's name is not needed. A tensor of
    three dimensions holds those of all experts, from this one on. Every tensor belongs to this rank, which True as the
    result says, if ``return_success`` asks for one.
    """

    def load(
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: ShardId = None,
        shard_id: ShardId = None,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> bool | None:
        if expert_id is None:
            weight_loader(param, loaded_weight, shard_id if isinstance(weight_name, str) else weight_name)
        else:
            tensors = loaded_weight if loaded_weight.dim() == NUM_DIMS else [loaded_weight]
            for expert, tensor in enumerate(tensors, expert_id):
                weight_loader(param, tensor, (expert, str(shard_id)))
        return return_success or None

    return load


def fused_moe_make_expert_params_mapping(
    model: nn.Module,
    ckpt_gate_proj_name: str,
    ckpt_down_proj_name: str,
    ckpt_up_proj_name: str | None,
    num_experts: int,
) -> list[tuple[str, str, int, str]]:
    """Return parts of parameters' names, those of the checkpoint's that they replace, and what to give the loaders.

    A line is ``(part of our name, part of the checkpoint's name, expert, shard)``; ``model`` is part of the call shape
    that model files share, not needed here.
    """
    names = (("w1", ckpt_gate_proj_name), ("w2", ckpt_down_proj_name), ("w3", ckpt_up_proj_name))
    return [
        (f"experts.{'w2' if shard == 'w2' else 'w13'}_", f"experts.{expert}.{name}.", expert, shard)
        for expert in range(num_experts)
        for shard, name in names
        if name
    ]


def activation_without_mul(activation: str) -> str:
    """Return the name by which experts without gates take an activation."""
    return activation if activation.endswith(WITHOUT_GATE) else activation + WITHOUT_GATE


def _activation(name: str, limit: float | None) -> str | Activation:
    name = name.removesuffix(WITHOUT_GATE)
    if name == "swiglustep":
        return SwigluStepAndMul() if limit is None else SwigluStepAndMul(limit)
    if limit is not None:
        if name not in ("silu", "swish"):
            raise ValueError(f"swiglu_limit goes with activation 'silu', not {name!r}")
        return SiluAndMulWithClamp(limit)
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)


def _expert_names(ckpt_names: tuple[str, str, str | None] | None) -> tuple[str, ...] | None:
    """Gate, down, up -> gate, up, down; without gates up, down, None -> up, down."""
    if ckpt_names is None:
        return None
    first, down, up = ckpt_names
    return (first, up, down) if up else (first, down)


def _check_shared(name: str, shared_experts: nn.Module | None) -> None:
    """Refuse shared experts that are summed over ranks by themselves: they would be summed twice."""
    for module in shared_experts.modules() if shared_experts is not None else ():
        if isinstance(module, RowParallelLinear) and module.reduce_results:
            raise ValueError(
                f"{name}: shared_experts are summed over ranks together with the others: make {module.name} with "
                "reduce_results=False"
            )


def _output_of(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result
