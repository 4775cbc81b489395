"""bfloat16: every model of the registry is as near to float32 as transformers is in bfloat16.

Random weights have no margins: logits are large, routers flip, and two right implementations may differ by more than a
trained model's would. So the measure is the distance from transformers in float32, and the yardstick is transformers'
own distance in bfloat16, or what the reference's tests allow, whichever is more. Models that see are
asked about images.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from asked_with_images import ImagePrompt, image_prompts, their_prompt_logprobs
from seeing_twins import SEEING_TWINS

from rtp_llm import Engine, ModelRegistry
from rtp_llm.srt.configs.model_config import is_multimodal_model
from rtp_llm.srt.configs.server_args import ServerArgs
from tiny_models import make_tiny, random_prompts

TOLERANCE = 5e-2  # of a log-probability, as the reference's tests have it for prompts
SLACK = 1.5
LENGTHS = (40, 31, 17, 60) * 3  # enough that a router's flips weigh the same on both sides
ARCHITECTURES = [
    name
    for name in sorted(ModelRegistry.get_generating_archs())
    if hasattr(transformers, name) and not is_multimodal_model([name])
]


def theirs(model_dir: str, prompts: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """The prompts' log-probabilities by transformers, one after the other, [number of tokens - number of prompts]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager")
    found = []
    with torch.no_grad():
        for prompt in prompts:
            logprobs = model(torch.tensor([prompt]), use_cache=False).logits[0].float().log_softmax(-1)
            found.append(logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
    return torch.cat(found)


def ours(model_dir: str, prompts: list[list[int]]) -> torch.Tensor:
    with Engine(model_path=model_dir, dtype="bfloat16", device="cpu", max_total_tokens=2048) as engine:
        results = engine.generate(
            input_ids=prompts,
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )
    return input_logprobs(results)


def ours_with_images(model_dir: str, prompts: list[ImagePrompt]) -> torch.Tensor:
    with Engine(model_path=model_dir, dtype="bfloat16", device="cpu", max_total_tokens=2048) as engine:
        results = engine.generate(
            [prompt.text for prompt in prompts],
            image_data=[prompt.images for prompt in prompts],
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )
    return input_logprobs(results)


def input_logprobs(results: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([entry[0] for result in results for entry in result["meta_info"]["input_token_logprobs"][1:]])


SLOW = ("FalconH1ForCausalLM",)  # half a minute in transformers: its scan goes token by token


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ARCHITECTURES]
)
def test_as_near_to_float32_as_transformers(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_dir = make_tiny(architecture, tmp_path)
    vocab_size = transformers.AutoConfig.from_pretrained(model_dir).vocab_size
    prompts = random_prompts(vocab_size, LENGTHS)
    truth = theirs(model_dir, prompts, torch.float32)
    reference_error = (theirs(model_dir, prompts, torch.bfloat16) - truth).abs().mean().item()
    error = (ours(model_dir, prompts) - truth).abs().mean().item()
    print(f"{architecture}: mean error {error:.4f}, transformers' {reference_error:.4f}")
    assert error <= max(TOLERANCE, SLACK * reference_error)


@pytest.mark.parametrize("architecture", SEEING_TWINS)
def test_what_is_seen_is_as_near_to_float32_as_transformers(architecture: str, tmp_path: Path) -> None:
    model_dir = SEEING_TWINS[architecture].make(tmp_path)
    prompts = image_prompts(ServerArgs(model_path=model_dir, device="cpu"))
    truth = their_prompt_logprobs(model_dir, prompts, "float32")
    reference_error = (their_prompt_logprobs(model_dir, prompts, "bfloat16") - truth).abs().mean().item()
    error = (ours_with_images(model_dir, prompts) - truth).abs().mean().item()
    print(f"{architecture}: mean error {error:.4f}, transformers' {reference_error:.4f}")
    assert error <= max(TOLERANCE, SLACK * reference_error)
