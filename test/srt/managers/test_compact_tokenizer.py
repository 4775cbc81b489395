"""Tokenizers that are read compactly are those that the library reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gguf_vocabularies import CONTROL, LINES, MODELS, USER_DEFINED, byte_level, of_sentencepiece, sentencepiece_model
from rtp_llm.srt.gguf.tokenizer import write_tokenizer
from rtp_llm.srt.managers.compact_tokenizer import CompactTokenizer, read_compactly


def metadata_of(name: str) -> dict[str, Any]:
    if name == "gpt2":
        added = {"<s>": CONTROL, "</s>": CONTROL, "<|x|>": USER_DEFINED}
        return byte_level("llama-bpe", added, add_bos_token=True)
    kind, options = MODELS[name]
    return of_sentencepiece(sentencepiece_model(kind, **options), "llama" if kind == "bpe" else "t5")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "t5"])
def test_a_ggufs_tokenizer_is_transformers_own(tmp_path: Path, name: str) -> None:
    write_tokenizer(metadata_of(name) | {"tokenizer.chat_template": "{{ messages[0]['content'] }}"}, tmp_path)
    ours: Any = CompactTokenizer.from_pretrained(tmp_path)
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert json.loads(ours.backend_tokenizer.to_str()) == json.loads(theirs.backend_tokenizer.to_str())
    for attribute in ("special_tokens_map", "added_tokens_decoder", "chat_template", "all_special_ids", "vocab_size"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    for text in [*LINES[:4], "", " a<s>b</s>  <|x|>\n\n\t  <t>"]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])


def other_tokenizer() -> Tokenizer:
    """One with options that a GGUF's has not, and a token behind its vocabulary."""
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, "a##b": 3, "c</w>": 4, "ab": 5}
    model = models.BPE(
        vocab, [("a", "##b")], unk_token="[UNK]", continuing_subword_prefix="##", end_of_word_suffix="</w>", dropout=0.5
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken("New", normalized=True), AddedToken("<x>", special=True, lstrip=True)])
    tokenizer.enable_truncation(7)
    return tokenizer


def test_all_options_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    other_tokenizer().save(str(path))
    assert json.loads(read_compactly(path).to_str()) == json.loads(Tokenizer.from_file(str(path)).to_str())


def test_merges_in_their_older_form(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = json.loads(other_tokenizer().to_str())
    content["model"]["merges"] = ["a ##b"]
    path.write_text(json.dumps(content))
    assert json.loads(read_compactly(path).to_str()) == json.loads(Tokenizer.from_file(str(path)).to_str())


def test_ids_that_would_change_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = json.loads(other_tokenizer().to_str())
    content["added_tokens"][0]["id"] += 10
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json: ids of added tokens"):
        read_compactly(path)
