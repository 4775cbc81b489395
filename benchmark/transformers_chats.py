"""Answers to chats with pictures from transformers in this process: what a server's are compared with."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from PIL import Image, UnidentifiedImageError
from transformers import GenerationConfig

from benchmark.evaluation import Chat, EvaluationError, Reply
from benchmark.transformers_answers import Continuation, StopStrings, end_ids, load_model, read_config
from rtp_llm.srt.device.choice import choose_torch_device
from rtp_llm.srt.multimodal.media import decode_image
from rtp_llm.tools.auto_classes import takes_images
from rtp_llm.tools.reference import load_processor


class TransformersChats:
    """An Answerer (see benchmark/evaluation.py) for chats, as TransformersAnswers is for texts, one at a time.

    Raises:
        EvaluationError: the checkpoint cannot be loaded or takes no pictures, or the device is not there.
    """

    backend = "transformers"
    counting = "the model's processor"
    context_len = None  # nothing is left out beforehand, as the server leaves nothing out: what is too long fails

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            config = read_config(args)
            self._device = choose_torch_device(args.device)
            model = load_model(config, args.trust_remote_code)
            if not takes_images(model):
                raise EvaluationError(f"{args.model_path} ({', '.join(config.architectures)}) takes no pictures")
            self._processor = load_processor(config.model_path, args.trust_remote_code)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            raise EvaluationError(f"{args.model_path}: {error}") from error
        if self._template is None:
            raise EvaluationError(f"{args.model_path} has no chat template, so its server takes no chats either")
        self.model = args.model_path
        self._context_len = config.context_length
        self._eos_ids = end_ids(args.model_path, config, self._processor.tokenizer)
        self._penalty = float(config.generation_defaults.get("repetition_penalty", 1.0))
        self._model = model.to(self._device).eval()
        self._model.generation_config = GenerationConfig()

    @property
    def _template(self) -> str | None:
        return getattr(self._processor, "chat_template", None) or self._processor.tokenizer.chat_template

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        del self._model

    def count_tokens(self, prompts: Sequence[Chat]) -> list[int]:
        return [self._inputs(chat)["input_ids"].shape[1] for chat in prompts]

    def answer(
        self, prompts: Sequence[Chat], max_new_tokens: int, stop: tuple[str, ...], on_done: Callable[[], None]
    ) -> list[Reply]:
        replies = []
        for chat in prompts:
            replies.append(self._reply(chat, max_new_tokens, stop))
            on_done()
        return replies

    def _reply(self, chat: Chat, max_new_tokens: int, stop: tuple[str, ...]) -> Reply:
        try:
            inputs = self._inputs(chat)
        except (UnidentifiedImageError, OSError, ValueError) as error:
            return Reply(error=f"{type(error).__name__}: {error}")
        num_tokens = inputs["input_ids"].shape[1]
        if num_tokens + max_new_tokens > self._context_len:
            return Reply(
                error=f"{num_tokens} tokens of the prompt and {max_new_tokens} of the answer exceed the context length "
                f"of {self._context_len}"
            )
        return self._continue(inputs, max_new_tokens, stop)

    def _inputs(self, chat: Chat) -> Any:
        """What the model's forward takes: one row of ids, and the pixels in the model's dtype."""
        pictures = [_decoded(part) for part in chat.parts if isinstance(part, bytes)]
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in chat.parts
        ]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            add_generation_prompt=True,
            tokenize=False,
        )
        # The template has written the special tokens that there are to be.
        inputs = self._processor(text=[text], images=pictures or None, add_special_tokens=False, return_tensors="pt")
        return inputs.to(self._device, dtype=self._model.dtype)

    @torch.inference_mode()
    def _continue(self, inputs: Any, max_new_tokens: int, stop: tuple[str, ...]) -> Reply:
        prompt_ids = inputs["input_ids"][0].tolist()
        text = Continuation(self._processor.tokenizer, prompt_ids, self._eos_ids, stop)
        output = self._model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self._eos_ids) or None,
            pad_token_id=self._eos_ids[0] if self._eos_ids else 0,
            repetition_penalty=self._penalty,
            stopping_criteria=[StopStrings([text], len(prompt_ids))] if stop else None,
        )
        return text.reply(output[0, len(prompt_ids) :].tolist())


def _decoded(picture: bytes) -> Image.Image:
    """Upright and RGB, transparency on white, as the server decodes it."""
    return decode_image(picture)
