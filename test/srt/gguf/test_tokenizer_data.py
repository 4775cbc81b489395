"""Real tokenizers through GGUF metadata, as llama.cpp's converter makes it, against themselves."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gguf_vocabularies import CONTROL, KEY, NORMAL, UNUSED, USER_DEFINED, written

RANGES = [
    (0x20, 0x7F), (0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x1100, 0x1200),
    (0x2000, 0x2600), (0x3000, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xF900, 0x10000), (0x1F300, 0x1FA00),
    (0, 0x20),
]  # fmt: skip
WORDS = [
    "Hello", "it's", "I'LL", "'s", "3.14", "1234567", "12", "x²", "½", "你好", "，世界", "こんにちは", "안녕하세요",
    "Привет", "ΟΔΟΣ", "العربية", "हिन्दी", "ไทย", "🙂🙃", "e\u0301", "ﬁ", "ſ", "camelCase", "HTTPServer", "def f(x):",
    "====", "``", "</s>", "[INST]", "\\n", "$x_1^2$",
]  # fmt: skip
SPACES = [" ", "", "", "  ", "\n", "\n\n", "\n \n", "\t", "\r\n", " " * 9, "\u00a0", "\u3000", "\u200b", "\x85"]


def texts(special: list[str]) -> list[str]:
    """Return random texts, special tokens among them, and this project's own source."""
    rng = random.Random(3)
    source = Path(__file__).read_text(encoding="utf-8")
    found = [source[start : start + 300] for start in range(0, len(source), 300)]
    for _ in range(1500):
        words = (rng.choice(WORDS + special) + rng.choice(SPACES) for _ in range(rng.randint(1, 12)))
        letters = (chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randint(1, 30)))
        found += ["".join(words), "".join(letters)]
    return found


def metadata_of(folder: Path, pre: str) -> tuple[Any, dict[str, Any]]:
    original = AutoTokenizer.from_pretrained(str(folder))
    names = {token_id: token for token, token_id in original.get_vocab().items()}
    added = original.added_tokens_decoder
    tokens, types = [], []
    for token_id in range(max(names) + 20):  # the embedding has more rows
        token = names.get(token_id, f"[PAD{token_id}]")
        if token_id in added:
            looks_special = token.startswith("<|") and token.endswith("|>")
            types.append(CONTROL if added[token_id].special or looks_special else USER_DEFINED)
        else:
            types.append(NORMAL if token_id in names else UNUSED)
        tokens.append(token)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    metadata = {
        f"{KEY}model": "gpt2",
        f"{KEY}pre": pre,
        f"{KEY}tokens": tokens,
        f"{KEY}token_type": types,
        f"{KEY}merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        f"{KEY}eos_token_id": original.eos_token_id,
    }
    if original.bos_token_id is not None:
        metadata[f"{KEY}bos_token_id"] = original.bos_token_id
    return original, metadata


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pre"), [("qwen3-tokenizer", "qwen2"), ("llama3.1-tokenizer", "llama-bpe")])
def test_a_real_tokenizer_gives_the_same_ids_and_texts(data_dir: Path, tmp_path: Path, name: str, pre: str) -> None:
    original, metadata = metadata_of(data_dir / "tokenizers" / name, pre)
    ours = written(metadata, tmp_path)
    special = [str(token) for token in original.added_tokens_decoder.values()][:30]
    for text in texts(special):
        ids = original.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == original.decode(ids)
    assert (ours.bos_token, ours.eos_token) == (original.bos_token, original.eos_token)
