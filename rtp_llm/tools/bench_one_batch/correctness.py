"""``--correctness-test``: print logits and texts, for comparison with those of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rtp_llm.srt.checkpoint import prompts_with_images, read_model_config, read_tokenizer
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.request_spec import PromptMedia
from rtp_llm.tools.bench_one_batch.batch import OneBatch
from rtp_llm.tools.bench_one_batch.options import OneBatchArgs, OneBatchError
from rtp_llm.tools.reference import (
    IMAGE_PROMPTS,
    chat_text,
    encode,
    logits_text,
    near_ties,
    read_images,
    read_prompts,
    ties_text,
    whole_text,
)


@dataclass(frozen=True)
class Correctness:
    """Logits [number of prompts, vocab_size] after the first tokens of each prompt, and after all of it."""

    first_half: torch.Tensor | None  # None if the whole prompt was computed at once
    final: torch.Tensor
    output_ids: list[list[int]]
    output_logits: torch.Tensor  # [number of prompts, output tokens, vocab_size]


def run_correctness(
    batch: OneBatch,
    prompts: list[list[int]],
    cut_len: int,
    output_len: int,
    media: Sequence[PromptMedia | None] | None = None,
) -> Correctness:
    """Compute ``cut_len`` tokens of each prompt, then the rest with those in the cache, then decode."""
    batch.start(prompts, output_len, media)
    first_half = batch.step_with_logits([cut_len] * len(prompts))[1] if cut_len else None
    token_ids, final = batch.step_with_logits([len(ids) - cut_len for ids in prompts])
    outputs, logits = [[token_id] for token_id in token_ids], [final]
    for _ in range(output_len - 1):
        token_ids, rows = batch.step_with_logits([1] * len(prompts))
        logits.append(rows)
        for output, token_id in zip(outputs, token_ids, strict=True):
            output.append(token_id)
    return Correctness(first_half, final, outputs, torch.stack(logits, dim=1))


def correctness_test(server_args: ServerArgs, args: OneBatchArgs) -> None:
    if server_args.skip_tokenizer_init:
        raise OneBatchError("--correctness-test works on text: it cannot run with --skip-tokenizer-init")
    model_config = read_model_config(server_args)
    tokenizer = read_tokenizer(server_args, model_config)
    if tokenizer is None:
        raise OneBatchError(f"{server_args.model_path} has no tokenizer; name one with --tokenizer-path")
    texts, prompts = _prompts(server_args, args, model_config, tokenizer)
    output_len = args.output_len[0]
    with OneBatch(server_args, model_config) as batch:
        for text, prompt in zip(texts, prompts, strict=True):
            _check_cut(args.cut_len, text, prompt, batch.computes_blocks)
        ids, media = [prompt.input_ids for prompt in prompts], [prompt.media for prompt in prompts]
        print(f"max_total_num_tokens={batch.max_total_tokens}")
        batch.reserve(len(ids), max(map(len, ids)) + output_len)
        print(f"\ninput_ids={ids}\n")
        found = run_correctness(batch, ids, args.cut_len, output_len, media)
    if found.first_half is not None:
        print(f"prefill logits (first half): {logits_text(found.first_half)} \n")
    print(f"prefill logits (final): {logits_text(found.final)} \n")
    for i, (prompt_ids, output_ids) in enumerate(zip(ids, found.output_ids, strict=True)):
        print(f"========== Prompt {i} ==========")
        print(whole_text(tokenizer, prompt_ids, output_ids), "\n")
    dtype = getattr(torch, model_config.dtype)
    if note := ties_text([near_ties(logits, dtype) for logits in found.output_logits], dtype):
        print(note)


def _prompts(
    server_args: ServerArgs, args: OneBatchArgs, model_config: ModelConfig, tokenizer: Any
) -> tuple[list[str], list[Prompt]]:
    """Return texts, and their prompts of ids and media."""
    model_type = args.model_type or ("mllm" if model_config.is_multimodal or args.image else "text")
    num_prompts = args.batch_size[0] if args.batch_size else None
    if model_type == "text":
        texts = read_prompts(args.prompt_filename)[:num_prompts]
        return texts, [Prompt(input_ids=encode(tokenizer, text)) for text in texts]
    if not model_config.is_multimodal:
        name = ", ".join(model_config.architectures)
        raise OneBatchError(f"{server_args.model_path} ({name}) takes no images; use --model-type text")
    texts, images = read_prompts(args.prompt_filename, IMAGE_PROMPTS)[:num_prompts], read_images(args.image)
    chats = [chat_text(model_config.model_path, tokenizer, text, len(images)) for text in texts]
    return texts, prompts_with_images(server_args, model_config, tokenizer, chats, images)


def _check_cut(cut_len: int, text: str, prompt: Prompt, computes_blocks: bool) -> None:
    num_tokens = len(prompt.input_ids)
    if num_tokens <= cut_len:
        raise OneBatchError(f"--cut-len {cut_len} leaves nothing of the prompt {text!r}, which has {num_tokens} tokens")
    for first, last in prompt.media.blocks if prompt.media and computes_blocks else ():
        if first < cut_len <= last:
            raise OneBatchError(
                f"--cut-len {cut_len} cuts an image, tokens {first} to {last} of {text!r}, which this model computes "
                f"at once; {first} and less, or {last + 1} and more, do not"
            )
