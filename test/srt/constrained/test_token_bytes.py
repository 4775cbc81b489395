"""Vocabularies that the grammar compiler cannot read: their tokens' bytes are found by decoding."""

import re

import numpy as np
import pytest
from byte_tokens import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rtp_llm.srt.constrained.llguidance_backend import LLGuidanceBackend
from rtp_llm.srt.constrained.token_bytes import TokenBytes
from rtp_llm.srt.request_spec import GrammarSpec

PIECES = ["<unk>", "a", "b", "\u2581", "\u2581a", "1", "12", "ab", "<0x0A>", "\u00e4", "x"]
END, SIZE = len(PIECES), 16


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """With a decoder for "\u2581" that llguidance does not know."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_bytes() -> None:
    found = TokenBytes(metaspace_tokenizer(), SIZE, END)
    texts = [b"a", b"b", b" ", b" a", b"1", b"12", b"ab", b"\n", "\u00e4".encode(), b"x"]
    joined = [text.replace(b"a ", b"a") for text in found.tokens[1:END]]
    assert joined == texts and found.tokens[END + 1 :] == [b""] * (SIZE - END - 1)
    assert {0, END} <= set(found.special_token_ids)


def test_masks() -> None:
    backend = LLGuidanceBackend(metaspace_tokenizer(), SIZE)
    matcher = backend.compile(GrammarSpec("regex", "(1|12| a)+\n"), [END])
    words = np.empty((1, 1), dtype=np.int32)
    rng = np.random.default_rng(0)
    text = b""
    while not matcher.is_complete and len(text) < 200:
        backend.fill([matcher], words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        assert set(allowed) <= {3, 4, 5, 6, 8, 1, END}
        token = int(rng.choice(allowed))
        assert matcher.accept(token)
        text += backend_bytes(token)
    assert re.fullmatch(rb"(1|12| a)+\n", text)


def backend_bytes(token: int) -> bytes:
    return TokenBytes(metaspace_tokenizer(), SIZE, END).tokens[token]


@pytest.mark.parametrize("vocab_size", [257, 258, 300])
@pytest.mark.parametrize("ends", [[256], []], ids=str)
def test_a_vocabulary_that_is_larger_than_the_tokenizers(vocab_size: int, ends: list[int]) -> None:
    """Also where the grammar alone ends the text, which no token of the tokenizer is there for."""
    backend = LLGuidanceBackend(byte_tokenizer(), vocab_size)
    matcher = backend.compile(GrammarSpec("regex", "ab?"), ends)
    assert matcher.accept(ord("a")) and not matcher.is_complete
    words = np.empty((1, (vocab_size + 31) // 32), dtype=np.int32)
    backend.fill([matcher], words)
    assert set(np.flatnonzero(np.unpackbits(words[0].view(np.uint8), bitorder="little"))) == {ord("b"), *ends}
    assert matcher.accept(ord("b")) and matcher.is_complete
