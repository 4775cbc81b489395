"""The prompts of both sides."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from rtp_llm.srt.checkpoint import prompts_with_images, read_processor
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.srt.models.registry import ModelRegistry, UnknownArchitectureError
from rtp_llm.srt.request_spec import PromptMedia
from rtp_llm.tools.reference import IMAGE_PROMPTS, chat_text, encode, read_images, read_prompts
from rtp_llm.tools.verify.options import MIN_LONG_LEN, VerifyError, VerifyOptions

RANDOM_LENS = (5, 9, 12)  # of prompts without a tokenizer
Cuts = int | tuple[int, ...]  # after how many tokens a prompt is cut, once or more often; 0: never


def cuts_of(cut_len: Cuts) -> tuple[int, ...]:
    """Return the ends of all pieces but the last."""
    return cut_len if isinstance(cut_len, tuple) else (cut_len,) if cut_len else ()


@dataclass(frozen=True)
class Prompt:
    """A prompt. ``media`` belong to ids with placeholders; None: text only."""

    text: str
    ids: list[int]
    media: PromptMedia | None = field(default=None, repr=False)


def read_or_default_prompts(config: ModelConfig, tokenizer: Any, options: VerifyOptions) -> Iterator[Prompt]:
    """Yield the prompts of the file or the default ones, then the long one."""
    room = config.context_length - options.max_new_tokens
    if tokenizer is None:
        if options.prompt_filename:
            raise VerifyError(f"{config.model_path} has no tokenizer, so it cannot read --prompt-filename")
        draw = random.Random(0)
        ids = [draw.randrange(config.vocab_size) for _ in range(max(room, 1))]
        prompts = [Prompt(f"{num} random ids", ids[:num]) for num in RANDOM_LENS]
    else:
        prompts = [Prompt(text, encode(tokenizer, text)) for text in read_prompts(options.prompt_filename)]
        ids = encode(tokenizer, " ".join(prompt.text for prompt in prompts))
    for prompt in prompts:
        _check_len(prompt, room, options)
        yield prompt
    long_len = min(_long_len(config) if options.long_len is None else options.long_len, room)
    if long_len > max(len(prompt.ids) for prompt in prompts):
        yield Prompt(f"({long_len} tokens)", (ids * (long_len // len(ids) + 1))[:long_len])


def image_prompts(args: ServerArgs, config: ModelConfig, tokenizer: Any, options: VerifyOptions) -> list[Prompt]:
    """Return a multimodal model's prompts: those of the file, or the default, after the images of ``--image``;
    without such, after a drawn one, and the first also after two of different shapes, if the context has room."""
    if tokenizer is None or not config.is_multimodal or not _has_own_processor(config):
        if options.image:
            reason = "has no tokenizer" if tokenizer is None else f"({', '.join(config.architectures)}) takes no images"
            raise VerifyError(f"{config.model_path} {reason}: --image means nothing here")
        return []
    texts, images = read_prompts(options.prompt_filename, IMAGE_PROMPTS), read_images(options.image or ())
    prompts = _with_images(args, config, tokenizer, texts, images)
    room = config.context_length - options.max_new_tokens
    for prompt in prompts:
        _check_len(prompt, room, options)
    if options.image:
        return prompts
    two = _with_images(args, config, tokenizer, texts[:1], [*images, images[0].rotate(90, expand=True)])
    return [*(prompt for prompt in two if len(prompt.ids) <= room), *prompts]


def _with_images(
    args: ServerArgs, config: ModelConfig, tokenizer: Any, texts: list[str], images: list[Image.Image]
) -> list[Prompt]:
    chats = [image_prompt(args, config, tokenizer, text, len(images)) for text in texts]
    found = prompts_with_images(args, config, tokenizer, chats, images)
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    return [Prompt(f"({count}) {text}", p.input_ids, p.media) for text, p in zip(texts, found, strict=True)]


def _check_len(prompt: Prompt, room: int, options: VerifyOptions) -> None:
    if not options.cut_len < len(prompt.ids) <= room:
        raise VerifyError(
            f"the prompt {prompt.text!r} has {len(prompt.ids)} tokens: it must be more than --cut-len "
            f"({options.cut_len}) and at most {room}, which leaves {options.max_new_tokens} of the context"
        )


def _has_own_processor(config: ModelConfig) -> bool:
    """Return whether a model file of ours runs the model, and takes media. Raise ModelImportError."""
    try:
        model_cls, _ = ModelRegistry.resolve_model_cls(config.architectures)
    except UnknownArchitectureError:
        return False
    return ModelTraits.of(model_cls).pad_input_ids is not None


def image_prompt(args: ServerArgs, config: ModelConfig, tokenizer: Any, text: str, num_images: int) -> str:
    """Return the prompt in the model's chat template; without one, placeholders before the text, a line each."""
    try:
        return chat_text(config.model_path, tokenizer, text, num_images)
    except ValueError:
        token = read_processor(args, config, tokenizer, trusted=True).mm_tokens.image_token
        return f"{token}\n" * num_images + text


def _long_len(config: ModelConfig) -> int:
    window = getattr(config.hf_text_config, "sliding_window", None)
    return max(MIN_LONG_LEN, 0 if window is None else window + window // 8 + 16)
