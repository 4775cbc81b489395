"""Names of the reference's modules as our model file has them."""

from torch import nn

from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.srt.models.weight_names import BASE_MODEL_PREFIX, WeightNames

_TENSOR = ".weight"  # rules of renaming are written for tensors


def aligned_names(our_model: nn.Module, their_model: nn.Module) -> dict[nn.Module, str]:
    """Return each of the reference's modules -> its name in our model, by the model file's ``rename``; its own name
    where ours has no such module."""
    known, rules = _checkpoint_names(our_model), WeightNames(our_model)
    names: dict[nn.Module, str] = {}
    for name, module in their_model.named_modules():
        candidates = (name, rules.renamed(f"{name}{_TENSOR}").removesuffix(_TENSOR), f"{BASE_MODEL_PREFIX}{name}")
        names[module] = next((candidate for candidate in candidates if candidate in known), candidates[1])
    names[their_model] = ""
    return names


def _checkpoint_names(model: nn.Module) -> set[str]:
    """Return the names of our modules, and those of the parts of packed ones."""
    packed = ModelTraits.of(model).packed_modules_mapping
    names = {name for name, _ in model.named_modules()}
    for name in list(names):
        parent, _, last = name.rpartition(".")
        names |= {f"{parent}.{source}" if parent else source for source in packed.get(last, ())}
    return names
