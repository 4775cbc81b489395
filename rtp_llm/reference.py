"""What transformers answers, and the rules by which an answer of ours is compared with it. Knows nothing of the engine.

Both sides of a comparison keep these rules:

- Prompts are ``PROMPTS`` or the lines of a file, and a prompt's ids are what the tokenizer makes of it.
- The dtype is ``ModelConfig.dtype``: what ``--dtype`` asks for; ``auto`` is the checkpoint's own, as in the server.
- Text is greedy and exactly as long as asked: an end-of-sequence token is a token like any other. Nothing that the
  checkpoint's generation_config.json advises (penalties, forced tokens) applies.
- Logits are shown in float32, after everything that the model itself does to them.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.platform import choose_device

PROMPTS = (
    "The capital of France is",
    "The capital of the United Kingdom is",
    "Today is a sunny day and I like",
)
MAX_NEW_TOKENS = 16
_AT_ONCE = 1024  # positions of a prompt whose log-probabilities are in memory together


def read_prompts(filename: str | None) -> list[str]:
    """The lines of a file that are not blank; PROMPTS where none is named.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no prompt.
    """
    if not filename:
        return list(PROMPTS)
    prompts = [line for line in Path(filename).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{filename} has no prompts; write one per line")
    return prompts


def encode(tokenizer: Any, prompt: str) -> list[int]:
    return tokenizer(prompt).input_ids


def whole_text(tokenizer: Any, prompt_ids: list[int], output_ids: list[int]) -> str:
    """Prompt and completion as one text, special tokens shown."""
    return tokenizer.decode([*prompt_ids, *output_ids])


def logits_text(logits: torch.Tensor) -> str:
    """Three values at each end of a row, whatever its length, in one notation."""
    torch.set_printoptions(threshold=0, edgeitems=3, sci_mode=False)
    try:
        return str(logits)
    finally:
        torch.set_printoptions(profile="default")


@dataclass(frozen=True)
class Answer:
    """A greedy completion, with the best log-probabilities at each position, best first.

    ``prefill_top[i]`` are those for the token that follows prompt token i, ``decode_top[i]`` those for output token i.
    """

    prompt_ids: list[int]
    output_ids: list[int]
    text: str  # of the output alone, without special tokens
    prefill_top: list[list[float]]
    decode_top: list[list[float]]


class TransformersModel:
    """A causal language model, run by transformers, one prompt at a time.

    Raises:
        ValueError, OSError: what is wrong with the checkpoint.
        RuntimeError: the device is not there.
    """

    def __init__(
        self, model_path: str, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
    ) -> None:
        config = ModelConfig.from_pretrained(model_path, dtype=dtype, trust_remote_code=trust_remote_code)
        self.device = choose_device(device)
        self.context_length = config.context_length
        self._load_tokenizer = partial(
            AutoTokenizer.from_pretrained, config.model_path, trust_remote_code=trust_remote_code
        )
        model = AutoModelForCausalLM.from_pretrained(
            config.model_path, dtype=getattr(torch, config.dtype), trust_remote_code=trust_remote_code
        )
        self.model = model.to(self.device).eval()
        self.model.generation_config = GenerationConfig()

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded when it is first asked for: logits of ids need none."""
        return self._load_tokenizer()

    @torch.inference_mode()
    def prompt_logits(self, prompt_ids: list[int]) -> torch.Tensor:
        """[len(prompt_ids), vocab_size] in the model's dtype."""
        return self.model(torch.tensor([prompt_ids], device=self.device)).logits[0]

    @torch.inference_mode()
    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> tuple[list[int], torch.Tensor]:
        """``max_new_tokens`` ids, and the logits they are the largest of: [max_new_tokens, vocab_size] float32."""
        ids = torch.tensor([prompt_ids], device=self.device)
        generated = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(generated.logits).float()
        return generated.sequences[0, len(prompt_ids) :].tolist(), logits

    def answer(self, prompt: str, max_new_tokens: int, top_num: int, max_prompt_len: int) -> Answer:
        """Continues the last ``max_prompt_len`` tokens of a prompt."""
        prompt_ids = encode(self.tokenizer, prompt)[-max_prompt_len:]
        output_ids, logits = self.generate(prompt_ids, max_new_tokens)
        return Answer(
            prompt_ids,
            output_ids,
            self.tokenizer.decode(output_ids, skip_special_tokens=True),
            _top_logprobs(self.prompt_logits(prompt_ids), top_num),
            _top_logprobs(logits, top_num),
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
    """Loads a model and has it answer. Prompts that are too long for its context lose their beginning.

    To be called in a process of its own where the memory is needed afterwards.
    """
    model = TransformersModel(model_path, dtype, device, trust_remote_code)
    room = model.context_length - max_new_tokens
    return [model.answer(prompt, max_new_tokens, top_num, room) for prompt in prompts]


def _top_logprobs(logits: torch.Tensor, top_num: int) -> list[list[float]]:
    """The best log-probabilities of each row of logits [rows, vocab_size]."""
    rows: list[list[float]] = []
    for part in logits.split(_AT_ONCE):
        rows += part.float().log_softmax(-1).topk(min(top_num, part.shape[-1])).values.tolist()
    return rows
