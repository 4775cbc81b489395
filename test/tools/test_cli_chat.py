"""``rtp-llm chat`` and ``models``: with stand-ins for engine and server, through pipes and on a pseudo-terminal."""

import base64
import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rtp_llm
from rtp_llm.cli import main
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.tools.chat.conversation import Usage
from rtp_llm.tools.chat.images import image_format
from rtp_llm.tools.chat.terminal import statistics, without_controls
from rtp_llm.tools.http_client import ServerError, api_url
from warm_python import run_python

ROOT = Path(__file__).resolve().parents[2]
CHAT = ["chat", "--model", "m"]
TEMPLATE = "{% for m in messages %}{{ m.role }}={{ m.content }}|{% endfor %}"


class FakeTokenizer:
    """One id per character."""

    chat_template: str | None = TEMPLATE
    special_tokens_map: dict[str, str] = {}
    adds_special_tokens = False

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert add_special_tokens == self.adds_special_tokens
        return {"input_ids": [ord(char) for char in text]}


class FakeEngine:
    """Answers "A1", "A2", ... in two pieces, and remembers prompts and parameters."""

    limit = 1000
    failure: BaseException | None = None
    finish_reason: dict[str, Any] = {"type": "stop", "matched": 2}
    prompts: list[str] = []
    params: list[Any] = []

    sees = False
    images: list[Any] = []

    def __init__(self, server_args: Any, on_progress: Any) -> None:
        self.model_config = SimpleNamespace(
            generation_defaults={"top_p": 0.5},
            is_multimodal=self.sees,
            model_path="m",
            architectures=["LlamaForCausalLM"],
        )
        self.tokenizer_manager = self
        self.tokenizer = FakeTokenizer()
        self.info = {"max_req_len": self.limit}
        self.server_args = server_args

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def with_media(self, prompt: Prompt) -> Prompt:
        """An image is ten tokens."""
        return replace(prompt, input_ids=prompt.input_ids + [0] * 10 * len(prompt.image_data), image_data=None)

    def generate(
        self, input_ids: list[int], sampling_params: Any, stream: bool, image_data: Any = None
    ) -> Iterator[dict[str, Any]]:
        self.prompts.append("".join(map(chr, input_ids)))
        self.images.append(image_data)
        self.params.append(sampling_params)
        answer = f"A{len(self.prompts)}"
        for count in (1, 2):
            if count == 2 and self.failure is not None:
                raise self.failure
            meta = {"prompt_tokens": len(input_ids), "completion_tokens": count, "cached_tokens": 1}
            yield {"text": answer[:count], "meta_info": meta | {"finish_reason": self.finish_reason}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    engine = type("Fake", (FakeEngine,), {"prompts": [], "params": [], "images": []})
    monkeypatch.setattr(rtp_llm, "Engine", engine, raising=False)
    monkeypatch.setattr(FakeTokenizer, "chat_template", TEMPLATE)
    return engine


def say(monkeypatch: pytest.MonkeyPatch, text: str, *flags: str, argv: list[str] = CHAT) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main([*argv, *flags])


def test_a_conversation(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(monkeypatch, "hi\nmore\n\n  \nlast", "--system", "be kind") == 0
    assert fake.prompts == [
        "system=be kind|user=hi|",
        "system=be kind|user=hi|assistant=A1|user=more|",
        "system=be kind|user=hi|assistant=A1|user=more|assistant=A2|user=last|",
    ]
    output = capsys.readouterr()
    assert output.out == "A1\nA2\nA3\n"
    lines = output.err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"\(prompt 23 \(1 cached\) \+ 2 tokens, first after [\d.]+ s, [\d.]+ tokens/s\)", lines[0])
    assert "\x1b" not in output.out + output.err


def test_an_answer_takes_what_room_there_is(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    assert say(monkeypatch, "hi\n", "--temperature", "0") == 0
    assert say(monkeypatch, "hi\n", "--max-new-tokens", "7") == 0
    assert [params.max_new_tokens for params in fake.params] == [1000 - len("user=hi|"), 7]
    assert (fake.params[0].temperature, fake.params[0].top_p) == (0.0, 0.5)


def test_commands(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "/system short words\none\n/retry\n/reset\n/system\ntwo\n//three\n/usr/bin is a path\n/help\n/exit\nnever\n"
    )
    assert say(monkeypatch, script) == 0
    assert fake.prompts == [
        "system=short words|user=one|",
        "system=short words|user=one|",
        "user=two|",
        "user=two|assistant=A3|user=/three|",
        "user=two|assistant=A3|user=/three|assistant=A4|user=/usr/bin is a path|",
    ]
    error = capsys.readouterr().err
    assert all(words in error for words in ("system message set", "no system message", "forgotten", "/retry"))


SEEING = (
    "{% for m in messages %}{{ m.role }}={% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text if p.type == 'text' else '<img>' }}{% endfor %}{% endif %}|{% endfor %}"
)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "b c.jpg"]
    paths[0].write_bytes(b"\x89PNG\r\n\x1a\n...")
    paths[1].write_bytes(b"\xff\xd8\xff...")
    return paths


def test_images(
    fake: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    images: list[Path],
) -> None:
    monkeypatch.setattr(FakeTokenizer, "chat_template", SEEING)
    monkeypatch.setattr(FakeTokenizer, "adds_special_tokens", True)  # as processors do
    fake.sees = True
    script = f"/image {images[0]}\n/image '{images[1]}'\nwhat?\nmore\n/image http://x/y.png\n/image\nlast\n"
    assert say(monkeypatch, script + f"/image {images[0]}\n/reset\nnone\n") == 0
    assert fake.prompts == [
        "user=<img><img>what?|",
        "user=<img><img>what?|assistant=A1|user=more|",
        "user=<img><img>what?|assistant=A1|user=more|assistant=A2|user=last|",
        "user=none|",
    ]
    png, jpeg = (base64.b64encode(path.read_bytes()).decode() for path in images)
    assert fake.images[0] == [f"data:image/png;base64,{png}", f"data:image/jpeg;base64,{jpeg}"]
    assert fake.images == [fake.images[0]] * 3 + [None]
    assert fake.params[0].max_new_tokens == 1000 - len(fake.prompts[0]) - 20  # their tokens take room too
    error = capsys.readouterr().err
    assert "1 image for the next message\n2 images for the next message" in error
    assert "no images for the next message" in error


def test_images_that_cannot_be_sent(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("not an image")
    for source, words in [
        (str(tmp_path / "none.png"), "No such file or directory"),
        (str(tmp_path), "Is a directory"),
        (str(tmp_path / "text.png"), "is no image of a known kind (JPEG, PNG, GIF, WebP, BMP, TIFF)"),
        ("http://x/y.png\nwhat?", "messages[0].content[0] is an image, and this model takes text only"),
    ]:
        assert say(monkeypatch, f"/image {source}\n") == 2
        error = capsys.readouterr().err
        assert words in error and error.splitlines()[-1].startswith("rtp-llm: error: ")
    assert not fake.prompts


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"GIF89a", "GIF"),
        (b"BM....", "BMP"),
        (b"II*\0..", "TIFF"),
        (b"MM\0*..", "TIFF"),
        (b"RIFF\0\0\0\0WEBPVP8", "WebP"),
        (b"RIFF\0\0\0\0WAVE", None),
        (b"", None),
    ],
)
def test_kinds_of_images(content: bytes, kind: str | None) -> None:
    assert image_format(content) == kind


