"""Linear layers, split over tensor-parallel ranks.

Names and call shapes are those of vLLM and SGLang; every layer returns ``(output, bias or None)``, the bias only if
``skip_bias_add`` leaves its addition to the caller, or, with ``return_bias=False``, the output alone. The split is
Megatron's (Shoeybi et al., 2019): a column-parallel layer holds a part of the outputs, a row-parallel layer a part of
the inputs, and sums over ranks. With ``disable_tp=True`` every rank holds and computes the whole layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rtp_llm.srt.distributed.parallel_state import RankGroup, divide, get_tp_group
from rtp_llm.srt.layers.activation import Activation
from rtp_llm.srt.layers.quantization.base import LinearMethodBase, PackedLayer, QuantizationConfig
from rtp_llm.srt.layers.quantization.unquantized import UnquantizedLinearMethod
from rtp_llm.srt.layers.weights import ShardId, check_shape, load_part, make_parameter, refuse_shard

LinearOutput = tuple[torch.Tensor, torch.Tensor | None] | torch.Tensor
ALONE = RankGroup(0, 1)  # the group of a layer that is not split


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One checkpoint tensor's share of a layer's outputs: this rank has part ``part`` of ``num_parts`` equal ones."""

    id: str | int
    size: int  # outputs on this rank
    part: int
    num_parts: int

    @property
    def full_size(self) -> int:
        return self.size * self.num_parts


def output_shards(
    sizes: Sequence[int], tp_group: RankGroup, name: str, num_parts: Sequence[int] | None = None
) -> list[OutputShard]:
    """Return this rank's share of outputs side by side, with the ids 0, 1, ...

    Args:
        sizes: of all ranks.
        num_parts: into how many parts each is split; fewer than ranks: neighbouring ranks have the same part. None: as
            many as ranks.
    """
    ranks, shards = tp_group.world_size, []
    for i, size in enumerate(sizes):
        parts = ranks if num_parts is None else num_parts[i]
        replicas = divide(ranks, parts, f"{name}: tensor-parallel size")
        shards.append(OutputShard(i, divide(size, parts, f"{name}: output size"), tp_group.rank // replicas, parts))
    return shards


class LinearBase(PackedLayer):
    """A layer with a weight [sum(output_partition_sizes), input_size_per_partition], made by its method."""

    quant_method: LinearMethodBase
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        skip_bias_add: bool,
        params_dtype: torch.dtype | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
        tp_group: RankGroup | None,
        return_bias: bool = True,
        disable_tp: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.skip_bias_add = skip_bias_add
        self.return_bias = return_bias
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.prefix = prefix
        self.name = prefix or type(self).__name__
        if skip_bias_add and not return_bias:
            raise ValueError(f"{self.name}: with skip_bias_add the caller adds the bias, so return_bias must be True")
        self.tp_group = ALONE if disable_tp else tp_group or get_tp_group()
        self.quant_method = _linear_method(self, quant_config, prefix)

    def _create_parameters(self, input_size: int, output_sizes: list[int], bias: bool) -> None:
        self.quant_method.create_weights(
            self,
            input_size_per_partition=input_size,
            output_partition_sizes=output_sizes,
            input_size=self.input_size,
            output_size=self.output_size,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )
        if bias:
            data = torch.empty(sum(output_sizes), dtype=self.params_dtype)
            self.bias = make_parameter(data, self.weight_loader, output_dim=0)
        else:
            self.register_parameter("bias", None)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias)

    def _result(self, output: torch.Tensor) -> LinearOutput:
        return (output, self.bias if self.skip_bias_add else None) if self.return_bias else output

    def num_source_outputs(self, shard_id: ShardId) -> int:
        """Return the outputs, on all ranks, of the checkpoint tensor with this shard id; see ``weight_loader``."""
        return self.output_size

    def dequantized_weight(self) -> torch.Tensor:
        """Return this rank's weight [outputs, inputs], for other uses than ``forward``; from ``finish_load`` on."""
        return self.quant_method.dequantized_weight(self)

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's part of a checkpoint tensor into ``param``.

        Args:
            tensor: the whole checkpoint tensor; it is cut before it is copied.
            shard_id: which of the fused tensors this is; None if the layer fuses none or the checkpoint did already.

        Raises:
            ValueError: the tensor's shape or the shard id does not fit.
        """
        raise NotImplementedError


class ReplicatedLinear(LinearBase):
    """``x @ W.T + b``, the same on every rank."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        return_bias: bool = True,
        disable_tp: bool = True,
    ) -> None:
        if not disable_tp:
            raise ValueError(
                f"{prefix or type(self).__name__}: every rank has the whole layer: disable_tp must be True"
            )
        super().__init__(input_size, output_size, skip_bias_add, params_dtype, quant_config, prefix, ALONE, return_bias)
        self._create_parameters(input_size, [output_size], bias)

    def forward(self, x: torch.Tensor) -> LinearOutput:
        return self._result(self._multiply(x))

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        refuse_shard(shard_id, self.name)
        load_part(param.data, tensor, None, 0, 1, self.name)


