"""Prompts with images for any model that sees, and what transformers makes of them: importable by its own process."""

from dataclasses import dataclass

import torch
from PIL import Image

from rtp_llm.srt.checkpoint import prompts_with_images, read_model_config, read_tokenizer
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.request_spec import PromptMedia
from rtp_llm.tools.reference import Answer, TransformersModel, drawn_image, top_logprobs
from rtp_llm.tools.verify.feed import extras_for
from rtp_llm.tools.verify.prompts import image_prompt

QUESTIONS = ("Describe this image.", "What is the difference?")  # about one image, about two


@dataclass(frozen=True)
class ImagePrompt:
    """``text`` has placeholders; ``ids`` and ``media`` are what our processor makes of it and the images."""

    text: str
    images: list[Image.Image]
    ids: list[int]
    media: PromptMedia


def image_prompts(args: ServerArgs) -> list[ImagePrompt]:
    config = read_model_config(args)
    tokenizer = read_tokenizer(args, config)
    found = []
    for count, question in enumerate(QUESTIONS, start=1):
        images = [drawn_image(), drawn_image().rotate(90, expand=True)][:count]
        text = image_prompt(args, config, tokenizer, question, count)
        (prompt,) = prompts_with_images(args, config, tokenizer, [text], images)
        found.append(ImagePrompt(text, images, prompt.input_ids, prompt.media))
    return found


def their_image_answers(
    model_dir: str, prompts: list[ImagePrompt], max_new_tokens: int, top_num: int, dtype: str, trust_remote_code: bool
) -> list[Answer]:
    """By transformers, from the same pixels."""
    model = TransformersModel(model_dir, dtype, trust_remote_code=trust_remote_code)
    found = []
    for prompt in prompts:
        extras = extras_for(model.model, prompt.ids, MultimodalInputs.decode(prompt.media.content))
        output_ids, logits = model.generate(prompt.ids, max_new_tokens, extras)
        text = model.tokenizer.decode(output_ids, skip_special_tokens=True)
        prefill = top_logprobs(model.prompt_logits(prompt.ids, extras), top_num)
        found.append(Answer(prompt.ids, output_ids, text, prefill, top_logprobs(logits, top_num)))
    return found


def their_prompt_logprobs(model_dir: str, prompts: list[ImagePrompt], dtype: str) -> torch.Tensor:
    """Log-probabilities of the prompts' tokens except the first, one prompt after the other."""
    model = TransformersModel(model_dir, dtype, "cpu")
    found = []
    for prompt in prompts:
        extras = extras_for(model.model, prompt.ids, MultimodalInputs.decode(prompt.media.content))
        logprobs = model.prompt_logits(prompt.ids, extras).float().log_softmax(-1)
        found.append(logprobs[:-1].gather(1, torch.tensor(prompt.ids[1:])[:, None])[:, 0])
    return torch.cat(found)
