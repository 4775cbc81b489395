"""Where the tokens of a completion stand in its text."""

import random
from typing import Any

import pytest
from transformers import AutoTokenizer

from rtp_llm.srt.configs.server_args import DEMO_MODEL
from rtp_llm.srt.entrypoints.openai.logprobs import TextOffsets, TokenTexts, prompt_offsets
from rtp_llm.srt.managers.incremental_text import special_ids


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def offsets_of(tokenizer: Any, ids: list[int], skip_special_tokens: bool = True) -> list[int]:
    offsets = TextOffsets(TokenTexts(tokenizer), skip_special_tokens)
    return [offsets.add(token_id) for token_id in ids]


def test_characters_of_several_tokens(tokenizer: Any) -> None:
    ids = tokenizer("né 东!", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["n", "�", "�", " ", "�", "�", "�", "!"]
    assert offsets_of(tokenizer, ids) == [0, 1, 1, 2, 3, 3, 3, 4]


def test_bytes_that_are_no_utf8(tokenizer: Any) -> None:
    """Random ids: every token that is a text of its own stands at its offset in the text of all of them."""
    rng = random.Random(0)
    texts = TokenTexts(tokenizer)
    for _ in range(50):
        ids = [rng.randrange(len(tokenizer)) for _ in range(60)]
        kept = [i for i in ids if i not in special_ids(tokenizer)]
        text = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        assert "�" in text
        for token_id, offset in zip(kept, offsets_of(tokenizer, kept), strict=True):
            if "�" not in texts.text(token_id):
                assert text[offset:].lstrip("�").startswith(texts.text(token_id))


def test_special_tokens_take_room_where_they_are_told(tokenizer: Any) -> None:
    [end] = tokenizer("<|end|>", add_special_tokens=False)["input_ids"]
    [a] = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert offsets_of(tokenizer, [a, end, a]) == [0, 1, 1]
    assert offsets_of(tokenizer, [a, end, a], skip_special_tokens=False) == [0, 1, 8]


def test_an_echo_comes_first(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    prompt = tokenizer("the sum", add_special_tokens=False)["input_ids"]
    assert prompt_offsets(texts, prompt, "the sum") == [0, *offsets_of(tokenizer, prompt)[1:]]
    offsets = TextOffsets(texts, True)
    offsets.add_text("the sum")
    assert offsets.add(prompt[0]) == 7
