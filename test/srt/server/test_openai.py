"""The official client against a server in its own process: every parameter that the documentation names."""

import math
from typing import Any

import httpx
import openai
import pytest

from tiny_server import Process

pytestmark = pytest.mark.xdist_group("server-process")

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "seed": 1}
FREE = GREEDY | {"extra_body": {"ignore_eos": True}}
USER = [{"role": "user", "content": "the cat"}]


def complete(client: openai.OpenAI, prompt: Any = "the cat sat", **options: Any) -> Any:
    return client.completions.create(**(FREE | {"prompt": prompt} | options))


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**(FREE | {"messages": USER, "max_completion_tokens": 12} | options))


def test_a_completion_is_complete(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny"
    assert answer.created > 1.7e9
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.usage.completion_tokens == 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16
    assert complete(client).usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1


def test_an_answer_is_complete(client: openai.OpenAI) -> None:
    answer = chat(client, max_completion_tokens=5)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content and choice.message.tool_calls is None
    assert answer.usage.completion_tokens == 5


def test_prompts_of_all_kinds(client: openai.OpenAI) -> None:
    ids = [40, 41, 42]
    texts = complete(client, ["the cat", "a dog"]).choices
    assert [choice.index for choice in texts] == [0, 1]
    assert texts[1].text == complete(client, "a dog").choices[0].text
    assert complete(client, [ids, [50]]).choices[0].text == complete(client, ids).choices[0].text


def test_lengths(client: openai.OpenAI) -> None:
    assert complete(client, max_tokens=3).usage.completion_tokens == 3
    assert complete(client, max_tokens=0).choices[0].text == ""
    assert chat(client, max_completion_tokens=None, max_tokens=4).usage.completion_tokens == 4
    whole = client.chat.completions.create(**FREE, messages=USER)
    assert whole.usage.total_tokens == 512  # the room left
    eos = complete(client, extra_body={"logit_bias": {"0": 100}, "min_tokens": 6})
    assert eos.usage.completion_tokens >= 6


def test_several_choices(client: openai.OpenAI) -> None:
    answer = complete(client, ["the cat", "a dog"], n=3, temperature=1.5, max_tokens=8)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens == 48
    again = complete(client, ["the cat", "a dog"], n=3, temperature=1.5, max_tokens=8)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    assert complete(client, n=2, best_of=2).choices[1].text


def test_sampling_parameters_take_effect(client: openai.OpenAI) -> None:
    base = complete(client).choices[0].text
    hot = {"temperature": 1.5}
    drawn = complete(client, **hot, seed=5).choices[0].text
    assert drawn == complete(client, **hot, seed=5).choices[0].text != complete(client, **hot, seed=6).choices[0].text
    for narrow in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1, "ignore_eos": True}}):
        assert complete(client, **hot, **narrow).choices[0].text == base
    assert complete(client, **hot, extra_body={"min_p": 1.0, "ignore_eos": True}).choices[0].text == base
    assert complete(client, logit_bias={"70": 100}, max_tokens=3).usage.completion_tokens == 3
    biased = complete(client, logit_bias={"70": 100}, max_tokens=3, logprobs=0).choices[0].logprobs
    assert len(set(biased.tokens)) == 1
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        penalised = complete(client, logit_bias={"70": 3.0}, max_tokens=40, **penalty).choices[0].text
        assert penalised != complete(client, logit_bias={"70": 3.0}, max_tokens=40).choices[0].text
    repeated = complete(client, max_tokens=40, extra_body={"repetition_penalty": 3.0, "ignore_eos": True})
    assert repeated.choices[0].text != complete(client, max_tokens=40).choices[0].text


