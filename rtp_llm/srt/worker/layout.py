"""What a model's layers keep, read from its modules: its cache groups and its states."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from rtp_llm.srt.cache.spec import CacheGroup, CacheLayout, CacheSpec, LengthScaling, StateGroup, StateSpec, StateTensor
from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.model_traits import KeepsCache, KeepsState, ScalesWithLength, SeesWholePrompts, TakesMropePositions


def cache_layout(
    model: nn.Module, page_size: int, kv_cache_dtype: str = "auto", device: str = "cpu", needs_cache: bool = True
) -> CacheLayout:
    """Group the model's attention layers by what they keep, and collect the states of recurrent layers.

    Attention layers that share a cache (equal ids) must agree.

    Args:
        kv_cache_dtype: "auto": the model's dtype; or "bf16", "int8".
        needs_cache: the model makes tokens; False: it may keep nothing, as encoders do.

    Raises:
        ValueError: no layer keeps anything though it must, they do not agree, or their cache cannot have
            ``kv_cache_dtype``.
    """
    specs: dict[int, CacheSpec] = {}
    length_scaling: LengthScaling | None = None
    for name, module in model.named_modules():
        if isinstance(module, KeepsCache):
            spec = stored_as(module.cache_spec(), kv_cache_dtype, device)
            if specs.setdefault(module.layer_id, spec) != spec:
                raise ValueError(f"{name}: layer {module.layer_id} is used twice with different caches")
        scaling = module.length_scaling if isinstance(module, ScalesWithLength) else None
        if scaling is not None:
            if length_scaling not in (None, scaling):
                raise ValueError(f"{name}: the model mixes rotations that depend on the sequence length differently")
            length_scaling = scaling
    states = state_group(model)
    if not specs and states is None and needs_cache:
        raise ValueError("the model has no RadixAttention layer, and none with states: there is nothing to cache")
    groups: dict[CacheSpec, list[int]] = {}
    for layer_id, spec in sorted(specs.items()):
        groups.setdefault(spec, []).append(layer_id)
    return CacheLayout(
        tuple(CacheGroup(spec, tuple(layer_ids), page_size) for spec, layer_ids in groups.items()),
        length_scaling,
        states,
    )


def own_part(layout: CacheLayout, model: nn.Module) -> CacheLayout:
    """Return what a part of the model keeps, in the cache groups of the whole: some may have no layer here."""
    kept = {module.layer_id for module in model.modules() if isinstance(module, KeepsCache)}
    groups = [replace(group, layer_ids=tuple(i for i in group.layer_ids if i in kept)) for group in layout.groups]
    states = None if layout.states is None else state_group(model) or StateGroup(())
    return replace(layout, groups=tuple(groups), states=states)


def largest_part(layouts: Sequence[CacheLayout]) -> CacheLayout:
    """Return a layout that takes at least the memory of each of these, which have the same groups."""
    by_group = zip(*(layout.groups for layout in layouts), strict=True)
    groups = [max(same, key=lambda group: group.bytes_per_page) for same in by_group]
    states = [layout.states for layout in layouts if layout.states is not None]
    largest = max(states, key=lambda group: group.bytes_per_slot) if states else None
    return replace(layouts[0], groups=tuple(groups), states=largest)


def state_group(model: nn.Module) -> StateGroup | None:
    """Collect the states of the model's layers; None if no layer keeps one.

    Raises:
        ValueError: two tensors of a layer have the same name.
    """
    tensors: dict[int, dict[str, StateTensor]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, KeepsState):
            continue
        of_layer = tensors.setdefault(module.layer_id, {})
        for tensor in module.state_spec().tensors:
            if tensor.name in of_layer:
                raise ValueError(
                    f"{name}: layer {module.layer_id} has a state {tensor.name!r} already; give each of its modules "
                    "names of its own, or another layer_id"
                )
            of_layer[tensor.name] = tensor
    layers = tuple((layer_id, StateSpec(tuple(named.values()))) for layer_id, named in sorted(tensors.items()))
    return StateGroup(layers) if layers else None


def stored_as(spec: CacheSpec, kv_cache_dtype: str, device: str) -> CacheSpec:
    """Return a layer's spec in the type that ``--kv-cache-dtype`` asks for.

    Raises:
        ValueError: the device or the layer cannot store that type.
    """
    if kv_cache_dtype == "auto":
        return spec
    possible = provider_named(device).kv_cache_dtypes
    if kv_cache_dtype not in possible:
        raise ValueError(
            f"kv_cache_dtype={kv_cache_dtype} is not for the device {device}, which has {', '.join(possible)}; leave "
            "it at auto"
        )
    if kv_cache_dtype == "bf16":
        if spec.dtype == "float16":
            raise ValueError("kv_cache_dtype=bf16 saves nothing for a model in float16; leave it at auto")
        return replace(spec, dtype="bfloat16")
    if spec.latent:
        raise ValueError(
            "kv_cache_dtype=int8 is not possible for a model with multi-head latent attention, whose cache is small as "
            "it is; leave it at auto"
        )
    return replace(spec, dtype="int8")


def sees_whole_prompts(model: nn.Module) -> bool:
    """Return whether the model's attention sees whole prompts.

    Raises:
        ValueError: some of its layers do, others do not.
    """
    found = {module.sees_whole_prompts for module in model.modules() if isinstance(module, SeesWholePrompts)}
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__}: all attention layers must have sees_whole_prompts, or none")
    return found == {True}


def takes_mrope_positions(model: nn.Module) -> bool:
    return any(isinstance(module, TakesMropePositions) and module.takes_mrope_positions for module in model.modules())
