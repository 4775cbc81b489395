"""Special tokens, templates and errors of tokenizers of GGUF metadata."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gguf_vocabularies import (
    CONTROL,
    KEY,
    MODELS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    byte_level,
    of_sentencepiece,
    sentencepiece_model,
    written,
)  # fmt: skip
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.tokenizer import write_tokenizer
from rtp_llm.srt.gguf.vocabulary import known_ends
from rtp_llm.srt.managers.tokenizer_manager import load_tokenizer


def test_control_tokens_can_be_skipped_and_user_defined_ones_are_text(tmp_path: Path) -> None:
    ours = written(
        byte_level(added={"<s>": CONTROL, "<think>": USER_DEFINED, "   ": USER_DEFINED, "<u>": UNUSED}), tmp_path
    )
    ids = ours.encode("<s>a<think>b   <u>", add_special_tokens=False)
    tokens = ours.convert_ids_to_tokens(ids)
    assert tokens[:5] == ["<s>", "a", "<think>", "b", "   "]
    assert tokens[5] != "<u>"
    assert ours.decode(ids) == "<s>a<think>b   <u>"
    assert ours.decode(ids, skip_special_tokens=True) == "a<think>b   <u>"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ["x"]),
        ({"add_bos_token": True}, ["<s>", "x"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "x", "</s>"]),
        ({"pre": "llama-bpe"}, ["<s>", "x"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["x"]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path: Path, values: dict[str, Any], expected: list[str]) -> None:
    metadata = byte_level()
    metadata |= {f"{KEY}eos_token_id": metadata[f"{KEY}tokens"].index("</s>")}
    ours = written(metadata | {KEY + name: value for name, value in values.items()}, tmp_path)
    assert ours.convert_ids_to_tokens(ours.encode("x")) == expected
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # without what transformers makes of the settings
    assert backend.encode("x").tokens == expected


def test_ids_that_are_not_said_are_llama_cpps(tmp_path: Path) -> None:
    metadata = of_sentencepiece(sentencepiece_model("bpe", **MODELS["llama"][1]), "llama")
    for name in ("bos", "eos", "unknown"):
        del metadata[f"{KEY}{name}_token_id"]
    ours = written(metadata, tmp_path)
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
    assert ours.encode("")[0] == 1
    del metadata[f"{KEY}token_type"]  # as in files of 2023
    assert written(metadata, tmp_path).encode("the quick\n") == ours.encode("the quick\n")


def test_a_default_that_is_text_is_no_special_token(tmp_path: Path) -> None:
    ours = written(byte_level(added={}), tmp_path)  # llama.cpp's default is 11, here ","
    assert ours.convert_ids_to_tokens([11]) == [","]
    assert ours.special_tokens_map == {}
    assert ours.decode([11], skip_special_tokens=True) == ","


def test_a_pad_token_that_is_text_stays_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = written(byte_level(padding_token_id=0, eos_token_id=5), tmp_path)
    assert ours.pad_token is None
    assert "padding_token_id 0 is the token '!' of text" in caplog.text
    assert ours.decode([0, 5], skip_special_tokens=True) == "!"  # an end that is text is not shown


@pytest.mark.parametrize("name", ["Phi-3-mini", "Phi 3 Mini 4k Instruct", "other"])
def test_spaces_beside_special_tokens_of_phi3(tmp_path: Path, name: str) -> None:
    metadata = of_sentencepiece(sentencepiece_model("bpe", **MODELS["llama-no-prefix"][1]), "llama")
    ours = written(metadata | {"general.name": name}, tmp_path)
    assert (ours.encode("</s>  a") == ours.encode("</s>a")) is (name != "other")
    assert ours.encode("<s> a") != ours.encode("<s>a")


def test_a_mask_takes_the_spaces_before_it(tmp_path: Path) -> None:
    ours = written(byte_level("modern-bert", {"[MASK]": CONTROL}), tmp_path)
    assert ours.convert_ids_to_tokens(ours.encode("a  [MASK] b")) == ["a", "[MASK]", "Ġ", "b"]


def test_end_tokens_are_known_by_their_text() -> None:
    metadata = byte_level(
        added={"<|eot_id|>": CONTROL, "<|im_end|>": USER_DEFINED, "<s>": CONTROL, "</s>": NORMAL, "<eos>": USER_DEFINED}
    )
    tokens = metadata[f"{KEY}tokens"]
    assert known_ends(metadata) == [tokens.index("<|eot_id|>"), tokens.index("<|im_end|>")]
    assert known_ends({}) == []


def test_the_end_of_a_harmony_message_ends_no_turn() -> None:
    metadata = byte_level(added=dict.fromkeys(["<|return|>", "<|call|>", "<|end|>"], CONTROL))
    tokens = metadata[f"{KEY}tokens"]
    assert known_ends(metadata) == [tokens.index("<|return|>"), tokens.index("<|call|>")]
    assert known_ends(byte_level(added={"<|end|>": CONTROL})) != []


def test_an_end_of_turn_that_is_marked_as_text_is_a_control_token(tmp_path: Path) -> None:
    ours = written(byte_level(added={"<|im_end|>": NORMAL}), tmp_path)
    assert ours.decode(ours.encode("a<|im_end|>"), skip_special_tokens=True) == "a"


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "mistral", "bert", "of-our-own"])
def test_the_server_loads_what_is_written_whatever_the_models_type(tmp_path: Path, model_type: str) -> None:
    """transformers has classes for some types that cut words in their own way."""
    ours = written(byte_level("gpt-2"), tmp_path)
    config = {"model_type": model_type, "quantization_config": {"quant_method": "gguf"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = "it's 12345 e\u0301"
    ids = load_tokenizer(str(tmp_path)).encode(text)
    assert ids == ours.encode(text)
    assert ours.decode(ids) == text


def test_chat_templates_are_written(tmp_path: Path) -> None:
    metadata = byte_level() | {
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_templates": ["tool_use"],
    }
    ours = written(metadata, tmp_path)
    assert ours.chat_template == {"default": "{{ messages[0].content }}", "tool_use": "tools"}
    del metadata["tokenizer.chat_template.tool_use"]
    (tmp_path / "one").mkdir()
    (tmp_path / "none").mkdir()
    assert written(metadata | {"tokenizer.chat_template": ""}, tmp_path / "none").chat_template is None
    assert written(metadata, tmp_path / "one").chat_template == "{{ messages[0].content }}"


# What is refused


def with_list(name: str, change: Callable[[list[Any]], object]) -> Callable[[dict[str, Any]], None]:
    def edit(metadata: dict[str, Any]) -> None:
        metadata[KEY + name] = list(metadata[KEY + name])
        change(metadata[KEY + name])

    return edit


def with_value(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update({KEY + name: value})


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda metadata: metadata.pop(KEY + name)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no model": (without("model"), "model is missing"),
    "model of a wrong type": (with_value("model", 3), "model must be of type str, not int"),
    "rwkv": (with_value("model", "rwkv"), "model 'rwkv' is not supported; supported are llama, gpt2"),
    "no tokens": (without("tokens"), "tokens is missing"),
    "empty tokens": (with_value("tokens", []), "tokens is empty"),
    "tokens of a wrong type": (with_list("tokens", lambda x: x.__setitem__(3, 7)), r"tokens\[3\] must be of type str"),
    "a token twice": (with_list("tokens", lambda x: x.__setitem__(3, x[5])), "twice, as ids 3 and 5"),
    "types too short": (with_list("token_type", list.pop), "token_type has [0-9]+ values for the [0-9]+ of"),
    "an unknown type": (with_list("token_type", lambda x: x.__setitem__(2, 9)), r"token_type\[2\] is 9"),
    "scores too short": (with_value("scores", [0.0]), "scores has 1 values for the"),
    "no merges": (without("merges"), "merges is missing"),
    "a merge of one": (with_list("merges", lambda x: x.__setitem__(1, "ab")), r"merges\[1\] is 'ab', not two"),
    "a merge of none": (with_list("merges", lambda x: x.__setitem__(1, "a ")), r"merges\[1\] is 'a ', not two"),
    "a merge of no token": (with_list("merges", lambda x: x.append("zzz a")), "'zzz' is not in tokenizer.ggml.tokens"),
    "a merge into no token": (with_list("merges", lambda x: x.append("z $")), "'z\\$' is not in"),
    "an id too large": (with_value("eos_token_id", 10**6), "eos_token_id is 1000000, outside the"),
    "a negative id": (with_value("bos_token_id", -1), "bos_token_id is -1, outside the"),
    "an id of a wrong type": (with_value("eos_token_id", True), "eos_token_id must be of type int, not bool"),
    "a flag of a wrong type": (with_value("add_bos_token", 1), "add_bos_token must be of type bool, not int"),
    "eos to add, but none": (with_value("add_eos_token", True), "eos_token_id is missing, and the token is to be put"),
    "charsmap": (with_value("precompiled_charsmap", [1, 300]), r"precompiled_charsmap\[1\] is 300, not a byte"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_metadata_is_refused_with_the_keys_name(tmp_path: Path, case: str) -> None:
    edit, message = REFUSED[case]
    metadata = byte_level()
    edit(metadata)
    with pytest.raises(GGUFError, match=f"tokenizer.ggml.*{message}"):
        write_tokenizer(metadata, tmp_path)


def no_unknown(metadata: dict[str, Any]) -> None:
    del metadata[f"{KEY}unknown_token_id"]
    metadata[f"{KEY}token_type"][2] = NORMAL  # of llama.cpp's default


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("scores"), "scores is missing"),
        (with_list("scores", lambda x: x.__setitem__(4, float("nan"))), r"scores\[4\] is not a number"),
        (with_value("precompiled_charsmap", [255] * 9), "precompiled_charsmap is damaged"),
        (no_unknown, "unknown_token_id is missing"),
    ],
)
def test_wrong_unigrams_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    metadata = of_sentencepiece(sentencepiece_model("unigram", **MODELS["t5"][1]), "t5")
    edit(metadata)
    with pytest.raises(GGUFError, match=message):
        write_tokenizer(metadata, tmp_path)


def test_a_pad_token_that_does_not_exist_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert written(byte_level(padding_token_id=10**6), tmp_path).pad_token is None
    assert "padding_token_id is left out: there is no token 1000000" in caplog.text


@pytest.mark.parametrize("name", ["../x", "a b", ""])
def test_a_template_cannot_be_written_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(GGUFError, match="does not name a chat template"):
        write_tokenizer(byte_level() | {f"tokenizer.chat_template.{name}": "x"}, tmp_path)
    with pytest.raises(GGUFError, match=r"tokenizer\.chat_template must be of type str, not int"):
        write_tokenizer(byte_level() | {"tokenizer.chat_template": 1}, tmp_path)


def test_a_token_of_a_book_takes_no_minutes(tmp_path: Path) -> None:
    metadata = of_sentencepiece(sentencepiece_model("bpe", **MODELS["llama"][1]), "llama")
    book = "the quick " * 200_000
    metadata[f"{KEY}tokens"].append(book)
    metadata[f"{KEY}token_type"].append(NORMAL)
    metadata[f"{KEY}scores"].append(0.0)
    start = time.monotonic()
    write_tokenizer(metadata, tmp_path)
    assert time.monotonic() - start < 30
