"""Tokenizers of checkpoints that bring a sentencepiece model or a tiktoken vocabulary, and no tokenizer.json."""

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rtp_llm import Engine
from rtp_llm.srt.managers.tokenizer_manager import TokenizerError, has_tokenizer, load_tokenizer
from tiny_models import make_tiny

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "once upon a time there was a little girl named lily",
    "she liked to play with her toys and her dog 12345",
    "hello world how are you today my friend",
    "if a < b or c > 0x14 then <stop> or say <0x41>",
    "    def words(text):\n\treturn text.split()",
] * 20
TEXTS = [
    "the quick brown fox", "hello  world", "  lead", "trail  ", " ", "   ", "", "Zoë € 你好", "\n new\tline\n\n", "ﬁne",
    "<0x41> <unk", "a" * 50, "▁ marked", "🙂🙃", "once upon a time",
]  # fmt: skip
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "vocab_size": 600}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FILES: dict[str, dict[str, Any]] = {
    "alone": {},
    "without-config": {"config.json": None},
    "class": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
    "fast-class": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", **NAMES}},
    "historic-class": {"tokenizer_config.json": {"tokenizer_class": "LLaMATokenizer"}},
    "empty-names": {
        "tokenizer_config.json": {
            "tokenizer_class": "LLaMATokenizer",
            **dict.fromkeys(NAMES, ""),
            "model_max_length": 1e30,
        }
    },
    "generic-class": {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}},
    "special-tokens-only": {"special_tokens_map.json": NAMES},
    "mistral": {"config.json": CONFIG | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}},
}
SPACES = {
    "usual": {},
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True},
    "no-prefix": {"add_dummy_prefix": False},
}


