"""SamplingParams: what is accepted, what is refused, and in which words."""

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import sampling_parameters

from rtp_llm.srt.sampling_params import MAX_STOP_CHARS, MAX_STOP_STRINGS, InvalidRequest, SamplingParams


def test_values_are_normalised() -> None:
    params = SamplingParams.from_dict({"stop": "END", "logit_bias": {"7": 1, 8: -2.5}, "temperature": 1, "top_k": 0})
    assert params.stop == ["END"]
    assert params.logit_bias == {7: 1.0, 8: -2.5}
    assert isinstance(params.temperature, float)
    assert SamplingParams().stop is not SamplingParams().stop


def test_pickles() -> None:
    params = SamplingParams(stop=["a"], logit_bias={3: 1.0}, seed=2**64 - 1)
    assert pickle.loads(pickle.dumps(params)) == params
    error = pickle.loads(pickle.dumps(InvalidRequest("wrong", "top_p")))
    assert (str(error), error.param) == ("wrong", "top_p")


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", True),
        ("max_new_tokens", 1.0),
        ("max_new_tokens", "12"),
        ("min_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", -0.01),
        ("top_k", 2**63),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", math.inf),
        ("logit_bias", [1]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {1.5: 1}),
        ("logit_bias", {True: 1}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: "1"}),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ""),
        ("stop", ["a", 1]),
        ("stop", ["a"] * (MAX_STOP_STRINGS + 1)),
        ("stop", ["a", "b" * (MAX_STOP_CHARS + 1)]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("ignore_eos", 1),
        ("include_stop_str_in_output", 1),
        ("no_stop_trim", "true"),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", 1.5),
        ("n", 0),
        ("n", 10**9),
        ("n", True),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams.from_dict({name: value})
    assert caught.value.param == name
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1, "min_new_tokens": 1},
        {"top_k": -1},
        {"top_p": 1, "min_p": 1},
        {"top_p": 0},
        {"min_new_tokens": None, "skip_special_tokens": None},  # null is no value
        {"frequency_penalty": -2, "presence_penalty": 2, "repetition_penalty": 3.5},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
        {"stop": None, "logit_bias": None},
        {"stop": ("a", "b"), "stop_token_ids": (1, 2)},
        {"stop": ["a" * MAX_STOP_CHARS] * MAX_STOP_STRINGS},
    ],
)
def test_bounds_are_accepted(values: dict[str, Any]) -> None:
    SamplingParams.from_dict(values)


def test_a_stop_string_that_is_too_long_names_the_limit() -> None:
    with pytest.raises(InvalidRequest, match=rf"stop\[1\] has 5000 characters; at most {MAX_STOP_CHARS} are allowed"):
        SamplingParams(stop=["a", "b" * 5000])


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "no_stop_trim"])
def test_two_names_of_one_option(name: str) -> None:
    assert SamplingParams.from_dict({name: True}).include_stop_str_in_output
    assert not SamplingParams.from_dict({name: False}).include_stop_str_in_output


def test_min_above_max() -> None:
    with pytest.raises(InvalidRequest, match=r"min_new_tokens \(5\).*max_new_tokens \(4\)"):
        SamplingParams(max_new_tokens=4, min_new_tokens=5)


def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(InvalidRequest, match=r"'top_pp'.*did you mean 'top_p'\?.*temperature"):
        SamplingParams.from_dict({"top_pp": 1})
    with pytest.raises(InvalidRequest, match="object of named values"):
        SamplingParams.from_dict([("top_p", 1)])  # type: ignore[arg-type]


def test_ids_lie_in_the_vocabulary() -> None:
    SamplingParams(stop_token_ids=[0, 99], logit_bias={99: 1.0}).validate(100)
    for params in (SamplingParams(stop_token_ids=[3, 100]), SamplingParams(logit_bias={100: 1.0})):
        with pytest.raises(InvalidRequest, match=r"100.*vocabulary of 100 tokens"):
            params.validate(100)
    with pytest.raises(InvalidRequest, match="-1"):
        SamplingParams(stop_token_ids=[-1]).validate(100)


def test_greedy() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(top_k=1).is_greedy
    assert not SamplingParams().is_greedy


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "sampling_parameters.md"
    assert page.read_text() == sampling_parameters.page(), "run scripts/sampling_parameters.py"
