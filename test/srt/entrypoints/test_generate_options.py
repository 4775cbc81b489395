"""The options of a call: declared once, shown by every signature, and given to the description by name."""

import inspect
from dataclasses import fields
from typing import Any

import pytest

from rtp_llm.srt.entrypoints.engine import Engine
from rtp_llm.srt.entrypoints.native import GenerateBody
from rtp_llm.srt.entrypoints.openai.base import SAMPLING_FIELDS
from rtp_llm.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from rtp_llm.srt.entrypoints.serving import options_of
from rtp_llm.srt.managers.generate_options import OPTION_NAMES, check_names
from rtp_llm.srt.sampling_params import SamplingParams


@pytest.mark.parametrize("method", [Engine.generate, Engine.async_generate])
def test_a_signature_shows_each_option_by_name(method: Any) -> None:
    parameters = inspect.signature(method).parameters
    assert list(parameters) == ["self", "prompt", "sampling_params", "input_ids", "stream", *OPTION_NAMES]
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OPTION_NAMES)
    assert all(parameters[name].default is None for name in OPTION_NAMES)
    inspect.signature(method).bind(None, "text", {"n": 2}, None, True, rid="r", top_logprobs_num=3)


def test_the_documentation_shows_what_each_option_is() -> None:
    text = inspect.getdoc(Engine.generate) or ""
    arguments = text[text.index("Args:") : text.index("Returns:")]
    for name in ("sampling_params", "stream", *OPTION_NAMES):
        assert f"\n    {name}: " in arguments, name
    assert "\n    options:" not in arguments


def test_a_keyword_that_is_no_option_is_an_error_that_names_the_options() -> None:
    check_names(dict.fromkeys(OPTION_NAMES))
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'top_logprobs'.*'top_logprobs_num'"):
        check_names({"top_logprobs": 3})


def test_the_server_takes_every_option_by_its_name() -> None:
    assert set(OPTION_NAMES) <= GenerateBody.model_fields.keys()
    given = {"rid": "r", "top_logprobs_num": 2, "return_logprob": True, "image_data": ["u"]}
    body = GenerateBody(text="x", cache_salt=None, **given)
    assert options_of(body) == {**given, "return_text_in_logprobs": False}
    chat = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], rid="r", priority=3)
    assert options_of(chat) == {"rid": "r", "priority": 3}


def test_openai_bodies_hand_on_every_sampling_parameter_but_two_lengths_and_ids_of_words() -> None:
    missing = {item.name for item in fields(SamplingParams)} - set(SAMPLING_FIELDS)
    assert missing == {"max_new_tokens", "min_new_tokens", "bad_words_ids"}
    assert {"max_tokens", "min_tokens", "bad_words"} <= CompletionRequest.model_fields.keys()
