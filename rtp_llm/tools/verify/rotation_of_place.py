"""A rotation of queries or keys in our model file: the embedding that made it, and what it was given."""

from typing import NamedTuple

from rtp_llm.srt.layers.rotary import RotaryEmbedding
from rtp_llm.tools.verify.evidence import Evidence
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

    def cause(self, evidence: Evidence, place: Place) -> str | None:
        trials = RotationTrials(evidence.config, self.rope, self.rotated)
        return trials.explain(*evidence.pair(place), evidence.tolerance)