class GateLinear(ReplicatedLinear):
    """The router of a mixture of experts: [T, hidden_size] -> [T, num_experts] logits, the same on every rank.

    Args:
        params_dtype: of the weight, to which inputs are converted; None: torch's default.
        out_dtype: of the logits; None: that of the weight.
        force_fp32_compute: the same as ``params_dtype=torch.float32``.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = False,
        out_dtype: torch.dtype | None = None,
        params_dtype: torch.dtype | None = None,
        force_fp32_compute: bool = False,
        skip_bias_add: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        return_bias: bool = True,
    ) -> None:
        params_dtype = torch.float32 if force_fp32_compute else params_dtype
        super().__init__(input_size, output_size, bias, skip_bias_add, params_dtype, quant_config, prefix, return_bias)
        self.out_dtype = out_dtype

    def forward(self, x: torch.Tensor) -> LinearOutput:
        output = self._multiply(x.to(self.params_dtype))
        return self._result(output.to(self.out_dtype or output.dtype))


class ColumnParallelLinear(LinearBase):
    """Outputs are split: [..., input_size] -> [..., output_size / ranks], or all of them with ``gather_output``."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        tp_group: RankGroup | None = None,
        return_bias: bool = True,
        disable_tp: bool = False,
    ) -> None:
        options = (skip_bias_add, params_dtype, quant_config, prefix, tp_group, return_bias, disable_tp)
        super().__init__(input_size, output_size, *options)
        self.gather_output = gather_output
        self._create_shards(output_shards([output_size], self.tp_group, self.name), bias)

    def _create_shards(self, shards: list[OutputShard], bias: bool) -> None:
        self.shards = shards
        self.part_ids = [shard.id for shard in shards]
        self._create_parameters(self.input_size, [shard.size for shard in shards], bias)

    def forward(self, x: torch.Tensor, activation: Activation | None = None) -> LinearOutput:
        """``activation``: passed by ``activated`` only."""
        if activation is not None:
            return self._result(self.quant_method.apply_activated(self, x, self.bias, activation))
        output = self._multiply(x)
        if self.gather_output:
            output = self._gather(output)
        return self._result(output)

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """``activation(output)``, if possible in one product without its output in memory.

        If either has forward hooks, they are called one after the other.
        """
        if self.skip_bias_add:
            raise ValueError(f"{self.name}: the bias that skip_bias_add leaves out belongs before an activation")
        modules = [module for module in (self, activation) if isinstance(module, nn.Module)]
        watched = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        if not watched and not self.gather_output and self.quant_method.ends_in(self, activation):
            return _output_of(self(x, activation))
        return activation(_output_of(self(x)))

    def _gather(self, output: torch.Tensor) -> torch.Tensor:
        parts = output.split([shard.size for shard in self.shards], dim=-1)
        return torch.cat([self.tp_group.all_gather(part) for part in parts], dim=-1)

    def num_source_outputs(self, shard_id: ShardId) -> int:
        wanted = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        return sum(shard.full_size for shard in self.shards if shard_id is None or shard.id in wanted)

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        dim: int | None = param.output_dim  # type: ignore[attr-defined]
        if dim is None:
            load_part(param.data, tensor, None, 0, 1, self.name)
        elif shard_id is None:
            self._load_fused(param.data, tensor, dim, self.shards)
        elif isinstance(shard_id, tuple):
            self._load_fused(param.data, tensor, dim, [shard for shard in self.shards if shard.id in shard_id])
        else:
            self._load_shard(param.data, tensor, dim, shard_id)

    def _load_fused(self, target: torch.Tensor, tensor: torch.Tensor, dim: int, shards: list[OutputShard]) -> None:
        """Load a tensor that has these shards side by side."""
        expected = list(target.shape)
        expected[dim] = sum(shard.full_size for shard in shards)
        check_shape(tensor, expected, self.name)
        start = 0
        for shard in shards:
            self._load_shard(target, tensor.narrow(dim, start, shard.full_size), dim, shard.id)
            start += shard.full_size

    def _load_shard(self, target: torch.Tensor, tensor: torch.Tensor, dim: int, shard_id: ShardId) -> None:
        start = 0
        for shard in self.shards:
            if shard.id == shard_id:
                name = f"{self.name} (shard {shard_id!r})" if len(self.shards) > 1 else self.name
                load_part(target.narrow(dim, start, shard.size), tensor, dim, shard.part, shard.num_parts, name)
                return
            start += shard.size
        raise ValueError(f"{self.name}: unknown shard_id {shard_id!r}; have {[shard.id for shard in self.shards]}")


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers of one input as one product; outputs side by side. Shard ids: 0, 1, ...

    ``num_parts``: into how many parts each output is split; fewer than ranks: neighbouring ranks have the same part, as
    with the groups of keys of a state-space model. None: as many as ranks.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        tp_group: RankGroup | None = None,
        return_bias: bool = True,
        disable_tp: bool = False,
        num_parts: Sequence[int] | None = None,
    ) -> None:
        options = (skip_bias_add, params_dtype, quant_config, prefix, tp_group, return_bias, disable_tp)
        LinearBase.__init__(self, input_size, sum(output_sizes), *options)
        self.output_sizes = output_sizes
        self.gather_output = gather_output
        self._create_shards(output_shards(output_sizes, self.tp_group, self.name, num_parts), bias)


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values of attention in one product. Shard ids: ``"q"``, ``"k"``, ``"v"``.

    Query heads are split over ranks; key/value heads too, or, where there are fewer than ranks, each is held by
    ``num_kv_head_replicas`` neighbouring ranks. Output: [..., q_size + kv_size + v_size] of this rank.

    ``v_head_size``: of values; None: ``head_size``, and then ``v_size`` is ``kv_size``.
    """

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int | None = None,
        bias: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        tp_group: RankGroup | None = None,
        return_bias: bool = True,
        disable_tp: bool = False,
        v_head_size: int | None = None,
    ) -> None:
        total_num_kv_heads = total_num_kv_heads or total_num_heads
        v_head_size = v_head_size or head_size
        output_size = (total_num_heads + total_num_kv_heads) * head_size + total_num_kv_heads * v_head_size
        options = (skip_bias_add, params_dtype, quant_config, prefix, tp_group, return_bias, disable_tp)
        LinearBase.__init__(self, hidden_size, output_size, *options)
        self.gather_output = False
        self.hidden_size = hidden_size
        self.head_size = head_size
        self.v_head_size = v_head_size
        self.total_num_heads = total_num_heads
        self.total_num_kv_heads = total_num_kv_heads
        self._split_heads()
        self._create_shards(self._qkv_shards(), bias)

    def _split_heads(self) -> None:
        ranks = self.tp_group.world_size
        self.num_heads = divide(self.total_num_heads, ranks, f"{self.name}: number of attention heads")
        if self.total_num_kv_heads >= ranks:
            self.num_kv_heads = divide(self.total_num_kv_heads, ranks, f"{self.name}: number of key/value heads")
            self.num_kv_head_replicas = 1
        else:
            self.num_kv_heads = 1
            self.num_kv_head_replicas = divide(ranks, self.total_num_kv_heads, f"{self.name}: tensor-parallel size")
        self.q_size = self.num_heads * self.head_size
        self.kv_size = self.num_kv_heads * self.head_size
        self.v_size = self.num_kv_heads * self.v_head_size

    def _qkv_shards(self) -> list[OutputShard]:
        rank, ranks, replicas = self.tp_group.rank, self.tp_group.world_size, self.num_kv_head_replicas
        return [
            OutputShard("q", self.q_size, rank, ranks),
            OutputShard("k", self.kv_size, rank // replicas, ranks // replicas),
            OutputShard("v", self.v_size, rank // replicas, ranks // replicas),
        ]


class RowParallelLinear(LinearBase):
    """Inputs are split: [..., input_size / ranks] -> [..., output_size], summed over ranks.

    With ``input_is_parallel=False`` the input is whole, and the layer cuts it. With ``reduce_results=False`` each rank
    returns its summand; exactly one of them contains the bias.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        reduce_results: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        tp_group: RankGroup | None = None,
        return_bias: bool = True,
        disable_tp: bool = False,
    ) -> None:
        options = (skip_bias_add, params_dtype, quant_config, prefix, tp_group, return_bias, disable_tp)
        super().__init__(input_size, output_size, *options)
        self.input_is_parallel = input_is_parallel
        self.reduce_results = reduce_results
        ranks = self.tp_group.world_size
        self.input_size_per_partition = divide(input_size, ranks, f"{self.name}: input size")
        self._create_parameters(self.input_size_per_partition, [output_size], bias)

    def forward(self, x: torch.Tensor) -> LinearOutput:
        rank, size = self.tp_group.rank, self.input_size_per_partition
        if not self.input_is_parallel:
            x = x.narrow(-1, rank * size, size)
        # One rank adds the bias, inside its product, so that a single rank computes exactly an ordinary linear layer.
        bias = None if self.skip_bias_add or rank > 0 else self.bias
        output = self.quant_method.apply(self, x, bias)
        if self.reduce_results:
            output = self.tp_group.all_reduce(output)
        return self._result(output)

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        refuse_shard(shard_id, self.name)
        dim: int | None = param.input_dim  # type: ignore[attr-defined]
        load_part(param.data, tensor, dim, self.tp_group.rank, self.tp_group.world_size, self.name)


def _output_of(result: LinearOutput) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def _linear_method(layer: LinearBase, quant_config: QuantizationConfig | None, prefix: str) -> LinearMethodBase:
    method = quant_config.get_quant_method(layer, prefix) if quant_config else None
    if method is None:
        return UnquantizedLinearMethod()
    if not isinstance(method, LinearMethodBase):
        raise TypeError(f"{layer.name}: a linear layer needs a LinearMethodBase, got {type(method).__name__}")
    return method
