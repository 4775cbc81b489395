"""What ``options``, ``format`` and ``keep_alive`` mean here."""

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from rtp_llm.srt.entrypoints.ollama.options import most_new, sampling_params
from rtp_llm.srt.entrypoints.ollama.protocol import AskingBody, Options
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams

WINDOWED = [{"repeat_penalty": 1.1}, {"presence_penalty": 1}, {"frequency_penalty": -1.0}]
# How the program runs, which is decided at its start.
OF_THE_START = {"num_batch": 512, "num_gpu": -1, "main_gpu": 0, "num_thread": 8, "numa": True, "low_vram": False} | {
    "f16_kv": True,
    "use_mmap": True,
    "use_mlock": False,
    "num_keep": 4,
}
NEUTRAL = {"mirostat": 0, "mirostat_tau": 4.0, "mirostat_eta": 0.2, "tfs_z": 1.0, "typical_p": 1, "vocab_only": False}


def params(options: dict[str, Any] | None, defaults: dict[str, Any] | None = None, **fields: Any) -> SamplingParams:
    manager = SimpleNamespace(context_length=4096, max_req_len=2048)
    serving: Any = SimpleNamespace(manager=manager, sampling_defaults=defaults or {})
    return sampling_params(serving, AskingBody.model_validate({"options": options, **fields}))


def test_what_is_asked_for() -> None:
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 7, "stop": ["a", "b"]}
    penalties = {"repeat_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repeat_last_n": -1}
    ours = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    assert params(options | penalties) == SamplingParams(**options, **ours)
    assert params({"stop": "a"}).stop == ["a"]


def test_what_is_left_out_is_the_checkpoints() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    assert params(None, defaults) == SamplingParams(**defaults)
    assert params({"temperature": 0, "seed": -1}, defaults) == SamplingParams(temperature=0, top_k=20)


@pytest.mark.parametrize(("asked", "most"), [(None, None), (-1, None), (-2, None), (0, 0), (5, 5)])
def test_the_length(asked: int | None, most: int | None) -> None:
    assert most_new(Options.model_validate({"num_predict": asked})) == most
    assert most_new(None) is None


def test_what_changes_nothing() -> None:
    assert params(OF_THE_START | NEUTRAL | {"num_ctx": 2048, "repeat_last_n": 64}) == SamplingParams()
    assert params({"penalize_newline": True, "repeat_penalty": 1.1}).repetition_penalty == 1.1
    assert params({"penalize_newline": False, "repeat_penalty": 1.0}) == SamplingParams()


def test_penalties_that_look_at_nothing() -> None:
    for penalty in WINDOWED:
        assert params(penalty | {"repeat_last_n": 0}, {"repetition_penalty": 1.3}) == SamplingParams()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *((penalty | {"repeat_last_n": 64}, "options.repeat_last_n is 64") for penalty in WINDOWED),
        ({"penalize_newline": False, "repeat_penalty": 1.1}, "options.penalize_newline"),
        ({"num_ctx": 2049}, "options.num_ctx is 2049, and a request may have 2048 tokens here"),
        ({"stop": ["x"] * 33}, "stop has 33 strings"),
    ],
)
def test_what_cannot_be_done(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        params(options)


def test_a_window_over_a_penalty_of_the_checkpoint() -> None:
    with pytest.raises(InvalidRequest, match="repeat_last_n"):
        params({"repeat_last_n": 64}, {"repetition_penalty": 1.1})


def invalid(**fields: Any) -> str:
    with pytest.raises((ValidationError, InvalidRequest)) as caught:
        AskingBody.model_validate(fields)
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"mirostat": 1}, {"typical_p": 0.7}, {"tfs_z": 0.5}, {"temprature": 1}, {"num_predict": -3}, {"top_k": 1.5},
     {"temperature": "1"}, {"min_p": 2}, {"repeat_penalty": 0}, {"repeat_last_n": -2}, {"logits_all": True}],
)  # fmt: skip
def test_options_that_are_refused(options: dict[str, Any]) -> None:
    assert next(iter(options)) in invalid(options=options)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_formats() -> None:
    assert params(None, format="json").response_format == {"type": "json_object"}
    assert params(None, format=SCHEMA).json_schema == SCHEMA
    for nothing in ("", None, {}):
        assert params(None, format=nothing) == SamplingParams()
    assert "format must be 'json' or a JSON schema" in invalid(format="xml")


@pytest.mark.parametrize("value", [0, -1, 5, 0.5, "5m", "1h30m", "-1m", "300ms", "1.5h", ".5s", "0", "0s", "+1µs"])
def test_keep_alive(value: Any) -> None:
    body = AskingBody.model_validate({"keep_alive": value})
    assert body.unloads == (value in (0, "0", "0s"))


@pytest.mark.parametrize("value", ["", "5", "5 m", "m", "1d", "-", "5m.", "forever", "1h-5m"])
def test_what_is_no_duration(value: str) -> None:
    assert "keep_alive must be a number of seconds or a duration" in invalid(keep_alive=value)


def test_log_probabilities() -> None:
    assert "top_logprobs is only for logprobs=true" in invalid(top_logprobs=3)
    assert "top_logprobs" in invalid(logprobs=True, top_logprobs=21)