def train(kind: str, byte_fallback: bool, **options: Any) -> bytes:
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        model_type=kind,
        byte_fallback=byte_fallback,
        vocab_size=340 if byte_fallback else 80,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def write(directory: Path, files: dict[str, Any], **vocabulary: bytes) -> str:
    for name, content in ({"config.json": CONFIG} | files).items():
        if content is not None:
            (directory / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    for name, content in vocabulary.items():
        (directory / name.replace("_", ".")).write_bytes(content)
    return str(directory)


def random_texts() -> list[str]:
    rng = random.Random(1)
    characters = "the quick brown fox  \n\t.,éß€你🙂▁<>0x14"
    return ["".join(rng.choices(characters, k=rng.randrange(1, 40))) for _ in range(100)]


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
@pytest.mark.parametrize("spaces", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_are_sentencepieces_own(
    kind: str, byte_fallback: bool, spaces: dict[str, Any], files: dict[str, Any], tmp_path: Path
) -> None:
    spm = pytest.importorskip("sentencepiece")
    model = train(kind, byte_fallback, **spaces)
    own = spm.SentencePieceProcessor(model_proto=model)
    tokenizer = load_tokenizer(write(tmp_path, files, tokenizer_model=model))
    assert has_tokenizer(str(tmp_path))
    for text in TEXTS + random_texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == own.encode(text), text
        if byte_fallback:
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == own.decode(ids), text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_symbols_are_one_token_wherever_they_stand(kind: str, tmp_path: Path) -> None:
    model = train(kind, True, control_symbols=["[INST]"], user_defined_symbols=["<sep>"], **SPACES["llama"])
    spm = pytest.importorskip("sentencepiece")
    own = spm.SentencePieceProcessor(model_proto=model)
    tokenizer = load_tokenizer(write(tmp_path, {}, tokenizer_model=model))
    inst, sep = own.piece_to_id("[INST]"), own.piece_to_id("<sep>")
    ids = tokenizer("<s>[INST] the fox<sep>", add_special_tokens=False)["input_ids"]
    assert ids == [1, inst, *own.encode(" the fox"), sep]
    assert inst in tokenizer.all_special_ids or tokenizer.added_tokens_decoder[inst].special
    assert not tokenizer.added_tokens_decoder[sep].special


def test_settings_of_the_tokenizer_count(tmp_path: Path) -> None:
    model = train("bpe", True, **SPACES["llama"])
    spm = pytest.importorskip("sentencepiece")
    own = spm.SentencePieceProcessor(model_proto=model)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    tokenizer = load_tokenizer(write(tmp_path, {"tokenizer_config.json": settings}, tokenizer_model=model))
    assert tokenizer("the fox")["input_ids"] == [1, *own.encode("the fox")]
    parts = tokenizer("the fox</s>the", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(parts) == "the fox</s>the"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": True}))
    tokenizer = load_tokenizer(str(tmp_path))
    parts = tokenizer("the fox</s>the", add_special_tokens=False)["input_ids"]
    assert parts == [*own.encode("the fox"), 2, *own.encode("the")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_prefix_space": False}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer("fox", add_special_tokens=False)["input_ids"]) == "fox"
    assert tokenizer.tokenize("fox")[0] != own.encode("fox", out_type=str)[0]


def test_a_tokenizer_json_is_left_as_it_is(tmp_path: Path) -> None:
    model = train("bpe", True)
    directory = make_tiny("LlamaForCausalLM", tmp_path, hidden_size=32, num_hidden_layers=1)
    before = load_tokenizer(directory).backend_tokenizer.to_str()
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert load_tokenizer(directory).backend_tokenizer.to_str() == before


def test_text_is_served_by_it(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    model = train("bpe", True)
    own = spm.SentencePieceProcessor(model_proto=model)
    sizes = dict(hidden_size=32, num_hidden_layers=1, vocab_size=own.vocab_size())
    directory = make_tiny("LlamaForCausalLM", tmp_path, **sizes)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    (tmp_path / "tokenizer.model").write_bytes(model)
    params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    with Engine(model_path=directory, max_total_tokens=256, log_level="error") as engine:
        by_text = engine.generate("the quick  brown fox", params)
        by_ids = engine.generate(input_ids=own.encode("the quick  brown fox"), sampling_params=params)
    assert by_text["text"] == by_ids["text"]
    assert by_text["meta_info"]["prompt_tokens"] == len(own.encode("the quick  brown fox"))
    assert by_text["output_ids"] == by_ids["output_ids"]


# tiktoken


def tiktoken_vocabulary(*words: bytes) -> bytes:
    pieces = [*(bytes([byte]) for byte in range(256)), *words]
    return b"".join(base64.b64encode(piece) + b" %d\n" % i for i, piece in enumerate(pieces))


@pytest.mark.parametrize("name", ["tokenizer_model", "tiktoken_model"])
def test_tiktoken_vocabularies(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    directory = write(tmp_path, {}, **{name: tiktoken_vocabulary(b"th")})
    tokenizer = load_tokenizer(directory)
    assert has_tokenizer(directory)
    assert tokenizer("this")["input_ids"] == [256, *b"is"]
    assert tokenizer.decode([256, *"é🙂".encode()]) == "thé🙂"
    write(tmp_path, {}, **{name: tiktoken_vocabulary(b"is")})  # tiktoken would remember what lay there before
    assert load_tokenizer(directory)("this")["input_ids"] == [*b"th", 256]


# What is wrong is said


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "it has no vocabulary: none of tokenizer.json, tokenizer.model, .*Copy these files from"),
    "settings-only": ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, "it has no vocabulary"),
    "unknown-class": ({"tokenizer_config.json": {"tokenizer_class": "NoSuch"}}, "it has no vocabulary"),
    "specials-only": ({"special_tokens_map.json": NAMES}, "it has no vocabulary"),
    "garbage": ({"tokenizer.model": b"garbage"}, "tokenizer.model is neither a sentencepiece model nor a tiktoken"),
    "empty": ({"tokenizer.model": b""}, "tokenizer.model is empty: download it again"),
    "pointer": ({"tokenizer.model": POINTER}, "tokenizer.model is a Git LFS pointer"),
    "json-pointer": ({"tokenizer.json": POINTER}, "tokenizer.json is a Git LFS pointer"),
    "broken-json": ({"tokenizer.json": b"{"}, "tokenizer.json is not JSON"),
    "empty-json": ({"tokenizer.json": b""}, "tokenizer.json is empty"),
    "json-list": ({"tokenizer.json": b"[]"}, "tokenizer.json must hold a JSON object, not list"),
    "broken-settings": ({"tokenizer_config.json": b"{"}, "tokenizer_config.json is not JSON"),
    "vocabulary-without-merges": ({"vocab.json": {"a": 0}}, "vocab.json needs merges.txt"),
    "code-of-its-own": (
        {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tok.Tok", None]}, "tokenizer_class": "Tok"}},
        "it brings its own code, which runs only with --trust-remote-code",
    ),
    "qwen": ({"qwen.tiktoken": tiktoken_vocabulary()}, "qwen.tiktoken is read by code of the checkpoint's own"),
}


@pytest.mark.parametrize(("files", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    for package in ("sentencepiece", "google.protobuf", "tiktoken"):
        pytest.importorskip(package)
    with pytest.raises(TokenizerError, match=f"cannot load a tokenizer from {tmp_path}: {message}") as caught:
        load_tokenizer(write(tmp_path, files))
    assert "skip_tokenizer_init=True" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf", "tiktoken"])
def test_a_missing_package_is_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(package: str) -> object:
        return None if package == missing else object()

    monkeypatch.setattr("rtp_llm.srt.managers.tokenizer_files.find_spec", installed)
    with pytest.raises(
        TokenizerError, match=f"reading tokenizer.model takes the package {missing.split('.')[-1]}: pip"
    ):
        load_tokenizer(write(tmp_path, {"tokenizer.model": b"garbage"}))