def test_stops(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=30).choices[0].text
    stop = text[5:7]
    answer = complete(client, max_tokens=30, stop=["never there", stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 30
    by_id = complete(client, max_tokens=30, extra_body={"stop_token_ids": list(range(300))})
    assert (by_id.choices[0].finish_reason, by_id.usage.completion_tokens) == ("stop", 1)


def test_ends_of_sequence(client: openai.OpenAI) -> None:
    """Token 0 is <|end|>."""
    forced = {"logit_bias": {"0": 100}, "max_tokens": 4}
    ended = client.completions.create(**GREEDY, prompt="the cat", **forced)
    assert (ended.choices[0].finish_reason, ended.choices[0].text) == ("stop", "")
    ignored = complete(client, **forced, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert ignored.choices[0].text == "<|end|>" * 4


def test_chat_logprobs(client: openai.OpenAI) -> None:
    [choice] = chat(client, logprobs=True, top_logprobs=3).choices
    content = choice.logprobs.content
    assert len(content) == 12
    assert b"".join(bytes(item.bytes) for item in content).decode(errors="replace") == choice.message.content
    for item in content:
        tops = [top.logprob for top in item.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True) and tops[0] == item.logprob <= 0
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    """As lm-eval asks for them: the prompt's own log-probabilities, and which of its tokens are the likeliest."""
    answer = complete(client, "the cat sat", echo=True, logprobs=2, max_tokens=4)
    [choice] = answer.choices
    assert choice.text.startswith("the cat sat")
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == answer.usage.total_tokens
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    for token, logprob, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[
        1:
    ]:
        assert math.isclose(top[token], logprob) and len(top) in (2, 3)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    assert all(
        token == max(top, key=top.get)
        for token, top in zip(logprobs.tokens[-4:], logprobs.top_logprobs[-4:], strict=True)
    )
    prompt_only = complete(client, "the cat sat", echo=True, logprobs=2, max_tokens=0).choices[0]
    assert prompt_only.text == "the cat sat"
    assert prompt_only.logprobs.token_logprobs == pytest.approx(logprobs.token_logprobs[:-4], nan_ok=True, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 1.0}, {"logprobs": 2}, {"echo": True, "logprobs": 1}])
def test_streamed_completions_are_the_same(client: openai.OpenAI, options: dict[str, Any]) -> None:
    whole = complete(client, max_tokens=24, **options)
    chunks = list(complete(client, max_tokens=24, **options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
        assert parts[-1].text == "" and parts[-1].logprobs is None
        if choice.logprobs is not None:
            told = parts[:-1]
            assert [token for part in told for token in part.logprobs.tokens] == choice.logprobs.tokens
            logprobs = [value for part in told for value in part.logprobs.token_logprobs]
            assert logprobs == choice.logprobs.token_logprobs


def test_streamed_answers_are_the_same(client: openai.OpenAI) -> None:
    whole = chat(client, n=2, temperature=1.0, logprobs=True)
    chunks = list(chat(client, n=2, temperature=1.0, logprobs=True, stream=True))
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert [part.delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert sum(len(part.logprobs.content) for part in parts if part.logprobs) == len(choice.logprobs.content)
        first, *middle, last = parts
        assert (first.delta.content, first.finish_reason, first.logprobs) == ("", None, None)
        assert all(part.delta.content is not None and part.finish_reason is None for part in middle)
        assert (last.delta.content, last.delta.role, last.finish_reason) == (None, None, choice.finish_reason)


def test_an_empty_answer_has_role_and_finish_reason(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, max_completion_tokens=0))
    deltas = [(c.delta.role, c.delta.content, c.finish_reason) for chunk in chunks for c in chunk.choices]
    assert deltas == [("assistant", "", None), (None, None, "length")]


def test_fields_that_clients_read(client: openai.OpenAI) -> None:
    whole, chunks = chat(client, logprobs=True), list(chat(client, stream=True))
    assert whole.system_fingerprint.startswith("fp_")
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    assert complete(client).system_fingerprint == whole.system_fingerprint
    assert whole.usage.completion_tokens_details.reasoning_tokens == 0
    assert whole.choices[0].logprobs.refusal is None and "refusal" in whole.choices[0].logprobs.model_fields_set


def test_usage_in_every_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 12


def test_streams_stop_as_answers_do(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=30).choices[0].text
    stop = text[8:11]
    whole = complete(client, max_tokens=30, stop=stop, logprobs=0)
    chunks = list(complete(client, max_tokens=30, stop=stop, logprobs=0, stream=True))
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == whole.choices[0].text
    tokens = [token for chunk in chunks for c in chunk.choices if c.logprobs for token in c.logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens


def test_bad_words_and_allowed_ids(client: openai.OpenAI, server_process: Process) -> None:
    options = {"max_tokens": 24, "extra_body": {"ignore_eos": True}}
    text = complete(client, **options).choices[0].text
    words = sorted({word for word in text.split() if word.isalpha()})[:3]
    assert words
    without = complete(client, max_tokens=24, extra_body={"ignore_eos": True, "bad_words": words}).choices[0].text
    assert without != text and not any(word in without.split() for word in words)
    body = {"text": "the cat", "sampling_params": {"max_new_tokens": 24, "allowed_token_ids": [40, 41, 42], "seed": 1}}
    ids = httpx.post(f"{server_process.url}/generate", json=body).json()["output_ids"]
    assert len(ids) == 24 and set(ids) <= {40, 41, 42}


def test_templates(client: openai.OpenAI) -> None:
    plain = chat(client).usage.prompt_tokens
    with_variable = chat(client, extra_body={"chat_template_kwargs": {"suffix": " hello"}})
    assert with_variable.usage.prompt_tokens > plain
    assert chat(client, extra_body={"add_generation_prompt": False}).usage.prompt_tokens == plain - 1
    turns = [*USER, {"role": "assistant", "content": "the dog"}]
    continued = chat(client, messages=turns, extra_body={"continue_final_message": True})
    prompt = "<|user|>the cat<|end|><|assistant|>the dog"
    assert continued.usage.prompt_tokens == complete(client, prompt, max_tokens=1).usage.prompt_tokens
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    assert chat(client, messages=parts).usage.prompt_tokens == plain


def test_cache_salts_keep_prefixes_apart(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        answer = complete(client, "hello hello world the cat", extra_body={"cache_salt": salt})
        return answer.usage.prompt_tokens_details.cached_tokens

    assert (cached("a"), cached("b")) == (0, 0)
    assert cached("a") > 0


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


def test_aborts(client: openai.OpenAI, server_process: Process) -> None:
    """By /abort_request: the stream ends with what there was."""
    with complete(client, max_tokens=480, stream=True, extra_body={"ignore_eos": True, "rid": "mine"}) as stream:
        next(iter(stream))
        done = httpx.post(f"{server_process.url}/abort_request", json={"rid": "mine"})
        assert done.json()["success"]
        assert list(stream)[-1].choices[0].finish_reason == "abort"


@pytest.mark.parametrize(
    ("options", "words", "param"),
    [
        ({"suffix": "end"}, "suffix is not supported", "suffix"),
        ({"best_of": 3}, "best_of is not supported", "best_of"),
        ({"max_tokens": 600}, "max_tokens is 600, but the prompt of", "max_tokens"),
        ({"prompt": "cat " * 600}, "more than the context length of 512", "prompt"),
        ({"prompt": ""}, "prompt is empty", "prompt"),
        ({"prompt": ["cat", ""]}, "prompt 1: prompt is empty", "prompt"),
        ({"prompt": [9999]}, "token id 9999, outside the vocabulary", "prompt"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"n": 0}, "n: ", "n"),
        ({"stop": ["x"] * 33}, "stop has 33 strings; at most 32", "stop"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias", "logit_bias"),
        ({"logprobs": 21}, "logprobs", "logprobs"),
        (
            {"extra_body": {"min_tokens": 20, "max_tokens": 4}},
            "min_tokens (20) is larger than max_tokens (4)",
            "min_tokens",
        ),
        ({"extra_body": {"temprature": 1}}, "unknown field 'temprature'", "temprature"),
    ],
)
def test_bad_requests(client: openai.OpenAI, options: dict[str, Any], words: str, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **options)
    assert words in caught.value.message
    assert caught.value.param == param or param is None
    assert caught.value.type == "invalid_request_error"


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        complete(client, model="gpt-4")
