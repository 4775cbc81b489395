"""What our processor makes of images, beside what transformers' own makes of them.

Both models are given our pixels, so a mistake of the processor is not seen in logits: it is looked for here.
"""

from typing import Any

import torch
from PIL import Image

from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.multimodal.media_store import open_content
from rtp_llm.tools.reference import NoProcessorError, load_processor
from rtp_llm.tools.verify.feed import extras_for
from rtp_llm.tools.verify.order_causes import explain_order
from rtp_llm.tools.verify.prompts import Prompt

CLOSE = 0.05  # of the values' spread: ways to resize differ by less


def pixels_note(
    model_path: str, trust_remote_code: bool, their_model: Any, text: str, images: list[Image.Image], prompt: Prompt
) -> str:
    """Return how our processor's output for a prompt compares with that of transformers' processor.

    Args:
        text: the prompt with placeholders, before any processor.
        prompt: what ours made of it.
    """
    try:
        processor = load_processor(model_path, trust_remote_code)
        inputs = processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
    except NoProcessorError:
        return (
            "Both models got our processor's pixels. There are no others to compare them with, since the checkpoint "
            "has no processor of transformers, only a tokenizer: a wrong scale or order of pixels goes unseen."
        )
    except Exception as error:  # of any kind: packages are missing, or it wants other arguments
        return (
            "Both models got our processor's pixels. They were not compared with those of transformers' own processor, "
            f"which fails on this checkpoint ({_first_words(f'{type(error).__name__}: {error}')}). That says nothing "
            "about the model file."
        )
    assert prompt.media is not None
    media = MultimodalInputs.decode(open_content(prompt.media.content))
    ours = extras_for(their_model, prompt.ids, media)
    found = [
        text
        for name, value in ours.items()
        if isinstance(value, torch.Tensor) and name in inputs and (text := _difference(name, value, inputs[name]))
    ]
    if inputs["input_ids"][0].tolist() != prompt.ids:
        found.append(f"{len(prompt.ids)} ids, of transformers' processor {len(inputs['input_ids'][0])}, or other ones")
    if not found:
        return "Our processor's pixels and ids are those of transformers' processor."
    return (
        f"Both models got our processor's pixels, but transformers' own processor makes others: {'; '.join(found)}. "
        "See the processor in the model file."
    )


def _first_words(text: str, num: int = 160) -> str:
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= num else f"{line[:num]} ..."


def _difference(name: str, ours: torch.Tensor, theirs: Any) -> str:
    """Return how ours differs; empty: it does not, but for the rounding of resizing."""
    if not isinstance(theirs, torch.Tensor):
        return ""
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    if ours.numel() != theirs.numel():
        return f"{name} has the shape {list(ours.shape)}, not {list(theirs.shape)}"
    ours, theirs = ours.reshape(theirs.shape), theirs
    spread = float(theirs.std()) if theirs.numel() > 1 else 0.0
    if float((ours - theirs).abs().mean()) <= CLOSE * max(spread, 1e-6):
        return ""
    rows = (ours.flatten(0, -2), theirs.flatten(0, -2)) if theirs.dim() > 1 else (ours[:, None], theirs[:, None])
    order = explain_order(*rows, 1e-3)
    if order:
        return f"{name}: {order}"
    x, y = theirs.flatten().double(), ours.flatten().double()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum().clamp(min=1e-30))
    offset = float(y.mean() - slope * x.mean())
    if float((y - slope * x - offset).abs().mean()) <= CLOSE * float(y.std()):
        return f"{name} is {slope:.4g} times that of transformers {offset:+.4g}: another mean or deviation"
    return f"{name} differs by {float((ours - theirs).abs().mean()) / max(spread, 1e-6):.2g} of its spread"
