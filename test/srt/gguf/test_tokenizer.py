"""Tokenizers of GGUF metadata: the ids and texts of the tokenizers that the metadata was made of.

The metadata is made here as llama.cpp's converter makes it.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, CohereTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer

from gguf_vocabularies import (
    BYTE,
    CONTROL,
    KEY,
    LINES,
    MODELS,
    NORMAL,
    UNKNOWN,
    byte_level,
    of_sentencepiece,
    sentencepiece_model,
    trained,
    written,
)  # fmt: skip
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.pre_tokenizers import PRE_TOKENIZATIONS
from rtp_llm.srt.gguf.tokenizer import write_tokenizer

TEXTS = [
    "", " ", "   ", "\n", " \n\n \t", "the quick  brown fox", " lead", "trail  ", "it's I'LL 'sx", "1234567 12 3,000.5",
    "e\u0301te\u0301 Größe", "你好，世界 こんにちは 안녕", "🙂🙃 \U0001f468\u200d\U0001f469",
    "HTTPServer camelCase iPhone", "a" * 40, "x\u00a0y\u3000z\u200b",
    "<0x41> ▁ Ġ Ċ", "if (a<=b) { return; } // ====", "\x00\x01\x7f", " ".join(LINES[:4]), " " * 45 + "x",
]  # fmt: skip
WORDS = [
    "the ", " quick", "it's", "Größe", "12", "345", " ", "  ", "\n", "\t", "你好", "e\u0301", "🙂", "<s>", "<|x|>",
]  # fmt: skip
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.lists(st.sampled_from(WORDS), max_size=12).map("".join),
)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same(ours: Any, encode: Callable[[str], list[int]], texts: list[str]) -> None:
    assert [(text, ours.encode(text, add_special_tokens=False)) for text in texts] == [(t, encode(t)) for t in texts]


# Byte-level BPE


ORIGINALS = {
    "gpt-2": GPT2Tokenizer,
    "mpt": GPTNeoXTokenizer,
    "qwen2": Qwen2Tokenizer,
    "command-r": CohereTokenizer,
}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_bpe_gives_the_ids_and_texts_of_transformers_classes(tmp_path: Path, pre: str) -> None:
    """The merges cross words, so that a word cut elsewhere gives other ids."""
    vocab, merges = trained()
    special = {"<s>": len(vocab), "<|x|>": len(vocab) + 1}
    original = ORIGINALS[pre](
        vocab=vocab | special,
        merges=merges,
        bos_token="<s>",
        eos_token="<|x|>",
        unk_token="<s>",
        add_prefix_space=False,
    )
    ours = written(byte_level(pre, {"<s>": CONTROL, "<|x|>": CONTROL}), tmp_path)

    @given(TEXT)
    @MANY
    def check(text: str) -> None:
        ids = original.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.decode(ids) == original.decode(ids)

    assert_same(ours, lambda text: original.encode(text, add_special_tokens=False), TEXTS)
    check()


WORDS_OF = {
    "llama-bpe": ("I'M 12345 é\n\n x", ["I", "'M", " ", "123", "45", " é", "\n\n", " x"]),
    "qwen2": ("I'M 123", ["I", "'M", " ", "1", "2", "3"]),
    "qwen35": ("e\u0308\u0301x", ["ë\u0301x"]),
    "tekken": ("iPhone don't/\n", ["i", "Phone", " don", "'t", "/\n"]),
    "gpt-4o": ("iPhone don't 1234", ["i", "Phone", " don't", " ", "123", "4"]),
    "deepseek-v3": ("abc你好.x 1234", ["abc", "你好", ".x", " ", "123", "4"]),
    "deepseek-coder": ("a\nb 12", ["a", "\n", "b", " ", "1", "2"]),
    "deepseek-llm": ("ab, cd 12", ["ab", ",", " cd", " ", "12"]),
    "starcoder": ("a 12", ["a", " ", "1", "2"]),
    "falcon": ("a 12345!?", ["a", " ", "123", "45", "!?"]),
    "default": ("a 1234!?", ["a", " ", "123", "4", "!?"]),
    "bloom": ("a, b.", ["a", ",", " b", "."]),
    "viking": ("a 12", ["a", " ", "1", "2"]),
    "tiny_aya": ("1234567", ["1", "234", "567"]),
    "afmoe": ("x1234567你", ["x", "1", "234", "567", "你"]),
    "superbpe": ("a b 1234567", ["a b ", "1", "234", "567"]),
    "kimi-k2": ("你好abcDef 1234", ["你好", "abc", "Def", " ", "123", "4"]),
    "laguna": ("a\n\nb", ["a", "\n\n", "b"]),
    "ufakzeka": ("I'm", ["I", "'m"]),
    "seed-coder": ("!\n12", ["!", "\n", "1", "2"]),
    "spark2_5": ("!\n12", ["!", "\n", "1", "2"]),
    "minicpm5": ("a 1234", ["a", " ", "123", "4"]),
    "bailingmoe": ("I'M!!\n 12", ["I", "'M", "!!\n", " ", "1", "2"]),
    "exaone-moe": ("a b 1", ["a b", " ", "1"]),
    "jais-2": ("a     b", ["a", "    ", " b"]),
    "youtu": ("안녕ab你1", ["안녕", "ab", "你", "1"]),
    "chameleon": ("a\n!1", ["a", "\n", "!", "1"]),
    "granite-embed-multi-97m": ("iPhone", ["i", "Phone"]),
}


@pytest.mark.parametrize("pre", WORDS_OF)
def test_text_is_cut_into_words_as_its_name_says(pre: str) -> None:
    text, words = WORDS_OF[pre]
    way = PRE_TOKENIZATIONS[pre]
    normalizer = way.normalizer()
    symbols = {byte: symbol for symbol, byte in byte_symbols().items()}
    expected = ["".join(symbols[byte] for byte in word.encode()) for word in words]
    text = normalizer.normalize_str(text) if normalizer else text
    assert [word for word, _ in way.pre_tokenizer().pre_tokenize_str(text)] == expected


def byte_symbols() -> dict[str, int]:
    """Return GPT-2's symbols of bytes, by which ByteLevel spells them."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert spell.pre_tokenize_str("é\n")[0][0] == "".join(s for b in "é\n".encode() for s, v in table.items() if v == b)
    return table


