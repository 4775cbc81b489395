"""Answers of transformers, and the rules for comparing ours with them. Does not import the engine.

Both sides of a comparison keep these rules:

- Prompts are ``PROMPTS`` or the lines of a file, encoded by the tokenizer.
- With images, ``IMAGE_PROMPTS`` or the lines of a file: each is a user's message, images first, in the model's
  chat template. The images are files, or the one drawn here.
- The dtype is ``ModelConfig.dtype``: that of ``--dtype``; ``auto`` is the checkpoint's own, as in the server.
- Text is greedy and has exactly the requested length: an end-of-sequence token is a token like any other. Settings of
  the checkpoint's generation_config.json (penalties, forced tokens) do not apply.
- Logits are shown in float32, after all of the model's own scaling.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.device.choice import choose_torch_device
from rtp_llm.tools.auto_classes import load_by_transformers, takes_images

PROMPTS = (
    "The capital of France is",
    "The capital of the United Kingdom is",
    "Today is a sunny day and I like",
)
IMAGE_PROMPTS = ("Describe this image.",)
MAX_NEW_TOKENS = 16
Extras = dict[str, Any]  # further arguments of a transformers model's forward
_AT_ONCE = 1024  # positions of a prompt whose log-probabilities are in memory at once


def read_prompts(filename: str | None, default: Sequence[str] = PROMPTS) -> list[str]:
    """Return the lines of a file that are not blank; the default if no file is named.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no prompt.
    """
    if not filename:
        return list(default)
    prompts = [line for line in Path(filename).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{filename} has no prompts; write one per line")
    return prompts


def read_images(filenames: Sequence[str]) -> list[Image.Image]:
    """Return images as RGB, upright; the drawn one if no file is named.

    Raises:
        OSError, ValueError: a file cannot be read, or holds no image.
    """
    return [_read_image(filename) for filename in filenames] or [drawn_image()]


def _read_image(filename: str) -> Image.Image:
    try:
        with Image.open(filename) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{filename} holds no image of a kind that Pillow reads") from None


def drawn_image() -> Image.Image:
    """Return a red circle, a blue square and a green triangle on white, 224 x 168 pixels, always the same."""
    image = Image.new("RGB", (224, 168), "white")
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((16, 16, 95, 95), fill=(214, 39, 40))
    canvas.rectangle((128, 24, 199, 95), fill=(31, 80, 200))
    canvas.polygon([(112, 104), (160, 156), (64, 156)], fill=(44, 140, 44))
    return image


def chat_text(model_path: str, tokenizer: Any, prompt: str, num_images: int) -> str:
    """Return a user's message with so many images before its text, in the model's template, ready for the answer.

    Raises:
        ValueError: the checkpoint has no chat template.
    """
    content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": prompt}]
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=_chat_template(Path(model_path), tokenizer),
        add_generation_prompt=True,
        tokenize=False,
    )


def _chat_template(model_path: Path, tokenizer: Any) -> str:
    """Return the tokenizer's chat template, or that of a file which older processors read."""
    if tokenizer.chat_template is not None:
        return tokenizer.get_chat_template()
    path = model_path / "chat_template.json"
    if not path.exists():
        raise ValueError(
            f"{model_path} has no chat template, which prompts with images need; --model-type text needs none"
        )
    return json.loads(path.read_text(encoding="utf-8"))["chat_template"]


class NoProcessorError(ValueError):
    """A checkpoint has no processor of transformers."""


def load_processor(model_path: str, trust_remote_code: bool = False) -> Any:
    """Return transformers' processor for a model's texts and images; without its part for videos if torchvision,
    which that needs, is missing.

    Raises:
        NoProcessorError: the checkpoint has none, only a tokenizer.
        ValueError, OSError: its files are missing.
        ImportError: a package for its images is not installed.
    """
    processor = _load_processor(model_path, trust_remote_code)
    if isinstance(processor, PreTrainedTokenizerBase):  # which takes images, and leaves them out
        raise NoProcessorError(
            f"{model_path} has no processor of transformers for images, only a tokenizer. For a model whose processor "
            "is its own, `rtp-llm verify` gives transformers the pixels that this one makes"
        )
    return processor


def _load_processor(model_path: str, trust_remote_code: bool) -> Any:
    try:
        return AutoProcessor.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except ImportError:
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        if type(config) not in PROCESSOR_MAPPING:
            raise
        return _without_videos(PROCESSOR_MAPPING[type(config)]).from_pretrained(model_path)


