"""Prompts and options become requests, or errors that name what is wrong."""

from pathlib import Path
from typing import Any

import pytest
from transformers import configuration_utils

from rtp_llm.srt.managers.tokenizer_manager import Prompt, TokenizerError, TokenizerManager, load_tokenizer
from rtp_llm.srt.request_spec import LogprobSpec
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams


class CharTokenizer:
    """One id per character."""

    all_special_ids: list[int] = []
    added_tokens_decoder: dict[int, Any] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def manager(**kwargs: Any) -> TokenizerManager:
    options = {"vocab_size": 1000, "context_length": 20, "max_req_len": 20, "random_seed": 1} | kwargs
    return TokenizerManager(CharTokenizer(), **options)


def asked(text: str, **options: Any) -> Prompt:
    return Prompt(text, options=options)


def test_a_request() -> None:
    (request,) = manager().requests(
        Prompt("abc", sampling_params={"max_new_tokens": 5, "seed": 9}, options={"rid": "r", "cache_salt": "s"})
    )
    assert (request.rid, request.prompt_ids, request.spec.seed, request.spec.cache_salt) == ("r", [97, 98, 99], 9, "s")
    assert request.spec.logprobs is None and request.spec.max_new_tokens == 5


def test_ids_pass_as_they_are() -> None:
    (request,) = manager().requests(Prompt(input_ids=(5, 999)))
    assert request.prompt_ids == [5, 999]
    assert len(request.rid) == 32


def test_several_completions_have_consecutive_seeds() -> None:
    requests = manager().requests(Prompt("a", sampling_params={"n": 3, "seed": 2**64 - 2}, options={"rid": "r"}))
    assert [request.spec.seed for request in requests] == [2**64 - 2, 2**64 - 1, 0]
    assert [request.rid for request in requests] == ["r-0", "r-1", "r-2"]
    (negative,) = manager().requests(Prompt("a", sampling_params={"seed": -1}))
    assert negative.spec.seed == 2**64 - 1


def test_random_seeds_are_reproducible() -> None:
    def seeds(random_seed: int | None) -> list[int]:
        tokenizer_manager = manager(random_seed=random_seed)
        return [tokenizer_manager.requests(Prompt("a"))[0].spec.seed for _ in range(3)]

    assert seeds(4) == seeds(4)
    assert len({*seeds(4), *seeds(5), *seeds(None), *seeds(None)}) == 12


@pytest.mark.parametrize(
    ("prompt_len", "params", "default", "expected"),
    [
        (1, {}, 128, 128),
        (150, {}, 128, 50),
        (100, {"min_new_tokens": 99}, 128, 100),
        (9, {"max_new_tokens": 0}, 128, 0),
        (150, {}, 16, 16),
        (150, {"min_new_tokens": 20}, 16, 20),
        (190, {}, 16, 10),
        (1, {}, None, 199),
        (1, {"max_new_tokens": 7}, None, 7),
        (1, {"min_new_tokens": 7}, None, 199),
    ],
)
def test_default_length(prompt_len: int, params: dict[str, int], default: int | None, expected: int) -> None:
    tokenizer_manager = manager(context_length=200, max_req_len=200)
    prompt = Prompt("a" * prompt_len, sampling_params=params, default_max_new_tokens=default)
    (request,) = tokenizer_manager.requests(prompt)
    assert request.spec.max_new_tokens == expected


def test_the_callers_params_stay_as_they_are() -> None:
    params = SamplingParams()
    manager().requests(Prompt("a", sampling_params=params))
    assert params.max_new_tokens is None