@pytest.mark.parametrize("pre", [name for name, way in PRE_TOKENIZATIONS.items() if way.in_bytes])
def test_every_way_of_cutting_gives_back_the_text(tmp_path: Path, pre: str) -> None:
    write_tokenizer(byte_level(pre), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        expected = normalizers.NFC().normalize_str(text) if PRE_TOKENIZATIONS[pre].nfc else text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == expected


def test_an_unknown_way_of_cutting_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.pre 'next-year' is not known; known are .*qwen2"):
        write_tokenizer(byte_level("next-year"), tmp_path)


def test_a_missing_way_of_cutting_is_the_default_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        write_tokenizer(byte_level(None), tmp_path)
    assert "tokenizer.ggml.pre is missing" in caplog.text
    ids = [written(byte_level(pre), tmp_path).encode("a 123!?") for pre in ("default", None)]
    assert ids[0] == ids[1]


def test_bpe_in_characters_has_bytes_for_what_it_lacks(tmp_path: Path) -> None:
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"ab▁",
        "ab",
        "▁ab",
        "\n",
    ]
    types = [CONTROL] * 3 + [UNKNOWN] + [BYTE] * 256 + [NORMAL] * 6
    metadata = {
        f"{KEY}model": "gemma4",
        f"{KEY}tokens": tokens,
        f"{KEY}token_type": types,
        f"{KEY}merges": ["a b", "▁ ab"],
        f"{KEY}bos_token_id": 2,
        f"{KEY}eos_token_id": 1,
        f"{KEY}unknown_token_id": 3,
    }
    ours = written(metadata, tmp_path)
    ids = ours.encode(" ab ab\né")
    assert ours.convert_ids_to_tokens(ids) == ["<bos>", "▁ab", "▁ab", "\n", "<0xC3>", "<0xA9>"]
    assert ours.decode(ids, skip_special_tokens=True) == " ab ab\né"


# Sentencepiece


@pytest.mark.parametrize("name", MODELS)
def test_sentencepiece_gives_its_own_ids_and_texts(tmp_path: Path, name: str) -> None:
    kind, options = MODELS[name]
    model = sentencepiece_model(kind, **options)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = written(of_sentencepiece(model, "llama" if kind == "bpe" else "t5"), tmp_path)

    def is_comparable(text: str) -> bool:
        """Leave out what sentencepiece alone does: control tokens are text, ▁ joins spaces, no unigram is a byte."""
        other = {"gemma": "▁", "t5-bytes": "<0x"}.get(name, "<s>")
        return "<s>" not in text and "\x00" not in text and other not in text

    @given(TEXT.filter(is_comparable))
    @MANY
    def check(text: str) -> None:
        ids = original.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids
        if name != "t5":  # unknown characters have no text of their own
            assert ours.decode(ids) == original.decode(ids)

    assert_same(ours, original.encode, list(filter(is_comparable, TEXTS)))
    check()


# WordPiece


def test_word_piece_gives_the_ids_of_transformers_class(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    vocab = tokenizer.get_vocab()
    original = BertTokenizer(vocab=vocab, do_lower_case=True)
    pieces = sorted(vocab, key=vocab.__getitem__)
    metadata = {
        f"{KEY}model": "bert",
        f"{KEY}pre": "bert-bge",
        f"{KEY}tokens": [
            piece if piece in special else piece[2:] if piece.startswith("##") else f"▁{piece}" for piece in pieces
        ],
        f"{KEY}token_type": [CONTROL if piece in special else NORMAL for piece in pieces],
        f"{KEY}padding_token_id": 0,
        f"{KEY}unknown_token_id": 1,
        f"{KEY}bos_token_id": 2,
        f"{KEY}seperator_token_id": 3,
        f"{KEY}mask_token_id": 4,
    }
    ours = written(metadata, tmp_path)

    @given(TEXT)
    @MANY
    def check(text: str) -> None:
        assert ours.encode(text) == original.encode(text)

    check()
    assert ours("a quick", "fox")["input_ids"] == original("a quick", "fox")["input_ids"]
    assert (ours.cls_token, ours.sep_token, ours.mask_token) == ("[CLS]", "[SEP]", "[MASK]")
    assert ours.decode(original.encode("the quick fox"), skip_special_tokens=True) == "the quick fox"
