"""Search for the rotation that turns given queries or keys into others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import torch

from rtp_llm.srt.layers.rotary import MRotaryEmbedding, RotaryEmbedding, get_rope, get_rope_config, rope_kind
from rtp_llm.tools.verify.locate import relative_error

COMMON_BASES = (10000.0, 500000.0, 1000000.0)
MIN_BASE = 100.0
MAX_TRIED_TOKENS = 64
UNKNOWN_ROTATION = "it rotates in a way that none of the trials gives"


@dataclass(frozen=True)
class Rotation:
    """Arguments of ``get_rope``; ``scaling`` and ``positions``: indices into the sets that are tried."""

    base: float
    scaling: int
    rotary_dim: int
    is_neox_style: bool
    positions: int

    def changes(self, other: "Rotation") -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]


@dataclass(frozen=True)
class Rotated:
    """Tokens ``[first_position, first_position + n)`` of a sequence: [n, heads * head_dim], before a rotation.

    Positions, ours and the reference's, are [num_tokens], or [3, num_tokens] of M-RoPE; None: not known.
    """

    before: torch.Tensor
    first_position: int
    num_tokens: int  # of the sequence: some kinds of scaling depend on it
    head_dim: int
    our_positions: torch.Tensor | None = None
    their_positions: torch.Tensor | None = None


class RotationTrials:
    """Trials of rotations. ``config``: the model's. ``rope``: our module, whose base and size are tried too."""

    def __init__(self, config: Any, rope: RotaryEmbedding, rotated: Rotated) -> None:
        self._config, self._rope, self._rotated = config, rope, rotated
        layer_types = sorted(set(getattr(config, "layer_types", None) or [])) or [None]
        sets = [_settings(config, layer_type) for layer_type in layer_types]
        self._scalings: list[dict[str, Any] | None] = []
        for scaling in [*(s for _, s, _ in sets), *_mrope_variants(rope, [s for _, s, _ in sets]), None]:
            if scaling not in self._scalings:
                self._scalings.append(scaling)
        self._positions = list(_positions(rotated))
        own_dim = 2 * rope.inv_freq.shape[-1]
        bases = [*(base for base, _, _ in sets), *self._own_base(own_dim), *_named_bases(config), *COMMON_BASES]
        self._bases = list(dict.fromkeys(bases))
        head_dim = rotated.head_dim
        dims = [*(int(head_dim * partial) for _, _, partial in sets), head_dim, own_dim, head_dim // 2, head_dim // 4]
        self._dims = [dim for dim in dict.fromkeys(dims) if 2 <= dim <= head_dim]

    def _own_base(self, rotary_dim: int) -> list[float]:
        """Return the base of our module, if it has one: inv_freq[i] = base ** (-2 i / rotary_dim)."""
        inv_freq = self._rope.inv_freq.double().cpu()
        if len(inv_freq) < 2 or float(inv_freq[0]) != 1.0:
            return []
        return [float(f"{float(inv_freq[1]) ** (-rotary_dim / 2):.6g}")]

    def explain(self, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> str | None:
        """Return why rotated ``ours`` are not ``theirs``; None: they differ before, or no trial explains it."""
        tried = [(rotation, self._apply(rotation)) for rotation in self._rotations()]
        right = [r for r, result in tried if result is not None and self._is(result, theirs, tolerance)]
        if not right:
            is_unrotated = self._is(self._unrotated(), theirs, tolerance)
            return "it rotates them, and the reference does not" if is_unrotated else None
        if self._is(self._unrotated(), ours, tolerance):
            return "it does not rotate them at all"
        own = [r for r, result in tried if result is not None and self._is(result, ours, tolerance)]
        own = own or [r for r in self._with_other_numbers(right[0]) if self._gives(r, ours, tolerance)]
        if not own:
            return f"{UNKNOWN_ROTATION}; the reference's is {self._text(right[0])}"
        mine, yours = min(product(own, right), key=lambda pair: len(pair[0].changes(pair[1])))
        return "; ".join(self._change(name, mine, yours) for name in mine.changes(yours)) or None

    def _with_other_numbers(self, right: Rotation) -> Iterator[Rotation]:
        """Yield the reference's rotation with its scaling less one of its settings, or with another number there."""
        scaling = self._scalings[right.scaling] or {}
        changed = [{k: v for k, v in scaling.items() if k != key} for key in scaling if key != "rope_type"]
        for key, value in scaling.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                changed += [{**scaling, key: type(value)(value * factor)} for factor in (2, 0.5)]
        factors = [key for key in ("short_factor", "long_factor") if key in scaling]
        if len(factors) == len(("short_factor", "long_factor")):
            changed.append({**scaling, factors[0]: scaling[factors[1]], factors[1]: scaling[factors[0]]})
        for each in changed:
            self._scalings.append(each)
            yield replace(right, scaling=len(self._scalings) - 1)

    def _gives(self, rotation: Rotation, expected: torch.Tensor, tolerance: float) -> bool:
        try:
            result = self._apply(rotation)
        except (KeyError, TypeError, ZeroDivisionError):  # a setting that it needs is missing
            return False
        return result is not None and self._is(result, expected, tolerance)

    def gives(self, theirs: torch.Tensor, tolerance: float) -> bool:
        """Return whether some rotation makes the reference's tensor."""
        results = (self._apply(rotation) for rotation in self._rotations())
        return any(result is not None and self._is(result, theirs, tolerance) for result in results)

    def _rotations(self) -> Iterator[Rotation]:
        styles = (True, False)
        for positions, dim, scaling, base, style in product(
            range(len(self._positions)), self._dims, range(len(self._scalings)), self._bases, styles
        ):
            yield Rotation(base, scaling, dim, style, positions)

    def _is(self, result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
        return relative_error(result[-MAX_TRIED_TOKENS:], expected[-MAX_TRIED_TOKENS:]) <= tolerance

    def _unrotated(self) -> torch.Tensor:
        return self._rotated.before

    def _apply(self, rotation: Rotation) -> torch.Tensor | None:
        """Apply a rotation to the last tokens; return None if it does not exist."""
        before = self._rotated.before[-MAX_TRIED_TOKENS:]
        turned = self._rotate(rotation, before, before)
        return None if turned is None else turned[0]

    def _rotate(self, rotation: Rotation, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rotate the last tokens' q and k; return None if the rotation does not exist or fit."""
        given = self._rotated
        end = given.first_position + len(given.before)
        positions = self._positions[rotation.positions][1][..., end - len(q) : end]
        try:
            rope = get_rope(
                given.head_dim,
                rotary_dim=rotation.rotary_dim,
                max_position=getattr(self._config, "max_position_embeddings", None) or given.num_tokens,
                base=rotation.base,
                is_neox_style=rotation.is_neox_style,
                rope_scaling=self._scalings[rotation.scaling],
                dtype=torch.float32,
            )
        except ValueError:  # for example another number of frequency factors
            return None
        if positions.dim() == 2 and not isinstance(rope, MRotaryEmbedding):
            positions = positions[0]
        # The part of a batch that a rotation reads: the tokens' positions, and the length of their sequence.
        batch = SimpleNamespace(
            positions=positions,
            mrope_positions=None,
            prompt_lens_cpu=[given.num_tokens],
            extend_prefix_lens_cpu=[end - len(q)],
            extend_seq_lens_cpu=[len(q)],
        )
        rope.prepare_for_forward(cast(Any, batch))
        return rope(positions, q, k)

    def _change(self, name: str, ours: Rotation, theirs: Rotation) -> str:
        mine, yours = getattr(ours, name), getattr(theirs, name)
        match name:
            case "is_neox_style":
                return f"rotary layout: ours pairs {_pairs(mine)}, the reference {_pairs(yours)}"
            case "base":
                return f"rotary base: ours {mine:g}, the reference's {yours:g}"
            case "scaling":
                sections = [_sections(self._scalings[index]) for index in (mine, yours)]
                if sections[0] != sections[1]:
                    return (
                        f"pairs that turn by time, height and width: ours {sections[0]}, the reference's {sections[1]}"
                    )
                return f"rope scaling: ours {self._kind(mine)}, the reference's {self._kind(yours)}"
            case "rotary_dim":
                return f"rotated components of a head: ours {mine}, the reference's {yours}"
            case _:
                return f"positions {self._positions[mine][0]}"

    def _kind(self, scaling: int) -> str:
        chosen = self._scalings[scaling]
        return "none" if chosen is None else f"{rope_kind(chosen)} {_numbers(chosen)}".strip()

    def _text(self, rotation: Rotation) -> str:
        return (
            f"base {rotation.base:g}, scaling {self._kind(rotation.scaling)}, {rotation.rotary_dim} components, "
            f"pairs {_pairs(rotation.is_neox_style)}"
        )


def _settings(config: Any, layer_type: str | None) -> tuple[float, dict[str, Any] | None, float]:
    """Return base, scaling and rotated part of a configuration; the usual ones if it names them in a way of its own."""
    try:
        return get_rope_config(config, layer_type)
    except (AttributeError, KeyError, TypeError, ValueError):
        return COMMON_BASES[0], None, 1.0


def _named_bases(config: Any) -> list[float]:
    """Return numbers of the configuration that may be bases, whatever they are called."""
    named = {key: value for key, value in vars(config).items() if "rope" in key or "rotary" in key or "theta" in key}
    return [float(value) for value in named.values() if isinstance(value, (int, float)) and value > MIN_BASE]


def _mrope_variants(rope: RotaryEmbedding, scalings: Sequence[dict[str, Any] | None]) -> Iterator[dict[str, Any]]:
    """Yield the sections of the configuration and of our module, consecutive and interleaved."""
    sections = [tuple(scaling["mrope_section"]) for scaling in scalings if scaling and "mrope_section" in scaling]
    if isinstance(rope, MRotaryEmbedding):
        sections.append(rope.mrope_section)
    for scaling, section, interleaved in product(scalings, dict.fromkeys(sections), (False, True)):
        yield {**(scaling or {}), "mrope_section": list(section), "mrope_interleaved": interleaved}


def _positions(rotated: Rotated) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the reference's positions first, then wrong ones, each with its description."""
    text = torch.arange(rotated.num_tokens)
    right = text if rotated.their_positions is None else rotated.their_positions
    if right.dim() == 2 and bool((right == right[:1]).all()):
        right = right[0]
    yield "", right
    for offset in (1, -1):
        yield f"are off by {offset:+d}", right + offset
    if right.dim() == 2:
        yield "are those of a text, without time, height and width", text
    ours = rotated.our_positions
    if ours is not None and not torch.equal(*torch.broadcast_tensors(ours, right)):
        yield _other_positions(ours, right), ours


def _other_positions(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    ours, theirs = torch.broadcast_tensors(ours, theirs)
    if ours.dim() == 1:
        ours, theirs = ours[None], theirs[None]
    token = int((ours != theirs).any(dim=0).nonzero()[0])
    mine, yours = (tuple(positions[:, token].tolist()) for positions in (ours, theirs))
    named = " (time, height, width)" if len(mine) == 3 else ""
    again = ", as if it began there: they start at zero again" if token and not any(mine) else ""
    return f"are others from token {token} on: ours {mine}, the reference's {yours}{named}{again}"


def _sections(scaling: dict[str, Any] | None) -> str:
    if not scaling or "mrope_section" not in scaling:
        return "none"
    order = "interleaved" if scaling.get("mrope_interleaved") else "one after another"
    return f"{list(scaling['mrope_section'])} {order}"


def _pairs(is_neox_style: bool) -> str:
    return "halves (is_neox_style=True)" if is_neox_style else "neighbours (is_neox_style=False)"


def _numbers(scaling: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in scaling.items() if isinstance(value, (int, float)))
