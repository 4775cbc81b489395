"""How much of a difference is the reference's own: by rounding, or between its two ways of computing."""

from pathlib import Path

import torch
from transformers import AutoConfig

from rtp_llm.tools.auto_classes import computed
from rtp_llm.tools.schedules import random_questions
from rtp_llm.tools.tiny_check import LENGTHS, load_reference

NUM_TRIALS = 3
NUM_SINGLE = 8  # tokens that are computed one by one


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


@torch.no_grad()
def own_parting(directory: Path) -> float:
    """Return how far transformers' log-probabilities of a text lie apart, at most, if it computes the last tokens with
    the others, or one by one from its cache."""
    config = AutoConfig.from_pretrained(directory)
    model = load_reference(directory, config.architectures[0])
    parted = 0.0
    for question in random_questions(config.get_text_config().vocab_size, [LENGTHS[-1]]):
        whole, _ = computed(model, question.ids)
        _, cache = computed(model, question.ids[:-NUM_SINGLE])
        for place in range(len(question.ids) - NUM_SINGLE, len(question.ids)):
            logits, cache = computed(model, [question.ids[place]], cache)
            difference = logits[0, -1].float().log_softmax(-1) - whole[0, place].float().log_softmax(-1)
            parted = max(parted, float(difference.abs().max()))
    return parted