@pytest.mark.parametrize(
    "prompt, param, words",
    [
        (Prompt(""), "prompt", "empty"),
        (Prompt(input_ids=[]), "input_ids", "empty"),
        (Prompt(5), "prompt", "must be a string, not int"),
        (Prompt("a\ud800"), "prompt", "character 1 is the lone surrogate"),
        (Prompt("中"), "prompt", "20013.*vocabulary of 1000"),
        (Prompt(input_ids="abc"), "input_ids", "list of token ids"),
        (Prompt(input_ids=[1, True]), "input_ids", r"input_ids\[1\] must be an integer, not bool"),
        (Prompt(input_ids=[1.0]), "input_ids", "not float"),
        (Prompt(input_ids=[1, 1000]), "input_ids", "1000, outside the vocabulary of 1000"),
        (Prompt(input_ids=[-1]), "input_ids", "-1, outside"),
        (Prompt("a" * 21), "prompt", "21 tokens, more than the context length of 20"),
        (Prompt("a" * 20), "prompt", "20 tokens and leaves no room.*20 tokens, the context length"),
        (Prompt("a" * 15, sampling_params={"max_new_tokens": 6}), "max_new_tokens", "is 6, but.*15 tokens.*room for 5"),
        (Prompt("a" * 15, sampling_params={"min_new_tokens": 6}), "min_new_tokens", "is 6, but.*room for 5"),
        (Prompt("a", sampling_params=[{}]), "sampling_params", "must be a dict"),
        (Prompt("a", sampling_params={"temp": 1}), "temp", "unknown"),
        (Prompt("a", sampling_params={"stop_token_ids": [1000]}), "stop_token_ids", "1000"),
        (asked("a", rid=""), "rid", "empty"),
        (asked("a", rid=5), "rid", "string"),
        (asked("a", cache_salt=5), "cache_salt", "string"),
        (asked("a", return_logprob=1), "return_logprob", "true or false"),
        (asked("a", return_logprob=True, logprob_start_len=-2), "logprob_start_len", "between -1 and 1"),
        (asked("a", return_logprob=True, logprob_start_len=2), "logprob_start_len", "between -1 and 1"),
        (asked("a", return_logprob=True, logprob_start_len=True), "logprob_start_len", "integer"),
        (asked("a", return_logprob=True, top_logprobs_num=1001), "top_logprobs_num", "between 0 and 1000"),
        (asked("a", return_logprob=True, top_logprobs_num=-1), "top_logprobs_num", "between 0 and 1000"),
        (asked("a", return_logprob=True, token_ids_logprob=[1000]), "token_ids_logprob", "1000"),
        (asked("a", return_logprob=True, token_ids_logprob=3), "token_ids_logprob", "list"),
        (asked("a", top_logprobs_num=1), "top_logprobs_num", "set return_logprob"),
        (asked("a", logprob_start_len=0), "logprob_start_len", "set return_logprob"),
        (asked("a", token_ids_logprob=[1]), "token_ids_logprob", "set return_logprob"),
        (asked("a", return_text_in_logprobs=True), "return_text_in_logprobs", "set return_logprob"),
    ],
)  # fmt: skip
def test_wrong_prompts_are_refused_by_name(prompt: Prompt, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        manager().requests(prompt)
    assert caught.value.param == param


def test_a_prompt_may_fill_the_context_if_nothing_new_is_wanted() -> None:
    (request,) = manager().requests(Prompt("a" * 20, sampling_params={"max_new_tokens": 0}))
    assert request.spec.max_new_tokens == 0
    with pytest.raises(InvalidRequest, match="12 tokens and leaves no room: a request may have 10"):
        manager(max_req_len=10).requests(Prompt("a" * 12, sampling_params={"max_new_tokens": 0}))


def test_a_small_cache_is_named_as_the_limit() -> None:
    with pytest.raises(InvalidRequest, match=r"12 tokens.*may have 10 tokens, which is what the cache holds.*is 20"):
        manager(max_req_len=10).requests(Prompt("a" * 12))


def test_logprob_options() -> None:
    (request,) = manager().requests(
        Prompt(
            "abc",
            options={
                "return_logprob": True,
                "logprob_start_len": 3,
                "top_logprobs_num": 1000,
                "token_ids_logprob": (1, 2),
            },
        )
    )
    assert request.spec.logprobs == LogprobSpec(3, 1000, (1, 2))
    (request,) = manager().requests(asked("abc", logprob_start_len=-1, top_logprobs_num=0))
    assert request.spec.logprobs is None


def test_bad_words_become_ids_as_they_are_and_after_a_space() -> None:
    params = {"bad_words": ["ab", " c", "ab"], "bad_words_ids": [[7, 8]], "allowed_token_ids": [5, 6]}
    (request,) = manager().requests(Prompt("a", sampling_params=params))
    made = request.spec.params
    assert made.bad_words_ids == [[7, 8], [97, 98], [32, 97, 98], [32, 99]] and made.bad_words == []
    assert made.allowed_token_ids == [5, 6]
    with pytest.raises(InvalidRequest, match="allowed_token_ids has no token that bad_words leaves"):
        manager().requests(Prompt("a", sampling_params={"bad_words": ["b"], "allowed_token_ids": [98]}))
    bare = TokenizerManager(None, vocab_size=10, context_length=20, max_req_len=20)
    with pytest.raises(InvalidRequest, match="bad_words needs a tokenizer"):
        bare.requests(Prompt(input_ids=[1], sampling_params={"bad_words": ["a"]}))


def test_without_a_tokenizer() -> None:
    bare = TokenizerManager(None, vocab_size=10, context_length=20, max_req_len=20)
    (request,) = bare.requests(Prompt(input_ids=[1]))
    assert bare.completion(request).result()["text"] == ""
    with pytest.raises(InvalidRequest, match="give input_ids"):
        bare.requests(Prompt("a"))
    with pytest.raises(InvalidRequest, match="stop strings need a tokenizer"):
        bare.requests(Prompt(input_ids=[1], sampling_params={"stop": "a"}))


def test_special_tokens_are_added_as_transformers_does(data_dir: Path) -> None:
    tokenizer = load_tokenizer(str(data_dir / "models/stories260K-hf"))
    stories = TokenizerManager(tokenizer, vocab_size=512, context_length=512, max_req_len=512)
    assert stories.encode("Once upon") == tokenizer.encode("Once upon") == [1, 403, 407]
    assert stories.requests(Prompt(""))[0].prompt_ids == [1]


@pytest.mark.parametrize("more", ["", ', "auto_map": {"AutoConfig": "configuration_zeta.ZetaConfig"}'])
def test_a_model_type_of_ones_own_is_no_cause_for_alarm(
    more: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers warns, where it has no class for a model type, that the model may be another one."""
    for path in (data_dir / "models/stories260K-hf").glob("tokenizer*"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").write_text('{"model_type": "zeta", "vocab_size": 512' + more + "}")
    warnings: list[str] = []
    monkeypatch.setattr(configuration_utils.logger, "warning", warnings.append)
    assert load_tokenizer(str(tmp_path)).encode("Once upon") == [1, 403, 407]
    assert warnings == []


def test_no_tokenizer_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 8}')
    with pytest.raises(TokenizerError, match=r"cannot load a tokenizer.*tokenizer_path.*skip_tokenizer_init=True"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_no_tokenizer_files_of_any_family(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}", "vocab_size": 8}}')
    with pytest.raises(TokenizerError):
        load_tokenizer(str(tmp_path))


def test_priorities_are_for_servers_that_schedule_by_them():
    taking, other = manager(takes_priorities=True), manager()
    for value in (0, None):
        assert [each.requests(asked("ab", priority=value))[0].spec.priority for each in (taking, other)] == [0, 0]
    for value in (1, -3, 2**63 - 1, -(2**63)):
        assert [r.spec.priority for r in taking.requests(asked("ab", priority=value))] == [value]
        with pytest.raises(InvalidRequest, match="--schedule-policy priority") as caught:
            other.requests(asked("ab", priority=value))
        assert caught.value.param == "priority"
    for value in (1.0, True, False, "1", "", [], 2**63):
        for each in (taking, other):
            with pytest.raises(InvalidRequest, match="priority must be") as caught:
                each.requests(asked("ab", priority=value))
            assert caught.value.param == "priority"
