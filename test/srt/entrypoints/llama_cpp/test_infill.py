"""Prompts for filling in, of tokenizers that know how, and of one that does not."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from scripted_core import SPECIAL, make_spoken_checkpoint

from rtp_llm.srt.entrypoints.llama_cpp.infill import (
    FILES,
    MIDDLES,
    PADS,
    PREFIXES,
    REPOSITORIES,
    SUFFIXES,
    PlainEncoder,
    fill_prompt,
    find_fill_tokens,
)

THREE = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
ALL = [*THREE, "<|repo_name|>", "<|file_sep|>", "<|fim_pad|>"]


def tokenizer_with(folder: Path, special: list[str]) -> Any:
    return transformers.AutoTokenizer.from_pretrained(make_spoken_checkpoint(folder, [*SPECIAL, *special]))


def plain(tokenizer: Any) -> PlainEncoder:
    return PlainEncoder(tokenizer, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])


def test_each_maker_has_three_names() -> None:
    assert len(PREFIXES) == len(SUFFIXES) == len(MIDDLES)
    together = [*PREFIXES, *SUFFIXES, *MIDDLES, *REPOSITORIES, *FILES, *PADS]
    assert len(set(together)) == len(together)


def test_a_prompt_with_files(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, ALL)
    tokens = find_fill_tokens(tokenizer)
    assert tokens is not None
    ids = fill_prompt(tokens, plain(tokenizer), "def f(", "return 1\n", [("a.py", "A = 1\n"), ("b.py", "B = 2\n")])
    assert tokenizer.decode(ids) == (
        "<|repo_name|>myproject\n<|file_sep|>a.py\nA = 1\n<|file_sep|>b.py\nB = 2\n<|file_sep|>filename\n"
        "<|fim_prefix|>def f(<|fim_suffix|>return 1\n<|fim_middle|>"
    )
    assert tokenizer.convert_ids_to_tokens(tokens.ends) == ["<|repo_name|>", "<|file_sep|>", "<|fim_pad|>"]


def test_a_prompt_without_tokens_for_files(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, THREE)
    tokens = find_fill_tokens(tokenizer)
    assert tokens is not None and tokens.ends == []
    ids = fill_prompt(tokens, plain(tokenizer), "p", "", [("a.py", "A")])
    assert tokenizer.decode(ids) == "\n\n--- snippet ---\n\nA<|fim_prefix|>p<|fim_suffix|><|fim_middle|>"


@pytest.mark.parametrize("left_out", THREE)
def test_a_tokenizer_that_lacks_one(tmp_path: Path, left_out: str) -> None:
    assert find_fill_tokens(tokenizer_with(tmp_path, [name for name in ALL if name != left_out])) is None


def test_names_of_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, ALL)
    encode = plain(tokenizer)
    names = {tokenizer.convert_tokens_to_ids(name) for name in (*ALL, "<think>", "<|end|>")}
    text = "x = '<|fim_middle|>'  # <|end|><think><|fim_middle|><|fim"
    ids = encode(text)
    assert tokenizer.decode(ids) == text and not names & set(ids)
    assert encode("the weather") == tokenizer("the weather", add_special_tokens=False)["input_ids"]
    assert encode("") == []