def test_messages_of_several_lines(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'a\\\nb\\\nc\n"""\nx\n\n y \n"""\n/reset\n"""one"""\n/reset\n"""to\nthe end\n'
    assert say(monkeypatch, script) == 0
    assert fake.prompts == [
        "user=a\nb\nc|",
        "user=a\nb\nc|assistant=A1|user=x\n\n y |",
        "user=one|",
        "user=to\nthe end|",
    ]


def test_old_turns_are_forgotten_with_a_notice(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.limit = 60
    assert say(monkeypatch, "first\nsecond\nthird\n", "--max-new-tokens", "20") == 0
    assert fake.prompts[1:] == ["user=first|assistant=A1|user=second|", "user=second|assistant=A2|user=third|"]
    error = " ".join(capsys.readouterr().err.split())
    assert "(the oldest turn was forgotten: the conversation has" in error
    assert "leaves no room for an answer of 20: the limit is 60" in error


def test_a_message_that_is_too_long_is_an_error(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.limit = 60
    assert say(monkeypatch, "hi\n" + "x" * 50 + "\n") == 2
    assert "the conversation has 56 tokens" in capsys.readouterr().err
    assert fake.prompts == ["user=hi|"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top-p", "2"], "top_p must be"),
        (["--skip-tokenizer-init"], "chat works on text"),
        (["--api-key", "k"], "--api-key is for a server"),
        (["--chat-template", "nowhere"], "neither a file nor the name"),
        (["--url", "http://127.0.0.1:1", "--tp-size", "2"], "--tp-size is for an engine in this process"),
        (["--url", "http://127.0.0.1:1"], "cannot reach http://127.0.0.1:1/v1/chat/completions"),
        (["--url", "127.0.0.1:1"], "must begin with http://"),
    ],
)
def test_wrong_flags(
    fake: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    assert say(monkeypatch, "hi\n", *flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_what_is_needed_is_told(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(monkeypatch, "", argv=["chat"]) == 0
    assert "No model named: this is the embedded demo model, a toy." in capsys.readouterr().err
    monkeypatch.setattr(FakeTokenizer, "chat_template", None)
    assert say(monkeypatch, "") == 2
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["/foo\n", "/retry\n"])
def test_in_a_script_an_error_ends(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    assert say(monkeypatch, script + "hi\n") == 2
    assert not fake.prompts


def test_failures_of_an_answer(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.finish_reason = {"type": "abort", "message": "no numbers"}
    assert say(monkeypatch, "hi\n") == 2
    assert capsys.readouterr().err == "rtp-llm: error: the request was ended: no numbers\n"
    fake.finish_reason = {"type": "length", "length": 2}
    assert say(monkeypatch, "hi\n") == 0
    assert "cut by the limit" in capsys.readouterr().err
    fake.failure = RuntimeError("the engine died")
    assert say(monkeypatch, "hi\n") == 2
    assert capsys.readouterr().out == "A\n"
    fake.failure = KeyboardInterrupt()
    assert say(monkeypatch, "hi\n") == 130


# A server


class FakeServer(ThreadingHTTPServer):
    """Answers the chat with ``events``, or with ``status`` and ``error``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.events: list[Any] = []
        self.errors: list[tuple[int, Any]] = []
        self.done = True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def say(self, *deltas: dict[str, Any], finish_reason: str | None = "stop", usage: Any = None) -> None:
        self.events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        self.events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}]})
        self.events.append({"choices": [], "usage": usage})


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.answer(200, {"object": "list", "data": [{"id": "big", "max_model_len": 99}, {"id": "small"}]})

    def do_POST(self) -> None:
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        if self.server.errors:
            self.answer(*self.server.errors.pop(0))
            return
        self.send_response(200)
        self.end_headers()
        lines = [": hello\n\n", "event: x\n", *(f"data: {json.dumps(event)}\n\n" for event in self.server.events)]
        for line in [*lines, "data: [DONE]\n\n"] if self.server.done else lines:
            self.wfile.write(line.encode())

    def answer(self, status: int, content: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    server.say({"role": "assistant"}, {"content": "Grüß "}, {"content": "dich"}, usage=usage)
    flags = ["--url", server.url + "/", "--api-key", "k", "--temperature", "0", "--max-new-tokens", "5", "--stop", "x"]
    assert say(monkeypatch, "hi\nmore\n", *flags, argv=["chat"]) == 0
    output = capsys.readouterr()
    assert output.out == "Grüß dich\nGrüß dich\n"
    assert "(prompt 9 (4 cached) + 3 tokens, first after" in output.err
    first, second = server.requests
    assert first == {
        "model": "big",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "max_tokens": 5,
        "stop": ["x"],
        "messages": [{"role": "user", "content": "hi"}],
    }
    assert second["messages"][1] == {"role": "assistant", "content": "Grüß dich"}
    assert server.keys == ["Bearer k"] * 2


def test_images_for_a_server(server: FakeServer, monkeypatch: pytest.MonkeyPatch, images: list[Path]) -> None:
    server.say({"content": "yes"})
    script = f"/image {images[0]}\n/image https://x/y.png\nwhat?\n"
    assert say(monkeypatch, script, "--url", server.url, argv=["chat"]) == 0
    png = base64.b64encode(images[0].read_bytes()).decode()
    assert server.requests[0]["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        {"type": "text", "text": "what?"},
    ]


def test_thoughts_are_no_part_of_the_answer(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.say({"reasoning_content": "hm"}, {"content": "yes"})
    assert say(monkeypatch, "hi\nso\n", "--url", server.url, "--model", "small", argv=["chat"]) == 0
    output = capsys.readouterr()
    assert output.out == "yes\nyes\n"
    assert output.err.startswith("hm\n(first after ")
    assert [m["content"] for m in server.requests[1]["messages"]] == ["hi", "yes", "so"]
    assert server.requests[1]["model"] == "small"


def test_a_server_whose_context_is_full(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.say({"content": "yes"})
    full = {"error": {"message": "too long: 70 > 64", "code": "context_length_exceeded"}}
    server.errors = [(500, {"error": {"message": "oh"}})]
    assert say(monkeypatch, "hi\n", "--url", server.url, argv=["chat"]) == 2
    assert capsys.readouterr().err == "rtp-llm: error: oh (status 500)\n"
    server.errors = [(400, full)]
    assert say(monkeypatch, "hi\n", "--url", server.url, argv=["chat"]) == 2
    assert "too long: 70 > 64 [context_length_exceeded]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (401, {"error": {"message": "wrong key", "code": 401}}, "wrong key (status 401)"),
        (404, {"message": "no such model"}, "no such model (status 404)"),
        (502, b"<h1>Bad\n gateway</h1>", "answers with status 502: <h1>Bad gateway</h1>"),
        (503, b"", "answers with status 503"),
    ],
)
def test_refusals_of_a_server(
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    content: Any,
    words: str,
) -> None:
    server.errors = [(status, content)]
    assert say(monkeypatch, "hi\n", "--url", server.url, argv=["chat"]) == 2
    assert words in capsys.readouterr().err


def test_answers_that_break_off(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.done = False
    server.say({"content": "ye"})
    assert say(monkeypatch, "hi\n", "--url", server.url, argv=["chat"]) == 2
    output = capsys.readouterr()
    assert output.out == "ye\n"
    assert "broke off in the middle" in output.err
    server.done = True
    server.say({"content": "ye"}, finish_reason=None)
    assert say(monkeypatch, "hi\n", "--url", server.url, argv=["chat"]) == 2
    assert "no finish_reason" in capsys.readouterr().err
    server.events = [{"error": {"message": "the core died"}}]
    assert say(monkeypatch, "hi\n", "--url", server.url, argv=["chat"]) == 2
    assert capsys.readouterr().err == "rtp-llm: error: the core died\n"


def test_urls() -> None:
    assert [api_url(url) for url in ("http://a:1", "http://a:1/", "https://a/v1", "http://a/x/v1/")] == [
        "http://a:1/v1",
        "http://a:1/v1",
        "https://a/v1",
        "http://a/x/v1",
    ]
    with pytest.raises(ServerError, match="must begin with"):
        api_url("ftp://a")


def test_statistics_fit_a_line_of_80_columns() -> None:
    line = statistics(Usage("length", 8192, 512, 8000), 0.0, 12.3456, 15.0)
    assert line == "(prompt 8192 (8000 cached) + 512 tokens, first after 12.346 s, 192.5 tokens/s, cut by the limit)"
    assert len(line.replace(", cut by the limit", "")) <= 80
    assert statistics(Usage("stop", None, None, None), 0.0, 1.0, 2.0) == "(first after 1.000 s)"


def test_control_characters_are_shown_not_obeyed() -> None:
    assert without_controls("a\x1b[2Jb\r\n\tc\x07\x9b é 👩‍👩‍👧") == "a\ufffd[2Jb\ufffd\n\tc\ufffd\ufffd é 👩‍👩‍👧"


# rtp-llm models


def test_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class MineForCausalLM:
        pass

    monkeypatch.setitem(rtp_llm.ModelRegistry.models, "MineForCausalLM", MineForCausalLM)
    assert main(["models"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == rtp_llm.ModelRegistry.get_supported_archs()
    assert lines["Qwen3ForCausalLM"].endswith("models_py/qwen3.py")
    assert lines["MineForCausalLM"] == f"{__file__} (registered)"
    assert main(["models", "--json"]) == 0
    listed = {model["architecture"]: model for model in json.loads(capsys.readouterr().out)}
    assert listed["MineForCausalLM"]["registered"] and not listed["LlamaForCausalLM"]["registered"]


def test_models_of_a_server(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--url", server.url]) == 0
    assert capsys.readouterr().out == "big    context 99\nsmall\n"
    assert main(["models", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {"id": "small"}
    assert main(["models", "--api-key", "k"]) == 2
    assert "--api-key is for a server" in capsys.readouterr().err


# A person at a terminal


PATH = os.pathsep.join(
    map(str, (ROOT, ROOT / "test/helpers", Path(__file__).parent))
)  # the program may import this file


class Person:
    """Types into a program on a pseudo-terminal of 80 columns, and reads what it shows."""

    def __init__(self, *argv: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
            os.environ.update({"TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"})
            os.execv(sys.executable, [sys.executable, *argv])
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, words: str, timeout_s: float = 60) -> str:
        """What came up to and with ``words``, since the last time."""
        end_s = time.monotonic() + timeout_s
        while words not in self.seen:
            assert time.monotonic() < end_s, f"no {words!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
        found, _, self.seen = self.seen.partition(words)
        return found + words

    def interrupt_until(self, words: str) -> None:
        """Presses Ctrl-C, and again each second: Python notices one that comes while readline handles a key only at
        the next key."""
        for _ in range(60):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.wait_for(words, timeout_s=1)
                return
        raise AssertionError(f"Ctrl-C does not bring {words!r} but {self.seen!r}")

    def exit_status(self) -> int:
        end_s = time.monotonic() + 30
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end_s:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError("the program does not end")
            time.sleep(0.02)


SLOW_ENGINE = """
import sys, time
import rtp_llm
import test_cli_chat

class Slow(test_cli_chat.FakeEngine):
    def generate(self, **options):
        for i, result in enumerate(super().generate(**options)):
            yield result
            if i == 0 and self.prompts[-1].endswith("slowly|"):
                time.sleep(60)

rtp_llm.Engine = Slow
from rtp_llm.cli import main
sys.exit(main(["chat", "--model", "m"]))
"""


def test_at_a_terminal() -> None:
    person = Person("-c", SLOW_ENGINE)
    person.wait_for("/help lists the commands")
    person.wait_for("> ")
    person.type("hi\r")
    assert "A1" in person.wait_for("tokens/s)")
    person.wait_for("> ")
    person.type("slowly\r")
    person.wait_for("A")
    person.type("\x03")  # stops the answer
    person.wait_for("(stopped)")
    person.wait_for("> ")
    person.type("/foo\r")
    person.wait_for("error: unknown command /foo")
    person.wait_for("> ")
    person.type("half a li")
    person.wait_for("half a li")
    person.interrupt_until("(Ctrl-D or /exit ends)")  # forgets the line
    person.wait_for("> ")
    person.type('"""two\r')
    person.wait_for("... ")
    person.type('lines"""\r')
    person.wait_for("A3")
    person.wait_for("> ")
    person.type("\x04")
    assert person.exit_status() == 0


def test_a_trained_model_through_a_pipe(data_dir: Path) -> None:
    model = data_dir / "models" / "stories260K-hf"
    if not model.is_dir():
        pytest.skip(f"no trained model: {model} does not exist")
    flags = ["--model", str(model), "--temperature", "0", "--max-new-tokens", "20"]
    done = run_python(["-m", "rtp_llm", "chat", *flags], given="Once upon a time\nShe\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(", there was a little girl named Lily.")
    assert done.stderr.count("tokens/s") == 2
    assert "(0 cached)" not in done.stderr.splitlines()[1]  # the first turn is in the prefix cache
