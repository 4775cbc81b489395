"""What loading its weights makes of a model: the tensors that are filled, and the packed weights that are made of them.

It is noted before, collected after a model was loaded and its weights were packed, and put into another one that was
built alike, which then is as if it had been loaded. ``finish_load`` comes after both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.kernels.packed import Packed
from rtp_llm.srt.kernels.packed_image import ImageReader, ImageWriter, NoImageError, bytes_of
from rtp_llm.srt.layers.quantization.base import ExpertsLayer, FreesParameters, PackedLayer, free

_NOTED_OTHERWISE = frozenset(vars(nn.Module())) | {"packed", "quant_method", "freed", "weights_are_processed"}

Read = Callable[[Sequence[memoryview]], None]


class BuiltModel:
    """A model before its weights are loaded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._targets: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)  # parameters, persistent buffers
        self._forms = {name: _form(tensor) for name, tensor in self._targets.items()}
        self._packed = {name: dict(_packed_of(layer)) for name, layer in _layers(model).items()}
        self._attributes = {name: _attributes(module) for name, module in model.named_modules()}

    def forms(self) -> list[Any]:
        """Names, dtypes and shapes of all that can be loaded."""
        return [[name, *form] for name, form in self._forms.items()]

    def collected(self) -> tuple[dict[str, Any], list[Iterable[memoryview]]]:
        """Return the state after loading: its description, for JSON, and its bytes, an image and each kept tensor.

        Raises:
            NoImageError: loading has changed something else, too.
        """
        now: dict[str, torch.Tensor] = self.model.state_dict(keep_vars=True)
        kept = self._kept(now)
        self._refuse_other_changes()
        image, layers, unmade = ImageWriter(), {}, list[Packed]()
        for name, layer in _layers(self.model).items():
            built = self._packed[name]
            made = {part: packed for part, packed in _packed_of(layer).items() if packed is not built.get(part)}
            layers[name] = {part: image.described(packed) for part, packed in made.items()}
            unmade += [packed for part, packed in _packed_of(layer).items() if part not in made]
        pointers = {tensor.data_ptr() for tensor in kept.values() if tensor.numel()}
        if any(tensor.data_ptr() in pointers for tensor in image.tensors() if tensor.numel()):
            raise NoImageError("a packed weight lies in a parameter's memory")
        if any(tensor.data_ptr() not in pointers for packed in unmade for tensor in packed.tensors()):
            raise NoImageError("a weight lies in a parameter that the model has no more")
        description = {
            "kept": [[name, *_form(tensor)] for name, tensor in kept.items()],
            "freed": [name for name in self._targets if name not in now],
            "layers": layers,
            "image_bytes": image.num_bytes,
            "places": image.places(),
        }
        return description, [image.buffers(), *([bytes_of(tensor)] for tensor in kept.values())]

    def _kept(self, now: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the model that loading has filled and packing has left, each under one name."""
        for name, tensor in now.items():
            if tensor is not self._targets.get(name) or _form(tensor) != self._forms[name]:
                raise NoImageError(f"loading has put another tensor into {name}")
            if not tensor.is_contiguous():
                raise NoImageError(f"{name} has strides {tensor.stride()}")
        return _distinct(now)

    def _refuse_other_changes(self) -> None:
        for name, module in self.model.named_modules():
            changed = _changed(self._attributes.get(name, {}), _attributes(module))
            if changed:
                raise NoImageError(f"loading also sets {changed} of {name or 'the model'} ({type(module).__name__})")

    def restore(self, description: Mapping[str, Any], empty: Callable[..., torch.Tensor], read: Read) -> None:
        """Make the model as one that was loaded. After an error it is neither this nor as it was built.

        Args:
            empty: allocates the image, called as ``torch.empty``.
            read: fills buffers with the bytes that ``collected`` returned.

        Raises:
            NoImageError: the state is another model's.
        """
        freed, kept = description["freed"], _distinct(self._targets, without=description["freed"])
        if [[name, *_form(tensor)] for name, tensor in kept.items()] != description["kept"]:
            raise NoImageError("it keeps other tensors than this model has")
        layers = _layers(self.model)
        if layers.keys() != description["layers"].keys():
            raise NoImageError("it has other layers than this model")
        image = empty(description["image_bytes"], dtype=torch.uint8)
        read([bytes_of(image), *(bytes_of(tensor) for tensor in kept.values())])
        reader = ImageReader(image, description["places"])
        for name, layer in layers.items():
            for part, described in description["layers"][name].items():
                _put(layer, part, reader.made(described))
        self._free(freed)
        for module in self.model.modules():
            if getattr(module, "quant_method", None) is not None:
                module.weights_are_processed = True  # type: ignore[assignment]

    def _free(self, names: Iterable[str]) -> None:
        for name in names:
            path, _, parameter = name.rpartition(".")
            module = self.model.get_submodule(path)
            if not isinstance(module, FreesParameters):
                raise NoImageError(f"it has no {name}")
            if parameter not in module.freed:  # under another name of the module
                free(module, parameter)


def _form(tensor: torch.Tensor) -> list[Any]:
    return [str(tensor.dtype), list(tensor.shape)]


def _distinct(targets: Mapping[str, torch.Tensor], without: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """Return each tensor under its first name."""
    left_out = set(without)
    first: dict[int, str] = {}
    for name, tensor in targets.items():
        if name not in left_out:
            first.setdefault(id(tensor), name)
    return {name: targets[name] for name in first.values()}


def _layers(model: nn.Module) -> dict[str, PackedLayer | ExpertsLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (PackedLayer, ExpertsLayer))}


def _packed_of(layer: PackedLayer | ExpertsLayer) -> Mapping[str, Packed]:
    return {"": layer.packed} if isinstance(layer, PackedLayer) else layer.packed


def _put(layer: PackedLayer | ExpertsLayer, part: str, packed: Any) -> None:
    if isinstance(layer, PackedLayer):
        layer.packed = packed
    else:
        layer.packed[part] = packed


# What loaders may set beside what they are given


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes and buffers that no checkpoint has, with shallow copies of containers."""
    buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
    own = {name: value for name, value in vars(module).items() if name not in _NOTED_OTHERWISE}
    return {name: _noted(value) for name, value in (buffers | own).items()}


def _noted(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value, value._version, value.data_ptr()
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, (list, set)) else value


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if before.keys() != now.keys():
        return ", ".join(sorted(before.keys() ^ now.keys()))
    return next((name for name, value in now.items() if not _same(before[name], value)), None)


def _same(before: Any, now: Any) -> bool:
    if type(before) is not type(now):
        return False
    if isinstance(now, dict):
        return before.keys() == now.keys() and all(_same(before[key], value) for key, value in now.items())
    if isinstance(now, (list, tuple)):
        return len(before) == len(now) and all(map(_same, before, now))
    return before is now or (isinstance(now, (int, float, str)) and before == now)
