"""Whether a difference shows only where several tokens or images are computed together."""

from dataclasses import dataclass, replace

import torch

from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.multimodal.media_store import open_content
from rtp_llm.tools.verify.boundary_states import State, StateLog
from rtp_llm.tools.verify.locate import MODULE_TOLERANCE, relative_error
from rtp_llm.tools.verify.prompts import Cuts, Prompt, cuts_of
from rtp_llm.tools.verify.recording import agrees, record
from rtp_llm.tools.verify.sides import OurModel, TheirModel


def explain_images(
    dtype: str, ours: OurModel, theirs: TheirModel, prompt: Prompt, cut_len: Cuts, logits_tolerance: float
) -> str | None:
    """Return the cause, if ours is right once it encodes each of a prompt's images by itself; None: it is not, or there
    are not several."""
    if prompt.media is None or len(MultimodalInputs.decode(open_content(prompt.media.content)).mm_items) < 2:
        return None
    with ours.images_one_by_one():
        if not agrees(record(dtype, ours, theirs, prompt, cut_len), logits_tolerance):
            return None
    return (
        "only where several images are encoded together: one by one, ours agrees. Something before this place is "
        "computed over the rows of all images"
    )


def explain_pieces(
    dtype: str, ours: OurModel, theirs: TheirModel, prompt: Prompt, cut_len: Cuts, logits_tolerance: float
) -> str | None:
    """Return the cause, if ours is right, at all tokens, once it computes the prompt, with its text, at once."""
    if not ours.cut_of(prompt, cut_len) or not agrees(record(dtype, ours, theirs, prompt, 0), logits_tolerance):
        return None
    where = f"only where a prompt is computed in pieces, {_pieces_text(cuts_of(cut_len))}: at once, ours agrees. "
    fault = state_of_pieces(ours, prompt, cut_len)
    return where + (fault.text if fault else "Something depends on which tokens are computed together")


def _pieces_text(cuts: tuple[int, ...]) -> str:
    if len(cuts) == 1:
        return f"{cuts[0]} tokens and then the rest"
    return f"cut after {', '.join(map(str, cuts[:3]))}{', ...' if len(cuts) > 3 else ''} tokens"


@dataclass(frozen=True)
class StateFault:
    """A state of ours that is wrong after the first ``end`` tokens of a prompt in pieces. ``error``: relative."""

    state: State
    end: int
    error: float
    text: str


def state_of_pieces(ours: OurModel, prompt: Prompt, cut_len: Cuts) -> StateFault | None:
    """Return which of our states a piece of a prompt does not store, or which is another one than after all tokens so
    far at once, and what it is: stored early, that of another layer, or not loaded; None: all are the same."""
    if unstored := ours.unstored(prompt, cut_len):
        state, start, end = unstored
        step = f"tokens {start} to {end - 1} of a prompt" if end - start > 1 else "one token of each request, as decode"
        text = (
            f"The state {state.name!r} of {state.layer} is not stored by the step that computes {step}: its slot is "
            f"not written. The next step continues from what was there before"
        )
        return StateFault(state, end, 1.0, text)
    pieces, forgotten = StateLog(), StateLog()
    ours.run(prompt, cut_len, 1, states=pieces)
    ours.run(prompt, cut_len, 1, states=forgotten, forgets=True)
    states = _StatesAtOnce(ours, prompt)
    for end in sorted(pieces.ours):
        for own, anew, right in zip(pieces.ours[end], forgotten.ours[end], states.after(end), strict=False):
            error = _error(own, right)
            if error > MODULE_TOLERANCE["float32"]:
                named = f"The state {own.name!r} of {own.layer} is another one after {end} tokens in pieces: "
                text = named + _how_state_differs(states, own, anew, right, end, end in cuts_of(cut_len)[:1])
                return StateFault(own, end, error, text)
    return None


class _StatesAtOnce:
    """Our states after the first tokens of a prompt, computed at once."""

    def __init__(self, ours: OurModel, prompt: Prompt) -> None:
        self._ours, self._prompt = ours, prompt
        self._known: dict[int, list[State]] = {}

    def after(self, end: int) -> list[State]:
        """Return the states; none, if an image would be cut, or there are no such tokens."""
        blocks = [] if self._prompt.media is None else self._prompt.media.blocks
        if not 0 < end <= len(self._prompt.ids) or any(last >= end for _, last in blocks):
            return []
        if end not in self._known:
            log = StateLog()
            self._ours.run(replace(self._prompt, ids=self._prompt.ids[:end]), 0, 1, states=log)
            self._known[end] = log.ours.get(end, [])
        return self._known[end]


def _how_state_differs(
    states: _StatesAtOnce, own: State, forgotten: State, right: State, end: int, is_first: bool
) -> str:
    if not bool(own.tensor.any()) and bool(right.tensor.any()):
        return "it is zero, nothing is stored"
    for early in (1, 2, 3, -1):
        others = [s for s in states.after(end - early) if (s.layer, s.name) == (own.layer, own.name)]
        if others and not _differ(own, others[0]):
            when = f"{early} token{'s' if early > 1 else ''} early" if early > 0 else "a token late"
            return f"it is stored {when}: it is what it should be after {end - early}"
    same = (s for s in states.after(end) if s.layer != own.layer and not _differ(own, s))
    if other := next(same, None):
        return f"it is the state {other.name!r} of {other.layer}: stored in another layer's place (layer_id)"
    if not is_first and torch.equal(own.tensor, forgotten.tensor):
        return "it is not loaded. Set to zero between the pieces, it ends as the same"
    if is_first:
        return "what the first piece stores is wrong"
    return "it is loaded, so what an earlier piece stores is wrong, or what is made of it"


def _differ(one: State, other: State) -> bool:
    return _error(one, other) > MODULE_TOLERANCE["float32"]


def _error(one: State, other: State) -> float:
    own, right = (torch.atleast_2d(state.tensor).flatten(1) for state in (one, other))
    return relative_error(own, right) if own.shape == right.shape else torch.inf
