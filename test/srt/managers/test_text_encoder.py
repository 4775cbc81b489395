"""Texts to ids from many threads, and texts that are too long to be worth it."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rtp_llm.srt.managers import text_encoder
from rtp_llm.srt.managers.text_encoder import LONG_TEXT, MAX_CHARS_PER_TOKEN, MAX_TEXT, TextEncoder, TooManyTokens
from rtp_llm.srt.sampling_params import InvalidRequest

MOST = 100


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(["the cat sat"] * 8, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_long_and_short_texts_have_the_same_ids_from_any_thread(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, MOST)
    texts = ["the cat sat", "the cat " * LONG_TEXT, "größer 東京", "sat" * LONG_TEXT] * 4
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda text: encoder.encode(text, True), texts))
    assert ids == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("max_tokens", [None, 3])
def test_texts_encoded_together_have_the_ids_of_each(tokenizer: Any, max_tokens: int | None) -> None:
    encoder, texts = TextEncoder(tokenizer, MOST), ["the cat sat", "", "größer 東京", "the cat"]
    alone = [encoder.encode_input(text, None, True, max_tokens)[0] for text in texts]
    assert encoder.encode_inputs(texts, True, max_tokens) == alone
    assert max(map(len, alone)) == (max_tokens or len(tokenizer(texts[2])["input_ids"]))


def test_a_long_text_keeps_no_short_one_waiting(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, encode = TextEncoder(tokenizer, MOST), text_encoder._encode
    begun, may_end = threading.Event(), threading.Event()

    def slow(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > LONG_TEXT:
            begun.set()
            assert may_end.wait(60)
        return encode(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(text_encoder, "_encode", slow)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(encoder.encode, "a" * (LONG_TEXT + 1), True)
        assert begun.wait(60)
        assert encoder.encode("the cat", True)
        assert not long.done()
        may_end.set()
        assert len(long.result()) == LONG_TEXT + 1


def test_a_text_with_too_many_tokens_is_not_encoded_to_its_end(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, encode, num_chars = TextEncoder(tokenizer, MOST), text_encoder._encode, []

    def counted(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
        num_chars.append(len(text))
        return encode(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(text_encoder, "_encode", counted)
    with pytest.raises(TooManyTokens):
        encoder.check_length("a" * MAX_TEXT)
    assert sum(num_chars) < 2 * text_encoder.PIECE
    with pytest.raises(InvalidRequest, match=f"at most {MAX_TEXT} are encoded at once"):
        encoder.encode("a" * (MAX_TEXT + 1), True)
    assert sum(num_chars) < 2 * text_encoder.PIECE


def test_what_may_fit_is_let_through(tokenizer: Any) -> None:
    wide = TextEncoder(tokenizer, MAX_TEXT)
    wide.check_length("a" * (MAX_TEXT * MAX_CHARS_PER_TOKEN // 4))
    assert len(wide.encode("a" * LONG_TEXT * 2, True)) == LONG_TEXT * 2
    TextEncoder(tokenizer, MOST).check_length("the cat " * (LONG_TEXT // 8))  # the exact answer comes after it


def test_a_tokenizer_that_cannot_be_copied(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise TypeError("no copies")

    monkeypatch.setattr(copy, "deepcopy", refuse)
    encoder = TextEncoder(tokenizer, MOST)
    for _ in range(2):
        assert len(encoder.encode("a" * (LONG_TEXT + 1), True)) == LONG_TEXT + 1
