"""The command line, in this process with a stand-in for the engine, and once for real."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rtp_llm
from rtp_llm.cli import main
from warm_python import run_python

GENERATE = ["generate", "--model", "m", "--prompt", "Hi"]


class FakeEngine:
    """Says "Hello you" and remembers what it was asked."""

    error: BaseException | None = None
    finish_reason: dict[str, Any] = {"type": "length", "length": 3}
    calls: list[Any] = []

    def __init__(self, server_args: Any, on_progress: Callable[[int, int], None] | None) -> None:
        self.calls.append(server_args)
        self.model_config = SimpleNamespace(generation_defaults={"temperature": 0.0, "top_p": 0.5})
        self.tokenizer = object()

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append("closed")

    def generate(self, prompt: str, params: Any, stream: bool) -> Iterator[dict[str, Any]]:
        self.calls.append((prompt, params))
        for count, text in enumerate(["Hello", "Hello", "Hello you"]):
            if count and self.error:
                raise self.error
            meta = {"prompt_tokens": 2, "completion_tokens": count + 1, "cached_tokens": 1}
            yield {
                "text": text,
                "output_ids": [1] * (count + 1),
                "meta_info": meta | {"finish_reason": self.finish_reason},
            }


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    engine = type("Fake", (FakeEngine,), {"calls": []})
    monkeypatch.setattr(rtp_llm, "Engine", engine, raising=False)
    return engine


def test_text_on_stdout_and_statistics_on_stderr(fake: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(GENERATE) == 0
    output = capsys.readouterr()
    assert output.out == "Hello you\n"
    assert output.err.startswith("prompt: 2 tokens (1 cached) | new: 3 tokens | first token: ")
    assert output.err.count("\n") == 1


def test_flags_overrule_what_the_checkpoint_advises(fake: type[FakeEngine]) -> None:
    flags = "--temperature 0.7 --max-new 9 --seed -3 --stop a b --stop c --stop-token-ids 5 6 --ignore-eos --tp-size 2"
    assert main([*GENERATE, *flags.split()]) == 0
    server_args, (prompt, params), closed = fake.calls
    assert (server_args.tp_size, server_args.log_level, prompt, closed) == (2, "warning", "Hi", "closed")
    assert (params.temperature, params.top_p, params.max_new_tokens, params.seed) == (0.7, 0.5, 9, -3)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (["a", "b", "c"], [5, 6], True)
    assert main(GENERATE) == 0
    assert fake.calls[-2][1].is_greedy


def test_the_prompt_may_come_from_stdin(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from\nstdin"))
    assert main(["generate", "--model", "m", "--prompt", "-"]) == 0
    assert fake.calls[1][0] == "from\nstdin"


def test_errors_are_one_line(fake: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    fake.error = OSError("no such\n  model")
    assert main(GENERATE) == 2
    assert capsys.readouterr().err == "rtp-llm: error: no such model\n"
    assert fake.calls[-1] == "closed"
    with pytest.raises(OSError, match="no such"):
        main([*GENERATE, "--log-level", "debug"])


def test_an_error_that_names_a_key_alone_says_its_kind(
    fake: type[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error = KeyError("ntk")
    assert main(GENERATE) == 2
    assert capsys.readouterr().err == "rtp-llm: error: KeyError: 'ntk' (--log-level debug shows where)\n"


def test_an_aborted_request_is_an_error(fake: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    fake.finish_reason = {"type": "abort", "message": "logits are not numbers"}
    assert main(GENERATE) == 2
    assert "logits are not numbers" in capsys.readouterr().err


def test_an_interrupt_ends_cleanly(fake: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    fake.error = KeyboardInterrupt()
    assert main(GENERATE) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert fake.calls[-1] == "closed"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--top-p", "2"], "top_p must be at least 0 and at most 1"),
        (["--mem-fraction-static", "7"], "mem_fraction_static must be between"),
        (["--skip-tokenizer-init"], "generate works on text"),
    ],
)
def test_wrong_values_are_told_before_loading(
    fake: type[FakeEngine], capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main([*GENERATE, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not fake.calls


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "required: COMMAND"),
        (["generat"], "invalid choice: 'generat'"),
        (["generate", "--model", "m"], "required: --prompt"),
        ([*GENERATE, "--temprature", "0"], "unknown argument '--temprature'; did you mean '--temperature'?"),
        (["serve", "org/model"], "unknown argument 'org/model': a model is named by its flag, --model-path org/model"),
        (["bench", "--profile", "--port", "1"], "--port belongs to other commands: rtp-llm bench --profile does not"),
    ],
)
def test_wrong_command_lines(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in [
        (["--version"], f"rtp-llm {rtp_llm.__version__}"),
        (["--help"], "generate"),
        (["generate", "--help"], "--tensor-parallel-size"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
        assert words in capsys.readouterr().out


def test_a_story(data_dir: Path) -> None:
    model = data_dir / "models/stories260K-hf"
    golden = json.loads((model / "golden_greedy.json").read_text())
    command = ["-m", "rtp_llm", "generate", "--model", str(model), "--prompt", "", "--max-new-tokens", "60"]
    done = run_python(command)
    assert done.returncode == 0, done.stderr
    text = done.stdout.removesuffix("\n")
    assert len(text) > 50
    assert golden["text"].startswith(text)
    assert done.stderr.startswith("prompt: 1 tokens (0 cached) | new: 60 tokens")
