"""From the names of a GGUF's tensors to those of a Hugging Face checkpoint.

The ``gguf`` package knows under which names the checkpoints of an architecture have a tensor; a model has a place for
one of them. What it does not know, a model's form says (``GGUFForm.names``).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import gguf

from rtp_llm.srt.gguf.header import GGUFError

PART = "{part}"  # in a name: the tensor is one of several, this one's number along the first dimension
NOT_LOADED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # in the configuration
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_EXPERTS = re.compile(r"\.experts\.(?=\w+$)")

FindPlace = Callable[[str], object | None]
"""Called with a name of the checkpoint; returns its place in the model, or None."""
IsLeftOut = Callable[[str], object]
"""Called with a name of the checkpoint that has no place; returns whether the model may do without it."""


def checkpoint_names(
    architecture: str,
    tensors: Iterable[str],
    own_names: Mapping[str, str],
    find: FindPlace,
    is_left_out: IsLeftOut = lambda name: False,
) -> dict[str, str]:
    """Return the tensors' names in the checkpoint. Those that have no place in the model, though they need one, keep
    their own.

    A name with ``{part}`` stands for as many tensors as the GGUF's has along its first dimension. Several of the GGUF's
    may have the same: together they are one of the checkpoint's.

    Args:
        own_names: the form's, which go before the package's.

    Raises:
        GGUFError: the package does not know the architecture, a block's number is absurd, or a tensor has several
            places.
    """
    wanted = [name for name in tensors if name not in NOT_LOADED]
    known = _known_names(architecture, wanted)
    return {name: _placed(name, list(_candidates(name, known, own_names)), find, is_left_out) for name in wanted}


def _known_names(architecture: str, tensors: Iterable[str]) -> dict[str, list[str]]:
    """Return the package's names of tensors, without suffixes such as ``.weight``."""
    number = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        raise GGUFError(
            f"`general.architecture` is {architecture!r}, whose names of tensors this version of the gguf package does "
            "not know: update it"
        )
    names = list(tensors)
    num_blocks = 1 + max((int(match[1]) for match in map(_BLOCK.match, names) if match), default=-1)
    if num_blocks > len(names):
        raise GGUFError(f"a tensor is of block {num_blocks - 1}, but there are only {len(names)} tensors")
    known: defaultdict[str, list[str]] = defaultdict(list)
    for checkpoint_name, (_, name) in gguf.get_tensor_name_map(number, num_blocks).mapping.items():
        known[name].append(checkpoint_name)
    return known


def _candidates(name: str, known: Mapping[str, list[str]], own_names: Mapping[str, str]) -> Iterator[str]:
    block = _BLOCK.match(name)
    stem, dot, suffix = name.rpartition(".")
    for whole, ending in ((stem, dot + suffix), (name, "")):
        key = _BLOCK.sub("blk.{bid}.", whole)
        if key in own_names:
            yield own_names[key].replace("{bid}", block[1] if block else "") + ending
            return
    for candidate in known.get(name, ()):  # a tensor without a suffix
        yield from (f"model.{candidate}", candidate)
    for candidate in known.get(stem, ()):
        base = _EXPERTS.sub(f".experts.{PART}.", candidate) if stem.endswith("_exps") else candidate
        for whole in (base, f"model.{base}"):
            yield whole + dot + suffix
            yield whole
            yield f"{whole}_{suffix}"  # such as experts' down_proj_bias
            if base != candidate:
                yield from (f"{candidate}_{suffix}", candidate)


def _placed(name: str, candidates: Sequence[str], find: FindPlace, is_left_out: IsLeftOut) -> str:
    places: dict[object, str] = {}
    for candidate in candidates:
        place = find(candidate.replace(PART, "0"))
        if place is not None:
            places.setdefault(place, candidate)
    if len(places) > 1:  # all of a parameter, and a part of it: the names of what is fused here are known too
        parts = {place: found for place, found in places.items() if getattr(place, "shard_id", None) is not None}
        places = parts or places
    if len(places) > 1:
        raise GGUFError(f"tensor {name!r} has several places in the model: {', '.join(sorted(places.values()))}")
    if places:
        return next(iter(places.values()))
    return next((candidate for candidate in candidates if is_left_out(candidate.replace(PART, "0"))), name)
