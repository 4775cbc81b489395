"""The death of the core as clients of the server see it: their streams pause and go on, and errors are errors."""

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import killer_model
import pytest
from scripted_core import make_random_speaker

from tiny_server import Process, free_port, own_process, python_process, wait_for, words

pytestmark = pytest.mark.xdist_group("server-process")

Ask = tuple[str, dict[str, Any]]  # path and body
KillerServer = Callable[..., AbstractContextManager[Process]]

LENGTH = 300  # tokens per answer
FLOWING = 6  # events after which a stream is in its middle
TIMEOUT_S = 120.0
TOLERANCE = 1e-4  # of log-probabilities
SAMPLED = {"temperature": 0.9, "frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1}
NEVER_DEADLY = {"logit_bias": {str(killer_model.DEADLY_ID): -100.0}}
DEADLY_PROMPT = [5, killer_model.DEADLY_ID]


class Stream:
    """A streamed request, read on a thread of its own."""

    def __init__(self, url: str, ask: Ask) -> None:
        self.events: list[dict[str, Any]] = []
        self.is_flowing = threading.Event()
        self.is_done = False
        self.is_broken = False
        path, body = ask
        self._thread = threading.Thread(target=self._read, args=(url + path, body | {"stream": True}))
        self._thread.start()

    def _read(self, url: str, body: dict[str, Any]) -> None:
        try:
            with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S) as response:
                for line in response.iter_lines():
                    self._take(line)
        except httpx.TransportError:
            self.is_broken = True

    def _take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.is_done = True
        elif line:
            self.events.append(json.loads(line.removeprefix("data: ")))
        if len(self.events) >= FLOWING:
            self.is_flowing.set()

    def wait(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "no end came"

    def answer(self) -> dict[str, Any]:
        """The whole of what was told in pieces, without what differs from run to run."""
        self.wait()
        assert self.is_done and not self.is_broken
        last = self.events[-1]
        assert "error" not in last, last
        if "meta_info" in last:
            meta = {key: value for key, value in last["meta_info"].items() if key not in ("id", "e2e_latency")}
            return last | {"meta_info": meta}
        choices = [choice for event in self.events for choice in event["choices"]]
        logprobs: dict[str, list[Any]] = {}
        for choice in choices:
            for key, values in (choice["logprobs"] or {}).items():
                logprobs.setdefault(key, []).extend(values or [])  # of a refusal there are none
        return {
            "text": "".join(
                choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices
            ),
            "reasoning": "".join(choice.get("delta", {}).get("reasoning_content", "") for choice in choices),
            "calls": calls_of(choices),
            "finish_reasons": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
            "logprobs": logprobs,
            "usage": last["usage"],
        }


def calls_of(choices: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Name and arguments of each call that a stream's deltas tell together. Ids are drawn anew for each answer."""
    calls: list[list[str]] = []
    for part in (part for choice in choices for part in choice.get("delta", {}).get("tool_calls", ())):
        if "id" in part:
            assert part["index"] == len(calls)
            calls.append([part["function"]["name"], ""])
        calls[part["index"]][1] += part["function"]["arguments"]
    return calls


def an_ask(i: int, stop: str | None = None, **sampling: Any) -> Ask:
    """Request ``i``: /generate with the prompt's logprobs, a chat, a completion in turn; half of these with logprobs.

    The salt keeps one from finding another's prompt cached, or its usage would depend on which came first.
    """
    prompt = words(10, seed=i)
    options = {"ignore_eos": True, **sampling} | ({} if stop is None else {"stop": [stop, "never there"]})
    told = i % 2 == 0
    if i % 3 == 0:
        params = options | {"max_new_tokens": LENGTH}
        logprobs: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2 * told}
        return "/generate", {"text": prompt, "sampling_params": params, "cache_salt": f"{i}", **logprobs}
    body = options | {"max_tokens": LENGTH, "cache_salt": f"{i}", "stream_options": {"include_usage": True}}
    if i % 3 == 1:
        logprobs = {"logprobs": True, "top_logprobs": 2} if told else {}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}], **logprobs}
    return "/v1/completions", body | {"prompt": prompt} | ({"logprobs": 2, "echo": True} if told else {})


