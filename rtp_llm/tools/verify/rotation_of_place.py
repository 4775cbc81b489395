"""A rotation of queries or keys in our model file: the embedding that made it, and what it was given."""

from typing import NamedTuple

from rtp_llm.srt.layers.rotary import RotaryEmbedding
from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.locate import layer_of
from rtp_llm.tools.verify.measured_rotation import measure
from rtp_llm.tools.verify.own_rotation import head_dim_at, positions_of
from rtp_llm.tools.verify.rope_causes import Rotated, RotationTrials
from rtp_llm.tools.verify.trace import QUERIES, UNROTATED, Place


class RotationOfPlace(NamedTuple):
    """Our rotary embedding at an attention block, and what it is given and makes; see RotationTrials."""

    name: str
    rope: RotaryEmbedding
    rotated: Rotated

    @classmethod
    def of(cls, evidence: Evidence, place: Place) -> "RotationOfPlace | None":
        """Return it of queries or keys; None: our model file does not rotate them."""
        name = evidence.ours.ropes.get(place.module)
        unrotated = evidence.ours.tensors.get(Place(place.module, UNROTATED[place.part]))
        rope = evidence.our_modules.get(name or "")
        if name is None or unrotated is None or not isinstance(rope, RotaryEmbedding):
            return None
        call = evidence.theirs.calls[place.module]
        heads = call.num_heads if place.part == QUERIES else call.num_kv_heads
        num_tokens = evidence.theirs.num_tokens
        rotated = Rotated(
            unrotated,
            num_tokens - len(unrotated),
            num_tokens,
            evidence.theirs.tensors[place].shape[-1] // heads,
            evidence.ours.positions,
            evidence.theirs.positions,
        )
        return cls(name, rope, rotated)

    def name_at(self, evidence: Evidence, place: Place) -> str:
        """Return the embedding's name in this attention block: layers with equal settings share one embedding, of which
        ``name`` is the first layer's. ``name``, if it is not the block's own."""
        around = evidence.our_modules.get(place.module)
        children = () if around is None else around.named_children()
        return next((f"{place.module}.{key}" for key, child in children if child is self.rope), self.name)

    def cause(self, evidence: Evidence, place: Place) -> str | None:
        trials = RotationTrials(evidence.config, self.rope, self.rotated)
        return trials.explain(*evidence.pair(place), evidence.tolerance)


def unrotated_here(evidence: Evidence, place: Place) -> str | None:
    """Return that the reference's queries or keys are ours, rotated; None: they are not, or that cannot be told."""
    positions = positions_of(evidence)
    if positions is None:
        return None
    ours, theirs = evidence.pair(place)
    found = measure(ours, theirs, head_dim_at(evidence, place), positions[-len(ours) :], evidence.tolerance)
    if found is None:
        return None
    return f"it does not rotate them, and the reference does ({found}){first_layer_text(evidence, place)}"


def first_layer_text(evidence: Evidence, place: Place) -> str:
    """Return that a place's layer is the first one with another rotation, and what the configuration has for it and not
    for the layers before; empty: it is the first layer."""
    number = layer_of(place.module).rpartition(".")[2]
    if not number.isdigit() or int(number) == 0:
        return ""
    layer = int(number)
    right = "layer 0 agrees" if layer == 1 else f"layers 0 to {layer - 1} agree"
    lists = {
        key: value
        for key, value in vars(evidence.config).items()
        if isinstance(value, (list, tuple)) and len(value) == getattr(evidence.config, "num_hidden_layers", 0)
    }
    texts = [
        f"; {key} of the configuration has {value[layer]} for layer {layer}, and for no layer before"
        for key, value in lists.items()
        if value[layer] not in value[:layer]
    ]
    return f"; layer {layer} is the first that differs, {right}{''.join(texts)}"
