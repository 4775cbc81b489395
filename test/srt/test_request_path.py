"""A per-request option goes from the API to its reader within the description: nobody between names it.

See "A per-request option" in CONTRIBUTING.md. Who is to read a further option of a description is named here.
"""

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import rtp_llm.srt
from rtp_llm.srt.managers.generate_options import OPTION_NAMES
from rtp_llm.srt.request_spec import LogprobSpec, RequestSpec
from rtp_llm.srt.sampling_params import SamplingParams

SRT = Path(*rtp_llm.srt.__path__)
# The way of a request behind the API models, to the workers and back.
WAY = (
    "entrypoints/engine.py", "entrypoints/frontend.py", "entrypoints/http_server.py", "managers/engine_client.py",
    "messages.py", "utils/*.py", "engine/*.py", "scheduler/*.py", "plan.py", "worker/*.py", "forward_batch.py",
    "managers/detokenizer.py", "managers/completion_text.py",
)  # fmt: skip
READERS = {
    "scheduler/request.py": {  # when it ends, what it shares, which of its tokens are computed
        *("max_new_tokens", "min_new_tokens", "cache_salt", "media", "logprobs", "logprob_start_len"),
        "pooling",
    },
    "scheduler/scheduler.py": {"max_new_tokens", "media", "pooling"},  # whether it can ever be served
    "scheduler/policy.py": {"priority"},
    "engine/executor.py": {"media"},  # files of media live until the step that names them is done
    "engine/ray_executor.py": {"media"},  # which other machines get, too
    "worker/model_runner.py": {"media"},
    "worker/row_state.py": {"logprobs", "top_logprobs_num", "token_ids_logprob"},
    "worker/pooling.py": {"pooling"},
    "worker/worker.py": {"pooling"},
    "worker/sampler.py": {
        *("temperature", "top_p", "top_k", "min_p", "seed", "min_new_tokens", "logit_bias"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("logprobs", "top_logprobs_num", "token_ids_logprob"),
    },
    "worker/adjust_table.py": {"logit_bias", "frequency_penalty", "presence_penalty", "repetition_penalty"},
    "worker/draw_table.py": {"temperature", "top_p", "top_k", "min_p"},
    "worker/token_bans.py": {"bad_words_ids", "allowed_token_ids"},
    "managers/detokenizer.py": {
        *("skip_special_tokens", "return_text_in_logprobs"),
        *("logprobs", "logprob_start_len", "top_logprobs_num", "token_ids_logprob"),
    },
    "managers/completion_text.py": {"stop", "min_new_tokens", "include_stop_str_in_output"},
}
DESCRIBED = {item.name for kind in (SamplingParams, RequestSpec, LogprobSpec) for item in fields(kind)} - {"params"}
OPTIONS = {*OPTION_NAMES, *DESCRIBED} - {"rid"}
# Words that mean other things too: they count where they are read from a description, by whatever name it has.
COMMON_WORDS = {"n", "seed", "stop", "media", "logprobs", "priority"}
DESCRIPTIONS = {"spec", "params", "asked"}


def named_in(source: str) -> set[str]:
    """The options that a module names: as variables, attributes, arguments, or in strings of just a name."""
    return {name for node in ast.walk(ast.parse(source)) for name in _names(node)} & OPTIONS


def _names(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr=name) if owner in DESCRIPTIONS:
            yield name
        case (
            ast.Attribute(attr=name)
            | ast.Name(id=name)
            | ast.arg(arg=name)
            | ast.keyword(arg=str(name))
            | ast.FunctionDef(name=name)
            | ast.Constant(value=str(name))
        ) if name not in COMMON_WORDS:
            yield name


def test_nobody_on_the_way_names_an_option_but_its_readers() -> None:
    paths = [path for pattern in WAY for path in sorted(SRT.glob(pattern))]
    found = {path.relative_to(SRT).as_posix(): named_in(path.read_text()) for path in paths}
    assert {name: options for name, options in found.items() if options} == READERS


@pytest.mark.parametrize(
    ("option", "files"),
    [
        ("bad_words", {"sampling_params.py", "entrypoints/openai/protocol.py", "managers/tokenizer_manager.py"}),
        ("bad_words_ids", {"sampling_params.py", "managers/tokenizer_manager.py", "worker/token_bans.py"}),
        ("allowed_token_ids", {"sampling_params.py", "entrypoints/openai/protocol.py", "worker/token_bans.py"}),
    ],
)
def test_the_files_that_contributing_names_are_all_that_know_an_option(option: str, files: set[str]) -> None:
    """As text: not even a comment elsewhere."""
    found = {path.relative_to(SRT).as_posix() for path in SRT.rglob("*.py") if f"{option}" in words(path.read_text())}
    assert found == files


def words(text: str) -> set[str]:
    return set("".join(char if char.isalnum() or char == "_" else " " for char in text).split())


@pytest.mark.parametrize(
    "source",
    [
        "def f(top_k): pass", "x.top_k", "f(top_k=1)", "top_k = 1", "getattr(x, 'top_k')", "def top_k(): pass",
        "class A:\n    top_k: int = 0", "x.spec.params.top_k",
    ],
)  # fmt: skip
def test_naming_is_seen_however_it_is_done(source: str) -> None:
    assert named_in(source) == {"top_k"}


def test_common_words_count_where_a_description_is_read() -> None:
    assert named_in("self.stop(); result.logprobs; media = state.media; seed = 1") == set()
    assert named_in("admission.spec.media; params.stop; spec.logprobs") == {"media", "stop", "logprobs"}
