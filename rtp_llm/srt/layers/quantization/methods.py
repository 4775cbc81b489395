"""Methods that pack what was loaded: what quantization schemes share."""

from abc import abstractmethod

from rtp_llm.srt.kernels.packed import OneByOne, PackedWeight
from rtp_llm.srt.layers.quantization.base import ExpertsLayer, ExpertsMethodBase, LinearMethodBase, PackedLayer, free


class PackedLinearMethod(LinearMethodBase):
    """Has ``pack`` make the weight of what was loaded; that is freed then."""

    @abstractmethod
    def pack(self, layer: PackedLayer) -> PackedWeight:
        """The layer's weight, from its parameters."""

    @abstractmethod
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters that ``pack`` reads, and nobody after it."""

    def process_weights_after_loading(self, layer: PackedLayer) -> None:
        layer.packed = self.pack(layer)
        free(layer, *self.parameter_names())


class PackedExpertsMethod(ExpertsMethodBase):
    """Has ``pack`` make the weights of what was loaded; that is freed then."""

    @abstractmethod
    def pack(self, layer: ExpertsLayer, name: str) -> list[PackedWeight]:
        """``w13`` or ``w2`` of each expert, from the layer's parameters."""

    def process_weights_after_loading(self, layer: ExpertsLayer) -> None:
        for name in ("w13", "w2"):
            layer.packed[name] = OneByOne(self.pack(layer, name))
            free(layer, *(f"{name}_{kind}" for kind in self.kinds))
