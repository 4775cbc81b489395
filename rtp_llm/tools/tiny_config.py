"""A small configuration of any architecture, which keeps the structure of the usual one.

Rules go by what a field is named and by its value, never by the model. Kept are: the kinds of layers and the order in
which they begin, whether heads share keys (one, some, or none), whether heads are wider than ``hidden_size``
divided among them, ratios of rotated dimensions, the kind of the rotary embedding, groups of experts, latent sizes that
are there at all, and every switch and factor. Windows become shorter than the prompts that tools ask.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

VOCAB_SIZE = 99
HIDDEN_SIZE = 64
NUM_HEADS = 4
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
WIDE_HEAD_DIM = 24  # where heads are not hidden_size / num_heads wide
CONTEXT_LENGTH = 512
WINDOW = 24
NUM_LAYERS = 4  # at least; as many as show every kind of layer
MOST_LAYERS = 12
NUM_EXPERTS = 8
TOP_K = 2

_META = ("architectures", "transformers_version", "model_type", "dtype", "torch_dtype", "_name_or_path", "auto_map")
_LAYERS, _OTHER_LAYERS = "num_hidden_layers", "num_layers"  # the second where the first is not mapped to it
_HEADS, _HIDDEN = "num_attention_heads", "hidden_size"
# Fields that say from which layer on, or every how many layers, something holds.
_FIRST_LAYERS = re.compile(r"first_k_dense|dense_layers$|layer_start|dense_replace")
_PERIODS = re.compile(r"(interval|_pattern|_step|_every_n_layers|_period|_freq|_offset)$")
_SHARED_LAYERS = re.compile(r"kv_shared_layers$")

_KV_HEADS = re.compile(r"^(swa_)?(num_key_value_heads|num_kv_heads|kv_n_heads|n_head_kv|num_key_value_groups_heads)$")
_FEED_FORWARD = re.compile(r"intermediate|ffn|expert_hidden|n_inner|d_ff|mlp_hidden|mlp_dim")
_EXPERTS = re.compile(r"^(moe_|num_|n_|num_local_|n_routed_|moe_num_)+(routed_|local_)?experts$")
_TOP_K = re.compile(r"(experts_per_tok|experts_per_token|moe_top_?k|moe_k|^top_?k)$")
_SHARED_EXPERTS = re.compile(r"shared_experts$")
_WINDOWS = re.compile(r"(sliding_window(_size)?|attention_chunk_size|^window_size|local_window_size)$")
_POSITIONS = re.compile(r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_sequence_length)$")
_TOKEN_IDS = re.compile(r"_token_(id|index|ids)$")
_OTHER_SIZES = re.compile(r"(size|dim|rank|width|channels|hidden|_dims)$")
_END_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_head_dim": 16 + 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 16,
}


def tiny_config(
    config_class: type[PreTrainedConfig],
    given: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    vocab_size: int = VOCAB_SIZE,
) -> PreTrainedConfig:
    """Return a small configuration.

    Args:
        given: what a config.json holds, whose structure is kept; None: that of the class's defaults.
        overrides: fields that have these values whatever the rules say; those of a part, such as ``text_config``, are
            added to its others.

    Raises:
        ValueError: or whatever the class raises over a configuration that does not suit it.
    """
    usual = config_class.from_dict(dict(given)) if given else config_class()
    changes = shrunk(usual, vocab_size, given=given or {})
    for name, value in _own_names(usual, overrides or {}).items():
        is_part = isinstance(value, Mapping) and name in usual.sub_configs
        changes[name] = changes.get(name, {}) | value if is_part else value
    kept = {name: value for name, value in _own_names(usual, given or {}).items() if name not in _META}
    return config_class(**kept | changes)


def shrunk(
    usual: PreTrainedConfig,
    vocab_size: int = VOCAB_SIZE,
    parent: PreTrainedConfig | None = None,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Return the fields of a configuration that become smaller, by the class's own names, with their new values.

    Fields that the class neither takes nor is given stay out: it computes them of others.

    Args:
        parent: the configuration that this one is a part of.
        given: what a config.json holds.
    """
    taken = {*inspect.signature(type(usual).__init__).parameters, *_own_names(usual, given or {})}
    facts = _Facts.of(usual, parent)
    changes: dict[str, Any] = {}
    for name, value in usual.to_dict().items():
        if name in _META or name in usual.sub_configs or value is None or isinstance(value, (bool, str)):
            continue
        if name not in taken or isinstance(getattr(type(usual), name, None), property):
            continue
        new = _new_value(facts.common_name(name), value, facts, vocab_size)
        if new != value:
            changes[name] = new
    changes |= _missing(facts)
    for name in usual.sub_configs:
        inner = getattr(usual, name, None)
        if isinstance(inner, PreTrainedConfig):
            part = (given or {}).get(name)
            fields = shrunk(inner, vocab_size, usual, part if isinstance(part, Mapping) else None)
            changes[name] = fields | {"model_type": inner.model_type}
    return changes


