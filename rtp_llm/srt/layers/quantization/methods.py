"""Base of quantization methods that pack the loaded parameters."""

from abc import abstractmethod

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.quantization.base import ExpertsLayer, ExpertsMethodBase, LinearMethodBase, PackedLayer, free


class PackedLinearMethod(LinearMethodBase):
    """Packs the loaded parameters into the layer's weight, then frees them."""

    @abstractmethod
    def pack(self, layer: PackedLayer) -> PackedWeight:
        """Make the layer's weight of its parameters."""

    @abstractmethod
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters that ``pack`` reads; they are freed after it."""

    def process_weights_after_loading(self, layer: PackedLayer) -> None:
        layer.packed = self.pack(layer)
        free(layer, *self.parameter_names())


class PackedExpertsMethod(ExpertsMethodBase):
    """Packs the loaded parameters into the experts' weights, then frees them."""

    @abstractmethod
    def pack(self, layer: ExpertsLayer, name: str) -> list[PackedWeight]:
        """Make ``w13`` or ``w2`` of each expert, from the layer's parameters."""

    def process_weights_after_loading(self, layer: ExpertsLayer) -> None:
        for name in ("w13", "w2"):
            layer.packed[name] = built_for().group_experts(self.pack(layer, name))
            free(layer, *(f"{name}_{kind}" for kind in self.kinds))
