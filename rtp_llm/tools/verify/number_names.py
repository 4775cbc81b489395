"""Names for numbers: which fields of a configuration, or functions of them, a factor is."""

import re
from collections.abc import Callable, Iterator
from itertools import combinations, permutations, product
from typing import Any

from rtp_llm.srt.layers.rope_scaling import yarn_get_mscale

TOLERANCE = 1e-3
EXACT = 1e-5
MAX_LISTED = 8  # numbers of a list that are named one by one
_SCALE = re.compile(r"scal|multiplier|factor|alpha|softcap")
_NO_SCALE = re.compile(r"rope|rotary|init|aux|capacity")  # they multiply no tensor
_SIZE = re.compile(r"(^|_)(hidden_size|head_dim|size|dim|scalar|rank)$")
_NO_SIZE = re.compile(r"vocab|chunk|image|patch|window|kernel")
MAX_NAMED = 2

# A factor as a function of a number x, and what people do who are wrong by it. {0} is the number's name and value.
_Relation = tuple[Callable[[float], float], str]
_TWICE: tuple[_Relation, ...] = (
    (lambda x: x * x, "ours multiplies by {0}, the reference divides by it (or ours by its square)"),
    (lambda x: 1 / (x * x), "ours divides by {0}, the reference multiplies by it (or ours by its square)"),
)
_ONCE: tuple[_Relation, ...] = (
    (lambda x: x, "ours multiplies by {0} and the reference does not, or it divides by it and ours does not"),
    (lambda x: 1 / x, "the reference multiplies by {0} and ours does not, or ours divides by it"),
)
_ROOTS: tuple[_Relation, ...] = (
    (lambda x: x**0.5, "ours multiplies by the root of {0} and the reference does not, or it divides by it"),
    (lambda x: x**-0.5, "the reference multiplies by the root of {0} and ours does not, or ours divides by it"),
)
_SHIFTED: tuple[_Relation, ...] = (
    (lambda x: 1 + x, "1 + {0}"),
    (lambda x: x - 1, "{0} - 1"),
    (lambda x: 1 / (1 + x), "1 / (1 + {0})"),
    (lambda x: -x, "the negative of {0}"),
)


def numbers_of(config: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Return the configuration's scales and its sizes, by name, those of short lists as ``name[index]``; a head's size
    is derived if it is not given."""
    values = {
        name: float(value)
        for name, value in _named_values(config)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and value != 1
    }
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if heads and hidden and "head_dim" not in values:
        values["head_dim"] = hidden / heads
    scales = {name: value for name, value in values.items() if _SCALE.search(name) and not _NO_SCALE.search(name)}
    sizes = {n: v for n, v in values.items() if n not in scales and _SIZE.search(n) and not _NO_SIZE.search(n)}
    return scales, sizes


def _named_values(config: Any) -> Iterator[tuple[str, Any]]:
    lists = {name: value for name, value in vars(config).items() if isinstance(value, (list, tuple))}
    yield from ((name, value) for name, value in vars(config).items() if name not in lists)
    for name, values in lists.items():
        yield from ((f"{name}[{index}]", value) for index, value in enumerate(values[:MAX_LISTED]))


def factor_reason(factor: float, config: Any) -> str:
    """Return what a wrong factor (ours through the reference's) comes from by the configuration."""
    found = list(dict.fromkeys(_reasons(factor, config)))[:MAX_NAMED]
    return "; or ".join(found) if found else "another factor, or one where there is none"


def is_named(factor: float, config: Any) -> bool:
    """Return whether the configuration's numbers give a wrong factor, up to the rounding of float32."""
    return next(_reasons(factor, config, EXACT), None) is not None


def ratio_name(factor: float, config: Any) -> str:
    """Return which number of the configuration stands in the place of which other one, those of one list first, where
    a factor is the one through the other; empty: none."""
    scales = numbers_of(config)[0]
    pairs = [(one, other) for one, other in permutations(scales, 2) if _is(factor, scales[one] / scales[other])]
    pairs.sort(key=lambda names: names[0].partition("[")[0] != names[1].partition("[")[0])
    return f"{pairs[0][0]} in the place of {pairs[0][1]}" if pairs else ""


def value_name(value: float, config: Any, digits: int = 6) -> str:
    """Return a number with what it is by the configuration: ``0.25 (1 / logits_scaling)``."""
    shown = f"{value:.{digits}g}"
    scales, sizes = numbers_of(config)
    forms: tuple[tuple[Callable[[float], float], str], ...] = (
        (lambda x: x, "{0}"),
        (lambda x: 1 / x, "1 / {0}"),
        (lambda x: x**0.5, "root of {0}"),
        (lambda x: x**-0.5, "1 / root of {0}"),
        (lambda x: x * x, "{0} squared"),
    )
    for numbers in (scales, sizes):
        for function, text in forms:
            for name, x in numbers.items():
                if _is(value, function(x)):
                    return f"{shown} ({text.format(name)})"
    return shown


def scaling_name(scaling: float, head_dim: int, config: Any) -> str:
    """Return what a factor of attention's scores is by a head's size, the configuration's numbers and those of a
    stretched context; empty: nothing of these."""
    sizes = {f"{head_dim}, the size of a head": float(head_dim)}
    sizes |= {f"{name} ({size:.6g})": size for name, size in numbers_of(config)[1].items()}
    factors = {"": 1.0, **_stretch_factors(config)}
    for (factor_name, factor), (name, size) in product(factors.items(), sizes.items()):
        for text, value in ((f"1 / root of {name}", size**-0.5), (f"1 / {name}", 1 / size)):
            if _is(scaling, factor * value):
                return f"{text}{factor_name}"
    return next((f"1{name}" for name, factor in factors.items() if _is(scaling, factor)), "")


def _stretch_factors(config: Any) -> dict[str, float]:
    """Return the factors of scores that YaRN's settings give, by text."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict) or not isinstance(parameters.get("factor"), (int, float)):
        return {}
    given = {key: parameters.get(key) for key in ("mscale", "mscale_all_dim")}
    settings = {key: value for key, value in given.items() if isinstance(value, (int, float)) and value}
    scales = {key: yarn_get_mscale(parameters["factor"], value) for key, value in settings.items()}
    return {
        f", times YaRN's factor of {key} ({scale:.6g}){text}": scale**power
        for key, scale in scales.items()
        for power, text in ((1, ""), (2, " squared"))
    }


def _reasons(factor: float, config: Any, tolerance: float = TOLERANCE) -> Iterator[str]:
    scales, sizes = numbers_of(config)
    for numbers, relations in ((scales, _ONCE), (scales, _TWICE), (sizes, _ROOTS), (sizes, _ONCE), (scales, _ROOTS)):
        for function, text in relations:
            yield from (
                text.format(f"{n} ({x:.6g})") for n, x in numbers.items() if _is(factor, function(x), tolerance)
            )
    for (first, x), (second, y) in combinations(scales.items(), 2):
        for value, text in ((x * y, "times"), (x / y, "through"), (y / x, "through"), (1 / (x * y), "1 / of")):
            names = (second, first) if value == y / x else (first, second)
            if _is(factor, value, tolerance):
                yield (
                    f"1 / ({first} * {second})" if text == "1 / of" else f"{names[0]} {text} {names[1]}"
                ) + " of the configuration"
    for function, text in _SHIFTED:
        yield from (text.format(f"{n} ({x:.6g})") for n, x in scales.items() if _is(factor, function(x), tolerance))


def _is(value: float, other: float, tolerance: float = TOLERANCE) -> bool:
    return abs(value - other) <= tolerance * abs(other)