@dataclass(frozen=True)
class _Facts:
    """What the rules ask of the usual configuration.

    ``kept``: the layers that stay, by their old indices.
    """

    config: PreTrainedConfig
    hidden_size: int
    num_heads: int
    num_layers: int
    head_dim: int
    kept: tuple[int, ...]

    @classmethod
    def of(cls, config: PreTrainedConfig, parent: PreTrainedConfig | None) -> "_Facts":
        def read(name: str, default: int) -> int:
            value = _field(config, name)
            value = _field(parent, name) if value is None and parent is not None else value
            return value if isinstance(value, int) and value > 0 else default

        hidden_size, num_heads = read(_HIDDEN, HIDDEN_SIZE), read(_HEADS, NUM_HEADS)
        num_layers = read(_LAYERS, read(_OTHER_LAYERS, 1))
        head_dim = read("head_dim", max(1, hidden_size // num_heads))
        return cls(config, hidden_size, num_heads, num_layers, head_dim, kept_layers(config, num_layers))

    def common_name(self, name: str) -> str:
        """Return transformers' common name for a class's own one."""
        own = {own: common for common, own in self.config.attribute_map.items()}
        return own.get(name, name)

    @property
    def new_head_dim(self) -> int:
        is_usual = self.head_dim * self.num_heads == self.hidden_size or _field(self.config, _HEADS) is None
        return HEAD_DIM if is_usual else WIDE_HEAD_DIM

    @property
    def rotated_dim(self) -> int:
        """The rotated dimensions of a small head, by the usual ratio."""
        factor, rope = _field(self.config, "partial_rotary_factor"), _field(self.config, "rope_parameters")
        factor = rope.get("partial_rotary_factor", factor) if isinstance(rope, dict) else factor
        width = _LATENT["qk_rope_head_dim"] if _field(self.config, "qk_rope_head_dim") else self.new_head_dim
        return int(width * (factor if isinstance(factor, (int, float)) else 1.0))


def kept_layers(config: PreTrainedConfig, num_layers: int) -> tuple[int, ...]:
    """Return the layers that stay: the shortest beginning that has every kind of layer; where none of at most
    MOST_LAYERS has, the first layers of each kind. Where the last layers share keys and values, two periods stay."""
    fields = {name: value for name, value in config.to_dict().items() if not isinstance(value, (bool, str))}
    kinds = [_kind_of(i, fields, num_layers) for i in range(num_layers)]
    shared = [value for name, value in fields.items() if _SHARED_LAYERS.search(name) and value]
    if shared:
        period = len(set(kinds[: num_layers - shared[0]])) and _period(fields, num_layers)
        return (*range(period), *range(num_layers - period, num_layers))
    longest = max((v for n, v in fields.items() if _PERIODS.search(n) and isinstance(v, int) and v <= 8), default=1)
    least = max(NUM_LAYERS, longest)
    end = max((kinds.index(kind) + 1 for kind in kinds), default=1)
    if end <= MOST_LAYERS:
        return tuple(range(min(max(end, least), max(num_layers, NUM_LAYERS))))
    firsts = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
    others = [i for i in range(num_layers) if i not in firsts]
    return tuple(sorted([*firsts, *others[: max(0, least - len(firsts))]]))


def _kind_of(layer: int, fields: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    """Return what the configuration says about one layer."""
    said = []
    for name, value in fields.items():
        if _is_layer_set(value, num_layers):
            said.append(f"{name} {layer in value}")
        elif _is_per_layer(value, num_layers):
            said.append(f"{name} {value[layer]}")
        elif _FIRST_LAYERS.search(name) and isinstance(value, int):
            said.append(f"{name} {layer < value}")
    return tuple(said)


def _period(fields: Mapping[str, Any], num_layers: int) -> int:
    types = fields.get("layer_types") or [""] * num_layers
    return next(p for p in range(1, num_layers + 1) if all(types[i] == types[i % p] for i in range(num_layers)))


def _is_per_layer(value: Any, num_layers: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == num_layers > 1


def _is_layer_set(value: Any, num_layers: int) -> bool:
    """Return whether a list holds indices of layers."""
    if not isinstance(value, (list, tuple)) or not value or not all(type(item) is int for item in value):
        return False
    return list(value) == sorted(set(value)) and value[-1] < num_layers


def _new_value(name: str, value: Any, facts: _Facts, vocab_size: int) -> Any:
    if name in (_LAYERS, _OTHER_LAYERS):
        return len(facts.kept)
    if "rope" in name and isinstance(value, dict):
        return _rope(value, facts)
    if _TOKEN_IDS.search(name):
        return _token_ids(name, value, vocab_size)
    if _is_layer_set(value, facts.num_layers):
        return [new for new, old in enumerate(facts.kept) if old in value]
    if _is_per_layer(value, facts.num_layers):
        kept = [value[i] if i < facts.num_layers else value[-1] for i in facts.kept]
        return [item if isinstance(item, (str, bool)) else _number(name, item, facts, vocab_size) for item in kept]
    return _number(name, value, facts, vocab_size)


def _number(name: str, value: Any, facts: _Facts, vocab_size: int) -> Any:
    """Return the small value of a field that holds one number."""
    if type(value) is not int:
        return value
    if "vocab_size" in name:
        return vocab_size
    for pattern, rule in _RULES:
        if pattern.search(name):
            return rule(name, value, facts)
    return value


def _feed_forward(name: str, value: int, facts: _Facts) -> int:
    """Four times the hidden size, which some take for granted, stays that; other widths all differ."""
    if value <= 1:
        return value
    if value == 4 * facts.hidden_size:
        return 4 * HIDDEN_SIZE
    if "shared" in name:
        return 48
    if "moe" in name or "expert" in name:
        return 32
    return 96 if name == "intermediate_size" else 80


def _kv_heads(name: str, value: int, facts: _Facts) -> int:
    """One, some, or as many as there are queries; heads of a latent cache have keys of their own."""
    if _field(facts.config, "kv_lora_rank") or value == facts.num_heads:
        return NUM_HEADS
    return 1 if value == 1 else NUM_HEADS // 2


def _heads(name: str, value: int, facts: _Facts) -> int:
    """Layers with more or fewer heads than usual keep having more or fewer."""
    return NUM_HEADS + (NUM_HEADS // 2) * ((value > facts.num_heads) - (value < facts.num_heads))


def _state_heads(name: str, value: int, facts: _Facts) -> int:
    """Heads of a recurrent state, which together are ``expand`` times as wide as the model (Mamba 2, 2024)."""
    expand = _field(facts.config, "expand")
    return expand * HIDDEN_SIZE // facts.new_head_dim if expand else value


def _scaled(name: str, value: int, facts: _Facts) -> int:
    """A size without a rule of its own keeps its ratio to the hidden size."""
    if value <= HIDDEN_SIZE // 2:
        return value
    return max(8, round(value * HIDDEN_SIZE / facts.hidden_size / 8) * 8)


def _first_layers(name: str, value: int, facts: _Facts) -> int:
    return sum(i < value for i in facts.kept)


Rule = Callable[[str, int, _Facts], int]
_RULES: tuple[tuple[re.Pattern[str], Rule], ...] = (
    (_FIRST_LAYERS, _first_layers),
    (_SHARED_LAYERS, lambda name, value, facts: len(facts.kept) // 2 if value else 0),
    (re.compile(r"^max_window_layers$"), lambda name, value, facts: min(value, len(facts.kept) // 2)),
    (re.compile(rf"^{_HIDDEN}$"), lambda name, value, facts: HIDDEN_SIZE),
    (re.compile(rf"^(swa_)?{_HEADS}(_per_layer)?$"), _heads),
    (_KV_HEADS, _kv_heads),
    (re.compile(r"^num_heads$"), _state_heads),
    (
        re.compile(rf"^(swa_)?({'|'.join(_LATENT)})$"),
        lambda name, value, facts: _LATENT[name.removeprefix("swa_")] if value else value,
    ),
    (
        re.compile(r"^(global_|swa_)?head_dim$"),
        lambda name, value, facts: (
            _LATENT["qk_rope_head_dim"] if _field(facts.config, "kv_lora_rank") else facts.new_head_dim
        ),
    ),
    (
        re.compile(r"^(rotary_dim|rotary_ndims)$"),
        lambda name, value, facts: max(2, value * facts.new_head_dim // facts.head_dim // 2 * 2),
    ),
    (_SHARED_EXPERTS, lambda name, value, facts: min(value, 2)),
    (re.compile(r"^zero_expert_num$"), lambda name, value, facts: min(value, NUM_EXPERTS // 2)),
    (_TOP_K, lambda name, value, facts: min(value, TOP_K)),
    (_EXPERTS, lambda name, value, facts: NUM_EXPERTS if value > 1 else value),
    (re.compile(r"^(n_group|num_expert_group|moe_n_group)$"), lambda name, value, facts: min(value, 2)),
    (re.compile(r"^(topk_group|moe_topk_group)$"), lambda name, value, facts: min(value, 1)),
    (_WINDOWS, lambda name, value, facts: min(value, WINDOW) if value > 0 else value),
    (re.compile(r"^original_max_position_embeddings$"), lambda name, value, facts: _trained_length(facts, value)),
    (_POSITIONS, lambda name, value, facts: CONTEXT_LENGTH),
    (re.compile(r"^word_embed_proj_dim$"), lambda name, value, facts: 64 if value == facts.hidden_size else 40),
    (re.compile(r"_per_layer_input$"), lambda name, value, facts: min(value, HEAD_DIM)),
    (_FEED_FORWARD, _feed_forward),
    (_OTHER_SIZES, _scaled),
)


def _missing(facts: _Facts) -> dict[str, Any]:
    """Return values of fields that have none, although the model cannot do without."""
    names, found = facts.config.to_dict(), {}
    for name in names:
        if names[name] is None and _TOP_K.search(facts.common_name(name)):
            found[name] = TOP_K
        if names[name] is None and _KV_HEADS.search(facts.common_name(name)):
            found[name] = NUM_HEADS
        if facts.common_name(name) in _END_IDS:
            found[name] = _END_IDS[facts.common_name(name)]
    return found


def _token_ids(name: str, value: Any, vocab_size: int) -> Any:
    """Return ids within the small vocabulary."""
    if name in _END_IDS:
        return _END_IDS[name]
    if isinstance(value, (list, tuple)):
        return [min(item, vocab_size - 1) for item in value]
    return min(value, vocab_size - 1) if isinstance(value, int) else value


def _rope(value: Mapping[str, Any], facts: _Facts) -> dict[str, Any]:
    """Return a rotary embedding of the same kind for a small head and context; nested ones are of kinds of layers."""
    new = dict(value)
    for name, item in value.items():
        if isinstance(item, Mapping):
            new[name] = _rope(item, facts)
        elif name == "original_max_position_embeddings":
            new[name] = _trained_length(facts, item, value.get("factor"))
        elif name in ("short_factor", "long_factor"):
            new[name] = _resampled(item, facts.rotated_dim // 2)
        elif name == "mrope_section":
            new[name] = _sections(item, facts.rotated_dim // 2)
    return new


def _trained_length(facts: _Facts, usual: int, factor: float | None = None) -> int:
    """Return the context before it was stretched: as far as the factor says, else as far as usual."""
    length = _field(facts.config, "max_position_embeddings")
    return max(16, int(CONTEXT_LENGTH / (factor or max(1.0, length / usual if length else 1.0))))


def _resampled(values: Sequence[float], length: int) -> list[float]:
    return [values[i * len(values) // length] for i in range(length)]


def _sections(values: Sequence[int], total: int) -> list[int]:
    """Return as many sections, in about the same ratio, which fill ``total`` pairs of dimensions."""
    sections = [max(1, value * total // sum(values)) for value in values]
    sections[0] += total - sum(sections)
    return sections


def _field(config: PreTrainedConfig, name: str) -> Any:
    """Return a field by its common name; None if there is none. Some attributes cannot be read of all layers at once,
    but their fields can."""
    return config.to_dict().get(config.attribute_map.get(name, name))


def _own_names(config: PreTrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {config.attribute_map.get(name, name): value for name, value in fields.items()}
