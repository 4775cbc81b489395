"""Whether a difference shows only where several tokens or images are computed together."""

from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.multimodal.media_store import open_content
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
    return (
        f"only where a prompt is computed in pieces, {cut_len} tokens and then the rest: at once, ours agrees. "
        "Something depends on which tokens are computed together"
    )
