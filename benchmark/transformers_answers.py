"""Answers from transformers in this process: what a server's are compared with."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from transformers import AutoTokenizer, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmark.evaluation import EvaluationError, Reply, positive
from rtp_llm.srt.checkpoint import read_end_tokens
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import choose_torch_device
from rtp_llm.tools.auto_classes import load_by_transformers


def add_transformers_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        help="prompts at once; above 1 they are padded, which rounds otherwise",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", required=True, help="directory or hub id of the checkpoint")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "auto"])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="unset: cuda where a GPU is usable")
    parser.add_argument(
        "--context-length", type=positive, help="tokens, prompt and answer together; unset: the model's own"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def read_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.from_pretrained(
        args.model_path,
        dtype=args.dtype,
        context_length=args.context_length,
        trust_remote_code=args.trust_remote_code,
    )


def load_model(config: ModelConfig, trust_remote_code: bool) -> Any:
    return load_by_transformers(
        config.model_path, config.hf_config, trust_remote_code, dtype=getattr(torch, config.dtype)
    )


class TransformersAnswers:
    """An Answerer (see benchmark/evaluation.py): greedy ``generate``, ended as a server ends it.

    An answer ends before the model's end-of-sequence tokens, or before a stop string. Of what generation_config.json
    advises, the repetition penalty applies, as in servers: temperature 0 does not replace it.

    Raises:
        EvaluationError: the checkpoint cannot be loaded, or the device is not there.
    """

    backend = "transformers"
    counting = "the model's tokenizer"

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            config = read_config(args)
            self._device = choose_torch_device(args.device)
            self._tokenizer = AutoTokenizer.from_pretrained(config.model_path, trust_remote_code=args.trust_remote_code)
            model = load_model(config, args.trust_remote_code)
        except (ValueError, OSError, RuntimeError) as error:
            raise EvaluationError(f"{args.model_path}: {error}") from error
        self.model = args.model_path
        self.context_len: int | None = config.context_length
        self._batch_size = args.batch_size
        self._eos_ids = end_ids(args.model_path, config, self._tokenizer)
        self._penalty = float(config.generation_defaults.get("repetition_penalty", 1.0))
        self._model = model.to(self._device).eval()
        self._model.generation_config = GenerationConfig()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        del self._model

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(self._encode(prompt)) for prompt in prompts]

    def answer(
        self, prompts: Sequence[str], max_new_tokens: int, stop: tuple[str, ...], on_done: Callable[[], None]
    ) -> list[Reply]:
        encoded = [self._encode(prompt) for prompt in prompts]
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # so that batches are padded little
        replies: dict[int, Reply] = {}
        for start in range(0, len(encoded), self._batch_size):
            batch = by_length[start : start + self._batch_size]
            for i, reply in zip(batch, self._continue([encoded[i] for i in batch], max_new_tokens, stop), strict=True):
                replies[i] = reply
                on_done()
        return [replies[i] for i in range(len(encoded))]

    def _encode(self, prompt: str) -> list[int]:
        return self._tokenizer(prompt, verbose=False).input_ids

    @torch.inference_mode()
    def _continue(self, prompts: list[list[int]], max_new_tokens: int, stop: tuple[str, ...]) -> list[Reply]:
        """Replies to a batch of prompts, padded on the left."""
        width = max(map(len, prompts))
        pad_id = self._eos_ids[0] if self._eos_ids else 0
        padded = [[pad_id] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        texts = [Continuation(self._tokenizer, ids, self._eos_ids, stop) for ids in prompts]
        output = self._model.generate(
            torch.tensor(padded, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self._eos_ids) or None,
            pad_token_id=pad_id,
            repetition_penalty=self._penalty,
            stopping_criteria=StoppingCriteriaList([StopStrings(texts, width)] if stop else []),
        )
        return [text.reply(row) for text, row in zip(texts, output[:, width:].tolist(), strict=True)]


def end_ids(model_path: str, config: ModelConfig, tokenizer: Any) -> list[int]:
    """The ids that end a text where our server or engine runs this checkpoint."""
    return [token.token_id for token in read_end_tokens(ServerArgs(model_path=model_path), config, tokenizer)]


class Continuation:
    """The text that generated ids add to one prompt's, and where it ends."""

    def __init__(self, tokenizer: Any, prompt_ids: list[int], eos_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._prompt_text = self._decode([])
        self._eos_ids = eos_ids
        self._stop = stop
        self._num_tokens: int | None = None  # when a stop string was first seen

    def meets_stop(self, ids: list[int]) -> bool:
        """Whether the text of the ids that were generated so far has a stop string."""
        if self._num_tokens is None and self._stop_position(self._text(ids)) is not None:
            self._num_tokens = len(ids)
        return self._num_tokens is not None

    def reply(self, ids: list[int]) -> Reply:
        """All that was generated, perhaps with padding after its end."""
        text = self._text(ids)
        return Reply(text[: self._stop_position(text)], self._num_tokens or min(len(ids), self._num_spoken(ids) + 1))

    def _text(self, ids: list[int]) -> str:
        """The space that some tokenizers put between tokens shows only when the prompt is decoded along."""
        return self._decode(ids[: self._num_spoken(ids)])[len(self._prompt_text) :]

    def _num_spoken(self, ids: list[int]) -> int:
        """Ids before the first end-of-sequence token."""
        return next((i for i, token_id in enumerate(ids) if token_id in self._eos_ids), len(ids))

    def _stop_position(self, text: str) -> int | None:
        return min((position for string in self._stop if (position := text.find(string)) >= 0), default=None)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            self._prompt_ids + ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class StopStrings(StoppingCriteria):
    """Ends each row of a batch whose prompts are ``width`` ids wide when its text has a stop string."""

    def __init__(self, texts: list[Continuation], width: int) -> None:
        self._texts = texts
        self._width = width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = input_ids[:, self._width :].tolist()
        ended = [text.meets_stop(row) for text, row in zip(self._texts, rows, strict=True)]
        return torch.tensor(ended, device=input_ids.device)
