"""Metadata of tiny GGUF vocabularies, made as llama.cpp's converter makes it."""

import io
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from rtp_llm.srt.gguf.tokenizer import write_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KEY = "tokenizer.ggml."
LINES = [
    "the quick brown fox jumps over the lazy dog, and I'll say it's 12345 or 3.14",
    "Once upon a time there was a little girl named Lily; she'd 100 toys!",
    "    def words(text):\n\treturn text.split()\n\n\nHTTPServer camelCase",
    "Größe déjà vu e\u0301te\u0301 привет мир 你好世界 こんにちは 안녕하세요 नमस्ते",
] * 5


def written(metadata: dict[str, Any], folder: Path) -> Any:
    """Return the tokenizer that transformers loads of what is written."""
    write_tokenizer(metadata, folder)
    return AutoTokenizer.from_pretrained(str(folder))


def trained(pre_tokenizer: Any = None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train byte-level BPE; return its vocabulary and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def byte_level(pre: str | None = "gpt-2", added: dict[str, int] | None = None, **values: Any) -> dict[str, Any]:
    """Return the metadata of byte-level BPE with added tokens (text to type) at the end."""
    vocab, merges = trained()
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [NORMAL] * len(tokens)
    for text, kind in ({"<s>": CONTROL, "</s>": CONTROL} if added is None else added).items():
        tokens.append(text)
        types.append(kind)
    metadata: dict[str, Any] = {
        f"{KEY}model": "gpt2",
        f"{KEY}tokens": tokens,
        f"{KEY}token_type": types,
        f"{KEY}merges": [" ".join(pair) for pair in merges],
    }
    if "<s>" in tokens:
        metadata[f"{KEY}bos_token_id"] = tokens.index("<s>")
    if pre is not None:
        metadata[f"{KEY}pre"] = pre
    return metadata | {KEY + name: value for name, value in values.items()}


def sentencepiece_model(kind: str, **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def of_sentencepiece(model: bytes, kind: str) -> dict[str, Any]:
    messages: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    proto = messages.ModelProto()
    proto.ParseFromString(model)
    spec = proto.normalizer_spec
    metadata = {
        f"{KEY}model": kind,
        f"{KEY}pre": "default",
        f"{KEY}tokens": [piece.piece for piece in proto.pieces],
        f"{KEY}scores": [piece.score for piece in proto.pieces],
        f"{KEY}token_type": [piece.type for piece in proto.pieces],
        f"{KEY}bos_token_id": 1,
        f"{KEY}eos_token_id": 2,
        f"{KEY}unknown_token_id": 0,
        f"{KEY}add_space_prefix": spec.add_dummy_prefix,
        f"{KEY}remove_extra_whitespaces": spec.remove_extra_whitespaces,
    }
    if spec.precompiled_charsmap:
        metadata[f"{KEY}precompiled_charsmap"] = [
            byte - 256 if byte > 127 else byte for byte in spec.precompiled_charsmap
        ]
    for i, token in enumerate(metadata[f"{KEY}tokens"]):
        if metadata[f"{KEY}token_type"][i] == USER_DEFINED:
            metadata[f"{KEY}tokens"][i] = token.replace("▁", " ")
    return metadata


PLAIN: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("bpe", PLAIN | {"byte_fallback": True, "split_digits": True, "vocab_size": 500}),
    "llama-no-prefix": ("bpe", PLAIN | {"byte_fallback": True, "add_dummy_prefix": False, "vocab_size": 500}),
    "gemma": (
        "bpe",
        PLAIN
        | {"byte_fallback": True, "add_dummy_prefix": False, "vocab_size": 500}
        | {"user_defined_symbols": ["\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<t>"]},
    ),
    "normalized": ("bpe", {"byte_fallback": True, "vocab_size": 500}),
    "t5": ("unigram", {"vocab_size": 160}),
    "t5-bytes": ("unigram", PLAIN | {"byte_fallback": True, "vocab_size": 400}),
}