def greedy_asks(**options: Any) -> list[Ask]:
    return [an_ask(i, temperature=0.0, **options) for i in range(8)]


def sampled_asks(stops: Sequence[str | None]) -> list[Ask]:
    return [an_ask(8 + i, stop, seed=50 + i, **SAMPLED) for i, stop in enumerate(stops)]


def begin(server: Process, asks: Sequence[Ask]) -> list[Stream]:
    flushed = httpx.post(f"{server.url}/flush_cache", timeout=TIMEOUT_S)
    assert flushed.status_code == 200, flushed.text
    return [Stream(server.url, ask) for ask in asks]


def begin_and_wait_for_tokens(server: Process, asks: Sequence[Ask]) -> list[Stream]:
    streams = begin(server, asks)
    for stream in streams:
        assert stream.is_flowing.wait(TIMEOUT_S), stream.events
    return streams


def answers_of(streams: Sequence[Stream]) -> list[dict[str, Any]]:
    return [stream.answer() for stream in streams]


def late_piece(text: str) -> str:
    """A piece of text that comes for the first time in its third quarter."""
    for start in range(len(text) // 2, len(text)):
        piece = text[start : start + 2]
        if piece.isascii() and piece.isprintable() and text.index(piece) == start:
            return piece
    raise AssertionError(f"nothing new comes in the later half of {text!r}")


def assert_same(ours: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, float):
        assert ours == pytest.approx(expected, abs=TOLERANCE), where
    elif isinstance(expected, dict):
        assert ours.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(ours[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(ours) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(ours[i], value, f"{where}[{i}]")
    else:
        assert ours == expected, where


def running_in(folder: Path) -> list[int]:
    """Ids of the processes whose working directory is ``folder``: a server, and all that it started."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except OSError:  # it has ended, or is not ours
            continue
    return found


@pytest.fixture
def killer_server(tiny_checkpoint: str, tmp_path: Path) -> KillerServer:
    """A script that registers a model class of killer_model.py, and serves a checkpoint of that architecture."""

    @contextmanager
    def serve(class_name: str, *preparations: str) -> Iterator[Process]:
        checkpoint, port = tmp_path / "checkpoint", free_port()
        shutil.copytree(tiny_checkpoint, checkpoint)
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": [class_name]}))
        lines = [
            "import killer_model",
            "from rtp_llm.srt.configs.server_args import ServerArgs",
            "from rtp_llm.srt.engine import supervisor",
            "from rtp_llm.srt.entrypoints.http_server import launch_server",
            "from rtp_llm.srt.models.registry import ModelRegistry",
            f"ModelRegistry.models[{class_name!r}] = killer_model.{class_name}",
            *preparations,
            f"args = ServerArgs(model_path={str(checkpoint)!r}, device='cpu', max_total_tokens=4096, port={port})",
            "launch_server(args)",
        ]
        script = tmp_path / "script.py"
        script.write_text("\n".join(lines) + "\n")
        with python_process(tmp_path, [str(script)], port, modules=Path(killer_model.__file__).parent) as running:
            running.wait_ready()
            yield running

    return serve


@pytest.mark.parametrize("num_of_kind", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_a_killed_core_changes_no_answer(tiny_checkpoint: str, tmp_path: Path, num_of_kind: int) -> None:
    with own_process(tmp_path, tiny_checkpoint, "--dtype", "float32", "--max-total-tokens", "8192") as server:
        server.wait_ready()
        texts = [answer["text"] for answer in answers_of(begin(server, sampled_asks([None] * num_of_kind)))]
        asks = [*greedy_asks()[:num_of_kind], *sampled_asks([late_piece(text) for text in texts])]
        undisturbed = answers_of(begin(server, asks))
        for text, answer in zip(texts, undisturbed[num_of_kind:], strict=True):
            assert text.startswith(answer["text"]) and len(text) / 3 < len(answer["text"]) < len(text)
        streams = begin_and_wait_for_tokens(server, asks)
        [core] = server.children()
        os.kill(core, signal.SIGKILL)
        answers = answers_of(streams)
        assert server.children() != [core]
        [live] = re.findall(r"was killed by signal 9 while (\d+) requests were live", server.log.read_text())
        assert 0 < int(live) <= len(asks)  # a fast machine has ended some
        assert_same(answers, undisturbed)


# Longer than the answers, so that no end comes before the core dies; and free text, bound where it says "j".
TAG = {"structures": [{"begin": "j", "schema": {"enum": [12, 345]}, "end": ";"}], "triggers": ["j"]}
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "[a-z ]{3000}[.]"}, "^.*[a-z ]{300}$"),
    ({"structural_tag": TAG}, r"^([^j]|j\s*(12|345)\s*;)*(j[^j;]*)?$"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "pattern"), FORMS, ids=["regex", "tag"])
def test_a_killed_core_changes_no_structured_answer(
    tiny_checkpoint: str, tmp_path: Path, form: dict[str, Any], pattern: str
) -> None:
    with own_process(tmp_path, tiny_checkpoint, "--dtype", "float32", "--max-total-tokens", "8192") as server:
        server.wait_ready()
        asks = [an_ask(i, **form, seed=80 + i, temperature=0.9 * (i % 2)) for i in range(8)]
        undisturbed = answers_of(begin(server, asks))
        for answer in undisturbed:
            assert re.search(pattern, answer["text"], re.DOTALL), answer
        streams = begin_and_wait_for_tokens(server, asks)
        [core] = server.children()
        os.kill(core, signal.SIGKILL)
        assert_same(answers_of(streams), undisturbed)
        assert server.children() != [core]


# Arguments, and contents, that are long, so that no end comes before the core dies.
NOTE = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a short note", "a long note"]},
        "text": {"type": "string", "minLength": 250, "maxLength": 260},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["kind", "text", "count"],
    "additionalProperties": False,
}
OF_NOTE = {"type": "json_schema", "json_schema": {"name": "note", "schema": NOTE, "strict": True}}


def note_tools(strict: bool) -> list[dict[str, Any]]:
    function = {"parameters": NOTE, "strict": strict}
    return [{"type": "function", "function": {"name": name, **function}} for name in ("write_note", "send_note")]


def tool_asks(opening_id: int) -> list[Ask]:
    """Eight chats whose answers are calls: demanded, of one function, one or several, and opened in free text by a
    model that is given a liking for it (``opening_id``)."""
    named = {"type": "function", "function": {"name": "send_note"}}
    forms: list[dict[str, Any]] = [
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"tool_choice": named},
        {"tool_choice": "required"},
        {"tool_choice": "auto", "logit_bias": {str(opening_id): 5.0}},
    ]
    return [
        chat_ask(i, tools=note_tools(strict=form["tool_choice"] == "auto"), **form) for i, form in enumerate(forms * 2)
    ]


def chat_ask(i: int, **options: Any) -> Ask:
    """Chat ``i``, every other one greedy, with and without log-probabilities by turns of two."""
    body = {"messages": [{"role": "user", "content": words(10, seed=i)}], "seed": 90 + i, "temperature": 1.0 * (i % 2)}
    body |= {"cache_salt": f"{i}", "stream_options": {"include_usage": True}, "max_tokens": 700}
    return "/v1/chat/completions", body | options | ({"logprobs": True} if i % 4 < 2 else {})


@pytest.mark.slow
def test_a_killed_core_changes_no_call(tmp_path: Path) -> None:
    """Eight chats with a schema, and eight that call tools."""
    path, template = make_random_speaker(tmp_path)
    options = ("--dtype", "float32", "--max-total-tokens", "32768", "--chat-template", template)
    with own_process(tmp_path, path, *options, "--reasoning-parser", "none") as server:
        server.wait_ready()
        opening = httpx.post(f"{server.url}/tokenize", json={"content": "<tool_call>"}).json()["tokens"]
        asks = [chat_ask(20 + i, response_format=OF_NOTE) for i in range(8)] + tool_asks(*opening)
        undisturbed = answers_of(begin(server, asks))
        for answer in undisturbed[:8]:
            assert is_note(answer["text"]) and answer["finish_reasons"] == ["stop"], answer
        for answer in undisturbed[8:]:
            complete = answer["calls"] if answer["finish_reasons"] == ["tool_calls"] else answer["calls"][:-1]
            assert complete and all(is_note(arguments) for _, arguments in complete), answer
        streams = begin_and_wait_for_tokens(server, asks)
        [core] = server.children()
        os.kill(core, signal.SIGKILL)
        answers = answers_of(streams)
        assert server.children() != [core]
        assert f"was killed by signal 9 while {len(asks)} requests were live" in server.log.read_text()
        assert_same(answers, undisturbed)


def is_note(text: str) -> bool:
    note = json.loads(text)
    return list(note) == list(NOTE["properties"]) and 250 <= len(note["text"]) <= 260


BUDGETS = (90, 100, 110, 120)


@pytest.mark.slow
def test_a_killed_core_changes_no_budget_of_thinking(tiny_checkpoint: str, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}{% if add_generation_prompt %}<think>{% endif %}")
    options = ("--dtype", "float32", "--chat-template", str(template), "--reasoning-parser", "qwen3")
    with own_process(tmp_path, tiny_checkpoint, *options) as server:
        server.wait_ready()
        asks = [an_ask(1 + 3 * i, thinking_budget=budget, seed=i, temperature=0.8) for i, budget in enumerate(BUDGETS)]
        undisturbed = answers_of(begin(server, asks))
        for budget, answer in zip(BUDGETS, undisturbed, strict=True):
            thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
            assert budget < thought < budget + 20 and answer["reasoning"] and answer["text"], answer
        streams = begin_and_wait_for_tokens(server, asks)
        [core] = server.children()
        os.kill(core, signal.SIGKILL)
        assert_same(answers_of(streams), undisturbed)
        assert server.children() != [core]


@pytest.mark.slow
def test_the_request_that_kills_gets_the_error(killer_server: KillerServer) -> None:
    """First in the midst of others, then again as a stream: four deaths in all, which this server does not count."""
    with killer_server("KillerForCausalLM", "supervisor.DEATHS_WINDOW_S = 0.0") as server:
        asks = greedy_asks(**NEVER_DEADLY)
        undisturbed = answers_of(begin(server, asks))
        streams = begin_and_wait_for_tokens(server, asks)
        body = {"prompt": DEADLY_PROMPT, "max_tokens": 5}
        refused = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)
        error = refused.json()["error"]
        assert (refused.status_code, error["type"]) == (500, "internal_server_error"), error
        assert (error["param"], error["code"]) == (None, "request_failed") and "died twice" in error["message"]
        assert_same(answers_of(streams), undisturbed)
        assert httpx.get(f"{server.url}/health").status_code == 200
        streamed = Stream(server.url, ("/v1/completions", body))
        streamed.wait()
        assert streamed.is_done and streamed.events == [{"error": error}]
        assert server.log.read_text().count("was killed by signal 9") == 4


@pytest.mark.slow
def test_three_deaths_end_the_server(killer_server: KillerServer, tmp_path: Path) -> None:
    with (
        killer_server("FailingForCausalLM") as server,
        httpx.Client(timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor() as pool,
    ):
        sound = {"prompt": words(10), "max_tokens": 480, "ignore_eos": True, **NEVER_DEADLY}
        [stream] = begin_and_wait_for_tokens(server, [("/v1/completions", sound)])
        deadly = {"prompt": [[*DEADLY_PROMPT, i] for i in range(4)], "max_tokens": 5}
        pending = pool.submit(client.post, f"{server.url}/v1/completions", json=deadly)
        assert server.process.wait(TIMEOUT_S) == 1
        log = server.log.read_text()
        last_line = log.splitlines()[-1]
        assert "the engine core died 3 times within 60 s" in last_line
        where = r"RuntimeError: seventy-seven is too much \(.*killer_model\.py, line \d+\)"
        assert re.search(rf"{where}$", last_line)
        assert len(re.findall(rf"the engine core failed: {where} while \d+ requests were live", log)) == 3
        assert log.count("the engine core fails:\nTraceback (most recent call last)") == 3 and "leaked" not in log
        stream.wait()
        assert stream.is_broken or is_core_error(stream.events[-1]), stream.events[-1]
        assert isinstance(pending.exception(), httpx.TransportError) or (
            pending.result().status_code == 500 and is_core_error(pending.result().json())
        )
        wait_for(lambda: not running_in(tmp_path))


def is_core_error(body: dict[str, Any]) -> bool:
    return body["error"]["code"] == "engine_failed" and "seventy-seven" in body["error"]["message"]