def _without_videos(processor_class: Any) -> Any:
    """Return a processor's class without the part for videos. It keeps its name, which transformers reads."""

    def get_attributes(cls: type) -> list[str]:
        return [name for name in processor_class.get_attributes() if name != "video_processor"]

    return type(processor_class.__name__, (processor_class,), {"get_attributes": classmethod(get_attributes)})


def encode(tokenizer: Any, prompt: str) -> list[int]:
    return tokenizer(prompt).input_ids


def whole_text(tokenizer: Any, prompt_ids: list[int], output_ids: list[int]) -> str:
    """Return prompt and completion as one text, special tokens shown."""
    return tokenizer.decode([*prompt_ids, *output_ids])


def logits_text(logits: torch.Tensor) -> str:
    """Return three values at each end of a row, in one notation."""
    torch.set_printoptions(threshold=0, edgeitems=3, sci_mode=False)
    try:
        return str(logits)
    finally:
        torch.set_printoptions(profile="default")


# Best two logits that are nearer than this part of a row's spread may change places by rounding.
_NEAR = {torch.bfloat16: 0.1, torch.float16: 0.03}


def near_ties(logits: torch.Tensor, dtype: torch.dtype) -> list[tuple[int, float]]:
    """Return (row, distance of the two best) where rounding in ``dtype`` may choose the other one.

    Args:
        logits: [tokens, vocab_size], of the chosen tokens.
    """
    best = logits.float().topk(2).values
    gaps, spread = best[:, 0] - best[:, 1], logits.float().std(dim=-1)
    near = (gaps < _NEAR.get(dtype, 0.0) * spread).nonzero()[:, 0].tolist()
    return [(row, float(gaps[row])) for row in near]


def ties_text(ties: Sequence[Sequence[tuple[int, float]]], dtype: torch.dtype) -> str:
    """Return what is to be known about texts in 16 bits, from each prompt's ``near_ties``; empty: nothing."""
    name = str(dtype).removeprefix("torch.")
    first = [
        f"prompt {i}, token {found[0][0]} (two tokens {found[0][1]:.2g} apart)" for i, found in enumerate(ties) if found
    ]
    if not first:
        return ""
    return (
        f"In {name}, rounding may decide near ties, and texts may part from there on: {'; '.join(first)}. If they do, "
        "compare both commands with --dtype float32, where texts must be equal."
    )


class HalfLoadedError(ValueError):
    """Checkpoint and transformers' class do not have the same tensors, so what it computes is no reference."""


_UNLIKE = {  # what transformers reports after loading -> what it means
    "missing_keys": "not in the checkpoint, so transformers initialised them at random",
    "mismatched_keys": "of another shape in the checkpoint, so transformers initialised them at random",
    "unexpected_keys": "in the checkpoint, but without a place in transformers' class, which left them out",
    "error_msgs": "that transformers could not convert",
}
_MAX_NAMED = 8


def _refuse_half_loaded(model: Any, model_path: str, loading: dict[str, Any]) -> None:
    """Raise HalfLoadedError, with the names, if transformers reports tensors that it did not load."""
    lines = [_named(keys, meaning) for kind, meaning in _UNLIKE.items() if (keys := loading.get(kind))]
    if lines:
        raise HalfLoadedError(
            f"{type(model).__name__} of transformers is no reference for {model_path}, since their tensors differ; "
            f"correct the checkpoint, its config.json or that class. {'; '.join(lines)}"
        )


def _named(keys: Any, meaning: str) -> str:
    names = sorted(key if isinstance(key, str) else " ".join(map(str, key)) for key in keys)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(names[:_MAX_NAMED])}{more}: {meaning}"


@dataclass(frozen=True)
class Answer:
    """A greedy completion, with the best log-probabilities at each position, best first.

    ``prefill_top[i]``: for the token after prompt token i; ``decode_top[i]``: for output token i.
    """

    prompt_ids: list[int]
    output_ids: list[int]
    text: str  # of the output alone, without special tokens
    prefill_top: list[list[float]]
    decode_top: list[list[float]]


