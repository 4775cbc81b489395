"""How much of a difference is the reference's own rounding."""

from pathlib import Path

import torch
from transformers import AutoConfig

from rtp_llm.tools.schedules import random_questions
from rtp_llm.tools.tiny_check import LENGTHS, load_reference

NUM_TRIALS = 3


@torch.no_grad()
def own_rounding(directory: Path) -> float:
    """Return how far transformers' log-probabilities move, at most, if its weights do by the last bit of float32."""
    config = AutoConfig.from_pretrained(directory)
    model = load_reference(directory, config.architectures[0])
    questions = random_questions(config.get_text_config().vocab_size, LENGTHS)

    def answers() -> torch.Tensor:
        rows = [model(input_ids=torch.tensor([question.ids]), use_cache=False).logits[0] for question in questions]
        return torch.cat(rows).float().log_softmax(-1)

    right, generator = answers(), torch.Generator().manual_seed(0)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    moved = []
    for _ in range(NUM_TRIALS):
        for name, parameter in model.named_parameters():
            way = torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, -torch.inf, torch.inf)
            parameter.copy_(torch.nextafter(weights[name], way))
        moved.append(float((answers() - right).abs().max()))
    return max(moved)
