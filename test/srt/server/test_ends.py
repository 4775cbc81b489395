"""A text ends where the model ends it, and where it was told to: through the offline API and the server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rtp_llm import Engine
from rtp_llm.srt.checkpoint import read_end_tokens, read_model_config, read_tokenizer
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.entrypoints.http_server import _summary
from tiny_server import InProcess, in_process, make_checkpoint

PROMPT = "the cat"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One whose configuration names another end than its tokenizer and its chat template, which say <|end|>, id 0."""
    folder = tmp_path_factory.mktemp("ends")
    make_checkpoint(folder)
    for name in ("config.json", "generation_config.json"):
        path = Path(folder, name)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 9}))
    return str(folder)


@pytest.fixture(scope="module")
def server(checkpoint: str) -> Iterator[InProcess]:
    with in_process(checkpoint) as running:
        yield running


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Iterator[Engine]:
    with Engine(model_path=checkpoint, device="cpu", max_total_tokens=1024) as running:
        yield running


def native(server: InProcess, **params: Any) -> dict[str, Any]:
    return httpx.post(f"{server.url}/generate", json={"text": PROMPT, "sampling_params": params}, timeout=60).json()


@pytest.mark.parametrize("token_id", [0, 9])
def test_every_end_counts(server: InProcess, engine: Engine, token_id: int) -> None:
    params = {"max_new_tokens": 6, "logit_bias": {str(token_id): 100}}
    for run in (lambda **p: native(server, **p), lambda **p: engine.generate(PROMPT, p)):
        ended = run(**params)["meta_info"]
        assert (ended["finish_reason"], ended["completion_tokens"]) == ({"type": "stop", "matched": token_id}, 1)
        assert run(**params, ignore_eos=True)["output_ids"] == [token_id] * 6
        late = run(**params, min_new_tokens=3)["output_ids"]
        assert len(late) == 4 and late[-1] == token_id and token_id not in late[:3]


def test_who_ends_a_text_is_told(server: InProcess, engine: Engine) -> None:
    told = httpx.get(f"{server.url}/model_info").json()["end_tokens"]
    assert told == engine.info["end_tokens"]
    assert [(token["id"], token["sources"]) for token in told] == [
        (9, ["config"]),
        (0, ["tokenizer", "chat template"]),
    ]


def test_the_summary_at_the_start_tells_it_too(server: InProcess, checkpoint: str) -> None:
    args = ServerArgs(model_path=checkpoint)
    config = read_model_config(args)
    ends = read_end_tokens(args, config, read_tokenizer(args, config))
    lines = _summary(args, config, server.core, server.url, 1.0, ends).splitlines()
    assert lines[-1].endswith("(9: config), <|end|> (0: tokenizer, chat template)")
    assert "none" in _summary(args, config, server.core, server.url, 1.0, ()).splitlines()[-1]


def test_a_special_token_is_a_stop_string(server: InProcess, engine: Engine) -> None:
    params = {"max_new_tokens": 6, "logit_bias": {"1": 100}, "stop": "<|user|>"}
    for result in (native(server, **params), engine.generate(PROMPT, params)):
        assert (result["text"], result["output_ids"]) == ("", [])
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": "<|user|>"}


@pytest.mark.parametrize("option", ["include_stop_str_in_output", "no_stop_trim"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_string_stays_if_asked(server: InProcess, option: str, stream: bool) -> None:
    free = native(server, max_new_tokens=12, temperature=0, ignore_eos=True)["text"]
    stop = free[4:6]
    cut = free[: free.index(stop)]
    body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "stop": stop, "stream": stream}
    for extra, text in (({}, cut), ({option: True}, cut + stop)):
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT} | body | extra, timeout=60)
        assert text_of(answer, stream) == text
    chat = {"messages": [{"role": "user", "content": PROMPT}]} | body
    url = f"{server.url}/v1/chat/completions"
    whole = text_of(httpx.post(url, json=chat | {"stop": []}, timeout=60), stream)
    chat["stop"] = whole[3:5]
    answer = text_of(httpx.post(url, json=chat | {option: True}, timeout=60), stream)
    assert answer == whole[: whole.index(whole[3:5])] + whole[3:5]


def text_of(response: httpx.Response, stream: bool) -> str:
    assert response.status_code == 200, response.text
    if not stream:
        (choice,) = response.json()["choices"]
        return choice["text"] if "text" in choice else choice["message"]["content"]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)