class TransformersModel:
    """A model run by transformers, one prompt at a time.

    Prompts are ids. Those with images come from ``encode_chat``, with further arguments of the model's forward
    (``extras``): pixels, and the images' positions.

    Raises:
        ValueError, OSError: what is wrong with the checkpoint.
        RuntimeError: the device is not there.
    """

    def __init__(
        self, model_path: str, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
    ) -> None:
        config = ModelConfig.from_pretrained(model_path, dtype=dtype, trust_remote_code=trust_remote_code)
        self.device = choose_torch_device(device)
        self.model_path = config.model_path
        self.context_length = config.context_length
        self._load_tokenizer = partial(
            AutoTokenizer.from_pretrained, config.model_path, trust_remote_code=trust_remote_code
        )
        self._load_processor = partial(load_processor, config.model_path, trust_remote_code)
        model, loading = load_by_transformers(
            config.model_path,
            config.hf_config,
            trust_remote_code,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
        )
        _refuse_half_loaded(model, config.model_path, loading)
        self.model = model.to(self.device).eval()
        self.model.generation_config = GenerationConfig()

    @property
    def takes_images(self) -> bool:
        return takes_images(self.model)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use: logits of ids need none."""
        return self._load_tokenizer()

    @cached_property
    def processor(self) -> Any:
        return self._load_processor()

    def encode_chat(self, prompt: str, images: Sequence[Image.Image]) -> tuple[list[int], Extras]:
        """Return the ids of a user's message with images, and their extras."""
        text = chat_text(self.model_path, self.tokenizer, prompt, len(images))
        return self.encode_with_images(text, images)

    def encode_with_images(self, text: str, images: Sequence[Image.Image]) -> tuple[list[int], Extras]:
        """Do the same as ``encode_chat`` for a text with the template's placeholders and special tokens.

        Raises:
            NoProcessorError: the checkpoint has only a tokenizer.
        """
        inputs = self.processor(
            text=[text], images=list(images) or None, add_special_tokens=False, return_tensors="pt"
        ).to(self.device)
        extras = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        for name, value in extras.items():
            if torch.is_tensor(value) and value.is_floating_point():
                extras[name] = value.to(self.model.dtype)
        return inputs["input_ids"][0].tolist(), extras

    @torch.inference_mode()
    def prompt_logits(self, prompt_ids: list[int], extras: Extras | None = None) -> torch.Tensor:
        """Return the logits [len(prompt_ids), vocab_size] in the model's dtype."""
        return self.model(torch.tensor([prompt_ids], device=self.device), **(extras or {})).logits[0]

    @torch.inference_mode()
    def generate(
        self, prompt_ids: list[int], max_new_tokens: int, extras: Extras | None = None
    ) -> tuple[list[int], torch.Tensor]:
        """Return ``max_new_tokens`` greedy ids, and their logits [max_new_tokens, vocab_size] float32."""
        ids = torch.tensor([prompt_ids], device=self.device)
        generated = self.model.generate(
            ids,
            **(extras or {}),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(generated.logits).float()
        return generated.sequences[0, len(prompt_ids) :].tolist(), logits

    def answer(self, prompt: str, max_new_tokens: int, top_num: int, max_prompt_len: int) -> Answer:
        """Continue the last ``max_prompt_len`` tokens of a prompt."""
        prompt_ids = encode(self.tokenizer, prompt)[-max_prompt_len:]
        output_ids, logits = self.generate(prompt_ids, max_new_tokens)
        return Answer(
            prompt_ids,
            output_ids,
            self.tokenizer.decode(output_ids, skip_special_tokens=True),
            top_logprobs(self.prompt_logits(prompt_ids), top_num),
            top_logprobs(logits, top_num),
        )


def answers(
    model_path: str,
    prompts: list[str],
    max_new_tokens: int,
    top_num: int,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> list[Answer]:
    """Load a model and return its answers. Prompts too long for its context lose their beginning.

    Call it in a process of its own if the memory is needed afterwards.
    """
    model = TransformersModel(model_path, dtype, device, trust_remote_code)
    room = model.context_length - max_new_tokens
    return [model.answer(prompt, max_new_tokens, top_num, room) for prompt in prompts]


def top_logprobs(logits: torch.Tensor, top_num: int) -> list[list[float]]:
    """Return the best log-probabilities of each row of logits [rows, vocab_size]."""
    rows: list[list[float]] = []
    for part in logits.split(_AT_ONCE):
        rows += part.float().log_softmax(-1).topk(min(top_num, part.shape[-1])).values.tolist()
    return rows
