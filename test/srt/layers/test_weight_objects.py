"""A layer's weight is one object, whatever it is stored as; a scheme translates its checkpoint's tensors."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from rtp_llm.srt.kernels.packed import PackedWeight, PlainDense, PlainInt8, SideBySide
from rtp_llm.srt.layers.embedding import ParallelLMHead
from rtp_llm.srt.layers.linear import QKVParallelLinear, ReplicatedLinear
from rtp_llm.srt.layers.moe import FusedMoE
from rtp_llm.srt.layers.quantization.base import (
    PackedLayer,
    QuantizationConfig,
    QuantizedModel,
    process_weights,
    stored_bytes,
)
from rtp_llm.srt.layers.quantization.methods import PackedLinearMethod
from rtp_llm.srt.layers.quantization.on_load import quantize_int8
from rtp_llm.srt.layers.quantization.registry import quantization_config
from rtp_llm.srt.layers.weights import WeightLoader, Weights, default_weight_loader, make_parameter
from rtp_llm.srt.models.weight_loading import WeightLoadError, load_weights_declaratively

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8}


def test_a_weight_that_is_not_there_yet_says_so() -> None:
    config = quantization_config("gptq", QuantizedModel(settings=GPTQ))
    layer = ReplicatedLinear(16, 8, quant_config=config, prefix="model.layers.0.mlp.up_proj")
    for use in (lambda: layer(torch.zeros(1, 16)), layer.dequantized_weight):
        with pytest.raises(RuntimeError, match="used before process_weights_after_loading has made it"):
            use()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_keeps_is_counted_once(dtype: torch.dtype) -> None:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layers = nn.ModuleList([ReplicatedLinear(32, 64), ParallelLMHead(96, 32), FusedMoE(2, 32, 64)])
        layers.append(layers[1])  # a head that is the embedding as well
        for layer in layers:
            process_weights(layer)
    finally:
        torch.set_default_dtype(previous)
    num_weights = 32 * 64 + 64 + 96 * 32 + 2 * (128 * 32 + 64 * 32)
    assert stored_bytes(layers) == num_weights * dtype.itemsize
    assert stored_bytes(layers[0], recurse=False) == (32 * 64 + 64) * dtype.itemsize
    assert stored_bytes(layers, recurse=False) == 0


def test_parameters_that_are_freed_are_named() -> None:
    config = quantization_config("int8", QuantizedModel())
    linear = ReplicatedLinear(32, 64, quant_config=config, prefix="model.layers.0.mlp.up_proj")
    experts = FusedMoE(2, 32, 64, quant_config=config, prefix="model.layers.0.mlp.experts")
    for layer in (linear, experts):
        process_weights(layer)
    with pytest.raises(AttributeError, match=r"mlp.up_proj \(ReplicatedLinear\) has no 'weight' .*dequantized_weight"):
        _ = linear.weight
    with pytest.raises(AttributeError, match=r"mlp.experts \(FusedMoE\) has no 'w13_weight' while the model runs"):
        _ = experts.w13_weight
    with pytest.raises(AttributeError, match="object has no attribute 'wait'"):
        _ = linear.wait


class BlocksConfig(QuantizationConfig):
    """A format with names of its own, ``blk.q.int8`` and ``blk.q.scale`` or ``blk.k.float``: tensors differ in type."""

    def __init__(self, types: Mapping[str, str]) -> None:
        self.types = types

    def get_name(self) -> str:
        return "blocks"

    def get_quant_method(self, layer: nn.Module, prefix: str) -> "BlocksMethod | None":
        return BlocksMethod(self.types) if isinstance(layer, QKVParallelLinear) else None

    def translate(self, weights: Weights, dtype: torch.dtype, device: str) -> Weights:
        for name, tensor in weights:
            _, part, kind = name.split(".")
            yield f"attn.qkv_proj.{part}_{kind}", tensor


class BlocksMethod(PackedLinearMethod):
    def __init__(self, types: Mapping[str, str]) -> None:
        self.types = types

    def create_weights(
        self,
        layer: PackedLayer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: WeightLoader,
    ) -> None:
        self.sizes = output_partition_sizes
        for part, size in zip(layer.part_ids, self.sizes, strict=True):
            if self.types[str(part)] == "int8":
                values = torch.empty(size, input_size_per_partition, dtype=torch.int8)
                layer.register_parameter(f"{part}_int8", make_parameter(values, default_weight_loader))
                layer.register_parameter(f"{part}_scale", make_parameter(torch.empty(size), default_weight_loader))
            else:
                values = torch.empty(size, input_size_per_partition, dtype=params_dtype)
                layer.register_parameter(f"{part}_float", make_parameter(values, default_weight_loader))

    def parameter_names(self) -> tuple[str, ...]:
        kinds = {"int8": ("int8", "scale"), "float": ("float",)}
        return tuple(f"{part}_{kind}" for part, stored in self.types.items() for kind in kinds[stored])

    def pack(self, layer: PackedLayer) -> PackedWeight:
        return SideBySide([self._pack_part(layer, str(part)) for part in layer.part_ids], self.sizes)

    def _pack_part(self, layer: PackedLayer, part: str) -> PackedWeight:
        if self.types[part] == "float":
            return PlainDense(layer.get_parameter(f"{part}_float").data.clone())
        return PlainInt8(*(layer.get_parameter(f"{part}_{kind}").data.clone() for kind in ("int8", "scale")))


def test_each_tensor_has_a_type_of_its_own() -> None:
    config = BlocksConfig({"q": "int8", "k": "float", "v": "int8"})
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.qkv_proj = qkv = QKVParallelLinear(16, 4, 2, 1, bias=False, quant_config=config, prefix="attn.qkv_proj")
    q, k, v = torch.randn(8, 16), torch.randn(4, 16), torch.randn(4, 16)
    stored = {"blk.k.float": k}
    for part, weight in (("q", q), ("v", v)):
        stored[f"blk.{part}.int8"], stored[f"blk.{part}.scale"] = quantize_int8(weight)

    load_weights_declaratively(model, config.translate(stored.items(), torch.float32, "cpu"), quant_config=config)

    assert isinstance(qkv.packed, SideBySide)
    assert [type(part) for part in qkv.packed.parts] == [PlainInt8, PlainDense, PlainInt8]
    assert not list(qkv.parameters())
    dense = qkv.dequantized_weight()
    assert torch.equal(dense[8:12], k)
    torch.testing.assert_close(dense, torch.cat([q, k, v]), rtol=0, atol=0.02)
    x = torch.randn(3, 16)
    torch.testing.assert_close(qkv(x)[0], x @ dense.T, rtol=0.02, atol=0.1)

    del stored["blk.v.scale"]
    model.attn.qkv_proj = QKVParallelLinear(16, 4, 2, 1, bias=False, quant_config=config, prefix="attn.qkv_proj")
    with pytest.raises(WeightLoadError, match=r"1 parameters were not set:\n  attn.qkv_proj.v_scale \[4\]$"):
        load_weights_declaratively(model, config.translate(stored.items(), torch.float32, "cpu"), quant_config=config)
