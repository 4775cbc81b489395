"""Tokens that a request must not generate: bad words and allowed ids."""

import random
from typing import Any

import pytest
import torch

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams
from rtp_llm.srt.worker.token_bans import TokenBans

VOCAB = 7


def banned(output: list[int], bad: list[list[int]], allowed: list[int] | None) -> set[int]:
    """The rule, in plain words."""
    ids = set() if allowed is None else set(range(VOCAB)) - set(allowed)
    ids |= {word[0] for word in bad if len(word) == 1}
    completing = {word[-1] for word in bad if len(word) > 1 and output[len(output) + 1 - len(word) :] == word[:-1]}
    completing = {i for word in bad if len(word) > 1 for i in completing & {word[-1]} if len(output) >= len(word) - 1}
    return ids | completing if len(ids | completing) < VOCAB else ids


@pytest.mark.parametrize("seed", range(30))
def test_bans_are_those_of_the_rule(seed: int) -> None:
    draw = random.Random(seed)
    bad = [[draw.randrange(4) for _ in range(draw.choice((1, 2, 2, 3, 4)))] for _ in range(draw.randrange(5))]
    allowed = None if draw.random() < 0.5 else sorted(draw.sample(range(VOCAB), 5))
    params = SamplingParams(bad_words_ids=bad, allowed_token_ids=allowed)
    try:
        params.validate(VOCAB)
    except InvalidRequest:
        return
    output = [draw.randrange(4) for _ in range(draw.randrange(6))]
    bans = TokenBans(VOCAB, provider_named("cpu"))
    bans.add(2, params, output)
    for _ in range(12):
        logits = torch.zeros(2, VOCAB)
        bans.apply(logits, [5, 2])
        assert (logits[0] == 0).all()
        assert set((logits[1] == -torch.inf).nonzero().flatten().tolist()) == banned(output, bad, allowed)
        output.append(draw.randrange(4))
        bans.observe([5, 2], torch.tensor([6, output[-1]]))
    bans.remove(2)
    assert 2 not in bans


def test_a_beginning_that_was_not_generated_bans_nothing() -> None:
    bans = TokenBans(VOCAB, provider_named("cpu"))
    bans.add(0, SamplingParams(bad_words_ids=[[1, 2, 3]]), [2])
    logits = torch.zeros(1, VOCAB)
    bans.apply(logits, [0])
    assert (logits == 0).all()


@pytest.mark.parametrize(
    ("values", "words", "param"),
    [
        ({"allowed_token_ids": []}, "at least one token id", "allowed_token_ids"),
        ({"allowed_token_ids": [VOCAB]}, "outside the vocabulary", "allowed_token_ids"),
        ({"allowed_token_ids": [1], "bad_words_ids": [[1]]}, "no token that bad_words leaves", "allowed_token_ids"),
        ({"bad_words_ids": [[i] for i in range(VOCAB)]}, "leaves no token", "bad_words"),
        ({"bad_words_ids": [[1, VOCAB]]}, "outside the vocabulary", "bad_words_ids"),
        ({"bad_words_ids": [[]]}, "from 1 to", "bad_words_ids"),
        ({"bad_words_ids": [1]}, "must be a list of token ids", "bad_words_ids"),
        ({"bad_words": [""]}, "must be a non-empty string", "bad_words"),
        ({"bad_words": ["a"] * 257}, "at most 256", "bad_words"),
        ({"bad_words": ["a" * 1025]}, "at most 1024", "bad_words"),
    ],
)
def test_wrong_values(values: dict[str, Any], words: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.from_dict(values).validate(VOCAB)
    assert words in str(caught.value) and caught.value.param == param
