"""Whether a difference shows only where several tokens or images are computed together."""

import torch

from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.multimodal.media_store import open_content
from rtp_llm.tools.verify.boundary_states import StateLog
from rtp_llm.tools.verify.locate import MODULE_TOLERANCE, relative_error
from rtp_llm.tools.verify.prompts import Prompt
from rtp_llm.tools.verify.recording import agrees, record
from rtp_llm.tools.verify.sides import OurModel, TheirModel


def explain_images(
    dtype: str, ours: OurModel, theirs: TheirModel, prompt: Prompt, cut_len: int, logits_tolerance: float
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
    dtype: str, ours: OurModel, theirs: TheirModel, prompt: Prompt, cut_len: int, logits_tolerance: float
) -> str | None:
    """Return the cause, if ours is right, at all tokens, once it computes the prompt, with its text, at once."""
    if not ours.cut_of(prompt, cut_len) or not agrees(record(dtype, ours, theirs, prompt, 0), logits_tolerance):
        return None
    where = f"only where a prompt is computed in pieces, {cut_len} tokens and then the rest: at once, ours agrees. "
    return where + (state_of_pieces(ours, prompt, cut_len) or "Something depends on which tokens are computed together")


def state_of_pieces(ours: OurModel, prompt: Prompt, cut_len: int) -> str | None:
    """Return which of our states is another one after a prompt in pieces than after all of it at once, and whether the
    second piece begins with what the first has stored; None: all are the same."""
    end, logs = len(prompt.ids), [StateLog() for _ in range(3)]
    for log, cut, forgets in zip(logs, (0, cut_len, cut_len), (False, False, True), strict=True):
        ours.run(prompt, cut, 1, states=log, forgets=forgets)
    if any(end not in log.ours for log in logs):
        return None
    for whole, pieces, anew in zip(*(log.ours[end] for log in logs), strict=True):
        right, own, forgotten = (torch.atleast_2d(state.tensor).flatten(1) for state in (whole, pieces, anew))
        if relative_error(own, right) > MODULE_TOLERANCE["float32"]:
            named = f"The state {whole.name!r} of {whole.layer} is another one after the {end} tokens in pieces: "
            if torch.equal(own, forgotten):
                return f"{named}it is not loaded. Set to zero between the pieces, it ends as the same"
            return f"{named}it is loaded, so what the first piece stores is wrong, or what is made of it"
    return None
