"""Sampling parameters and token ids that checkpoints advise: the usable ones are used, the others told once."""

import json
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.srt.configs.generation_config import generation_defaults, read_generation_config, usable_token_ids
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
NUMBERS: list[Any] = [
    -5, -1, 0, 1, 2, 50, 50.0, 0.5, -0.5, 1.5, 2**63 - 1, 2**63, 10**30, -(10**30), 1e30, 1e400, -1e400, float("nan"),
    True, False, "1", "hot", "", [1], [], {}, {"a": 1}, "x" * 1000,
]  # fmt: skip
KEYS = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]


def write(directory: Path, generation: Any, **changes: Any) -> str:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    text = generation if isinstance(generation, str) else json.dumps(generation)
    (directory / "generation_config.json").write_text(text)
    return str(directory)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: repr(value)[:20])
def test_every_default_is_one_that_a_request_may_have(key: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    defaults = generation_defaults({key: value}, "dir")
    params = SamplingParams(**defaults)
    if defaults:
        expected = getattr(params, key)
        assert type(defaults[key]) is type(expected) and defaults[key] == expected == type(expected)(value)
        assert not caplog.records
    else:
        assert len(caplog.records) == 1
        message = caplog.records[0].getMessage()
        assert f"`{key}` in dir/generation_config.json is left out: " in message and len(message) < 300
        if not isinstance(value, (int, float)) or abs(value) < 2**63:  # what a request may have, it may advise
            with pytest.raises(InvalidRequest):
                SamplingParams(**{key: value})


def test_usable_values_and_those_left_out_stand_beside_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {"temperature": float("nan"), "top_k": 50.0, "min_p": "0.1", "repetition_penalty": 1.1})
    assert ModelConfig.from_pretrained(path).generation_defaults == {"top_k": 50, "repetition_penalty": 1.1}
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == ["`temperature`", "`min_p`"]


@pytest.mark.parametrize(
    ("value", "expected", "is_told"),
    [(False, {"temperature": 0.0}, False), (True, {}, False), (None, {}, False), ("no", {}, True), ([], {}, True)],
)
def test_do_sample(value: Any, expected: dict, is_told: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert generation_defaults({"do_sample": value}, "dir") == expected
    assert ("`do_sample` in dir/generation_config.json is left out" in caplog.text) == is_told


@pytest.mark.parametrize("text", ["{", "", "[1]", "null", '"a"', "3", "[" * 100_000])
def test_a_broken_file_is_told_by_name(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig.from_pretrained(write(tmp_path, text))
    assert (config.eos_token_ids, config.generation_defaults) == ((2,), {})
    assert [str(tmp_path / "generation_config.json") in record.getMessage() for record in caplog.records] == [True]


def test_files_that_are_not_text_are_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe{}")
    assert read_generation_config(str(tmp_path)) == {}
    assert "cannot be read and is left out" in caplog.text


# Token ids

IDS: list[tuple[Any, list[int], bool]] = [
    (5, [5], False),
    ([5, 7], [5, 7], False),
    (None, [], False),
    ([], [], False),
    ([None, 5], [5], False),
    (5.0, [5], False),
    ([7.0, 5], [7, 5], False),
    (5.5, [], True),
    ("5", [], True),
    (["</s>", 5], [5], True),
    (True, [], True),
    ([5, False], [5], True),
    (-1, [], True),
    (100, [], True),
    ([99, 100, 5], [99, 5], True),
    (10**30, [], True),
    (float("nan"), [], True),
    (float("inf"), [], True),
    ([[5]], [], True),
    ([[5], 7], [7], True),
    ({"id": 5}, [], True),
]


@pytest.mark.parametrize(("value", "usable", "is_told"), IDS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_ids(file: str, value: Any, usable: list, is_told: bool, tmp_path: Path, caplog: Any) -> None:
    if file == "config.json":
        path = write(tmp_path, {"eos_token_id": 9}, eos_token_id=value)
        expected = (*usable, 9)
    else:
        path = write(tmp_path, {"eos_token_id": value})
        expected = (2, *usable)
    assert ModelConfig.from_pretrained(path).eos_token_ids == expected
    told = [record.getMessage() for record in caplog.records if record.name.startswith("rtp_llm")]
    assert len(told) == is_told
    assert not is_told or (f"`eos_token_id` in {tmp_path}/{file}: left out" in told[0] and len(told[0]) < 400)


@pytest.mark.parametrize(("value", "usable", "is_told"), IDS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_the_first_id(file: str, value: Any, usable: list, is_told: bool, tmp_path: Path, caplog: Any) -> None:
    if file == "config.json":
        path = write(tmp_path, {"bos_token_id": 9}, bos_token_id=value)
        expected = usable[0] if usable else 9
    else:
        path = write(tmp_path, {"bos_token_id": value}, bos_token_id=None)
        expected = usable[0] if usable else None
    assert ModelConfig.from_pretrained(path).bos_token_id == expected
    assert ("`bos_token_id`" in caplog.text) == is_told


def test_ids_are_of_the_vocabulary_that_the_model_has_by_default(tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path, {}, vocab_size=None, eos_token_id=[3, 32000])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vocab_size"]  # 32000 is what transformers takes then
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelConfig.from_pretrained(path).eos_token_ids == (3,)
    assert sum("`eos_token_id`" in record.getMessage() for record in caplog.records if "rtp" in record.name) == 1


def test_ids_of_a_language_part(tmp_path: Path, caplog: Any) -> None:
    text = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "eos_token_id": ["a", 4], "bos_token_id": "b"}
    path = write(tmp_path, {}, model_type="llava", text_config=text, eos_token_id=None, bos_token_id=None)
    config = ModelConfig.from_pretrained(path)
    assert (config.eos_token_ids, config.bos_token_id) == ((4,), None)
    assert caplog.text.count("`text_config` of") == 2


def test_ids_without_a_known_vocabulary() -> None:
    assert usable_token_ids([0, 10**9, -1], None, "here") == [0, 10**9]
