"""The evaluations: prompts, the reading of answers, what fits the context, what is counted, downloads, comparisons."""

import argparse
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from benchmark import compare_answers, download
from benchmark.evaluation import EvaluationError, Outcome, Question, Reply, Task, evaluate, fit
from benchmark.gsm8k import bench_rtp_llm, gsm8k
from benchmark.mmlu import mmlu
from benchmark.server_answers import read_completion
from benchmark.transformers_answers import TransformersAnswers
from rtp_llm.tools.bench_serving.async_http import BrokenResponse

GSM8K_ROWS = [
    ("1+1?", "1+1=<<1+1=2>>2\n#### 2"),
    ("2+3?", "#### 5"),
    ("A loss\u2028of 10?", "#### -10"),
    ("9?", "#### 1,009"),
]
MMLU_CSV = 'question,choice0,choice1,choice2,choice3,answer\n"What, ""so""?",w,x,y,z,2\nWho?,a,b,c,d,0\n'
MMLU_CSV_ORIGINAL = '"What, ""so""?",w,x,y,z,C\nWho?,a,b,c,d,A\n'  # without header, with letters


def write_gsm8k(folder: Path, rows: Sequence[tuple[str, str]] = GSM8K_ROWS) -> Path:
    path = folder / "test.jsonl"
    lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_mmlu(folder: Path, subjects: Sequence[str], content: str = MMLU_CSV) -> Path:
    for name in subjects:
        for part in ("dev", "test"):
            (folder / part).mkdir(exist_ok=True)
            (folder / part / f"{name}_{part}.csv").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 3 + 4 = 7.\n#### 7", "7"),
        ("$1,450,000 in all", "1450000"),
        ("18.00", "18"),
        ("it is 18.50 dollars", "18.5"),
        ("0.50", "0.5"),
        ("007", "7"),
        ("the change is -10", "-10"),
        ("$-3", "-3"),
        ("20-13", "13"),
        ("(4)-1", "1"),
        ("-0", "0"),
        ("100 100", "100"),
        ("5.", "5"),
        ("9" * 5000, "9" * 5000),  # more digits than int() converts
        ("٣ apples", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_gsm8k_answers(text: str, answer: str | None) -> None:
    assert gsm8k.extract(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" A", "A"), ("\nD.", "D"), ("B", "B"), ("Because", "B"), ("a", None), (" (C)", None), ("E", None), (" ", None)],
)
def test_mmlu_answers(text: str, answer: str | None) -> None:
    assert mmlu.extract(text) == answer


def test_gsm8k_prompts(tmp_path: Path) -> None:
    first, second = gsm8k.read_questions(write_gsm8k(tmp_path), num_shots=2, num_questions=5)
    assert first.prompt(2) == (
        "Question: 1+1?\nAnswer: 1+1=<<1+1=2>>2\n#### 2\n\nQuestion: 2+3?\nAnswer: #### 5\n\n"
        "Question: A loss\u2028of 10?\nAnswer:"
    )
    assert first.prompt(0) == "Question: A loss\u2028of 10?\nAnswer:"
    assert (first.label, second.label) == ("-10", "1009")
    assert first.name != second.name


def test_gsm8k_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"none is left beside 4 examples"):
        gsm8k.read_questions(write_gsm8k(tmp_path), 4, 1)
    with pytest.raises(EvaluationError, match="does not end in a number"):
        gsm8k.read_questions(write_gsm8k(tmp_path, [("q", "no")]), 0, 1)
    (tmp_path / "test.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(EvaluationError, match="line 1: no JSON object with question and answer"):
        gsm8k.read_questions(tmp_path / "test.jsonl", 0, 1)
    with pytest.raises(EvaluationError, match=r"cannot read .*nowhere"):
        gsm8k.read_questions(tmp_path / "nowhere", 0, 1)


@pytest.mark.parametrize("content", [MMLU_CSV, MMLU_CSV_ORIGINAL])
def test_mmlu_prompts(tmp_path: Path, content: str) -> None:
    write_mmlu(tmp_path, ["high_school_physics"], content)
    question = mmlu.read_subject(tmp_path, "high_school_physics", 1)[1]
    assert question.prompt(1) == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        'What, "so"?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n'
        "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )
    assert question.label == "A"


def test_mmlu_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no \*_test.csv"):
        mmlu.subject_names(tmp_path)
    write_mmlu(tmp_path, ["law"])
    with pytest.raises(EvaluationError, match="law has 2 examples in dev, but --ntrain is 3"):
        mmlu.read_subject(tmp_path, "law", 3)
    write_mmlu(tmp_path, ["law"], "What?,w,x,y,z,4\n")
    with pytest.raises(EvaluationError, match="A-D or 0-3"):
        mmlu.read_subject(tmp_path, "law", 0)


def test_questions_are_spread_over_the_subjects() -> None:
    subjects = [[question(f"{name}{i}") for i in range(size)] for name, size in (("a", 4), ("b", 1), ("c", 3))]
    assert [q.name for q in mmlu.spread(subjects, 6)] == ["a0", "a1", "a2", "b0", "c0", "c1"]
    assert len(mmlu.spread(subjects, None)) == 8


def test_the_real_files(data_dir: Path) -> None:
    questions = gsm8k.read_questions(data_dir / "eval/gsm8k/test.jsonl", 5, 10_000)
    assert len(questions) == 1319 - 5
    folder = data_dir / "eval/mmlu"
    subjects = [mmlu.read_subject(folder, name, 5) for name in mmlu.subject_names(folder)]
    assert len(subjects) == 57 and sum(map(len, subjects)) == 14042


def question(name: str, text: str = "?", examples: tuple[str, ...] = (), label: str = "A") -> Question:
    return Question(name, name[0], "", examples, text, label)


def task(questions: Sequence[Question], num_shots: int = 0, max_shots_len: int | None = None) -> Task:
    return Task("made-up", questions, num_shots, 4, (), mmlu.extract, max_shots_len)


class Parrot:
    """Answers with the last character of the prompt, or fails where that is "!". A character is a token."""

    backend, model, counting = "parrot", "parrot", "characters"

    def __init__(self, context_len: int | None = None) -> None:
        self.context_len = context_len

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(prompt) for prompt in prompts]

    def answer(
        self, prompts: Sequence[str], max_new_tokens: int, stop: tuple[str, ...], on_done: Callable[[], None]
    ) -> list[Reply]:
        return [Reply(error="no") if prompt.endswith("!") else Reply(prompt[-1], 1) for prompt in prompts]


def test_examples_are_dropped_until_the_prompt_fits() -> None:
    examples = ("1" * 10, "2" * 10, "3" * 10)
    questions = [question(f"q{n}", "x" * n, examples) for n in (6, 7, 16, 26, 36, 37)]
    asks = fit(task(questions, num_shots=3), Parrot(40))  # 36 are left for the prompt
    assert [ask.num_shots for ask in asks] == [3, 2, 2, 1, 0, None]
    assert [len(ask.prompt) for ask in asks] == [36, 27, 36, 36, 36, 0]
    assert asks[1].prompt == "1" * 10 + "2" * 10 + "x" * 7
    assert [ask.num_shots for ask in fit(task(questions, num_shots=3), Parrot(None))] == [3] * 6


def test_examples_are_dropped_until_they_are_short_enough() -> None:
    questions = [question("q0", "x", ("1" * 10, "2" * 10, "3" * 10)), question("q1", "x", ("1", "2", "3"))]
    assert [ask.num_shots for ask in fit(task(questions, 3, max_shots_len=20), Parrot())] == [2, 3]
    assert [ask.num_shots for ask in fit(task(questions, 3, max_shots_len=9), Parrot())] == [0, 3]


def test_failed_and_skipped_questions_are_not_wrong_ones() -> None:
    texts = ["A", "B", "?", "!", "A" * 50]
    record, found = evaluate(task([question(f"{i}", text) for i, text in enumerate(texts)]), Parrot(20))
    assert [outcome.status for outcome in found] == ["answered"] * 3 + ["failed", "skipped"]
    assert (record["answered"], record["failed"], record["skipped"]) == (3, 1, 1)
    assert record["accuracy"] == record["invalid"] == 1 / 3
    assert record["errors"] == {"no": 1}
    assert record["output_tokens"] == 3
    assert record["subjects"]["0"] == {"answered": 1, "correct": 1}
    assert record["subjects"]["4"] == {"answered": 0, "correct": 0}


def test_that_nothing_fits_is_told() -> None:
    with pytest.raises(EvaluationError, match=r"none of 1 questions fits.* 20 tokens .* takes 4"):
        evaluate(task([question("q", "x" * 17)]), Parrot(20))


@pytest.mark.parametrize(
    "answer", [None, [], {}, {"choices": []}, {"choices": [{"message": {}}]}, {"choices": [{"text": None}]}]
)
def test_what_is_no_completion(answer: Any) -> None:
    with pytest.raises(BrokenResponse):
        read_completion(answer)


class FakeServer(BaseHTTPRequestHandler):
    """Lists a model, has no /tokenize, and answers 2 + 3 with 5, but refuses what has a 9."""

    bodies: list[dict[str, Any]] = []

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self._send(404, {"error": {"message": "not here"}})
        elif "9" in body["prompt"]:
            self._send(400, {"error": {"message": "too hard"}})
        else:
            assert self.headers["Connection"] == "close"  # none that the server might be closing is used again
            self.bodies.append(body)
            self._send(200, {"choices": [{"text": " 2 + 3 = 5"}], "usage": {"completion_tokens": 7}})

    def _send(self, status: int, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *what: Any) -> None:
        pass


@pytest.fixture
def fake_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    FakeServer.bodies = []
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_run_against_any_server(fake_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data-path", str(write_gsm8k(tmp_path)), "--num-shots", "1", "--url", fake_server, "--api-key", "secret"]
    flags += ["--result-filename", str(tmp_path / "result.jsonl"), "--answers", str(tmp_path / "answers.jsonl")]
    assert bench_rtp_llm.main(flags) == 1
    assert bench_rtp_llm.main([*flags, "--num-questions", "2"]) == 0
    output = capsys.readouterr().out
    assert "Accuracy: 0.500 (1 of 2)" in output and "Invalid: 0.000" in output
    assert "1 requests failed" in output and "too hard" in output
    first = next(body for body in FakeServer.bodies if "2+3?" in body["prompt"])  # requests come in any order
    assert first == {
        "model": "fake",
        "prompt": "Question: 1+1?\nAnswer: 1+1=<<1+1=2>>2\n#### 2\n\nQuestion: 2+3?\nAnswer:",
        "max_tokens": 512,
        "temperature": 0,
        "stop": ["Question", "Assistant:", "<|separator|>"],
    }
    content = (tmp_path / "result.jsonl").read_text()
    records = [json.loads(line) for line in content.splitlines()]
    assert [record["failed"] for record in records] == [1, 0]
    assert records[0]["accuracy"] == 0.5 and records[0]["output_tokens"] == 14
    assert records[0]["counting"].startswith("estimate") and "not here" in records[0]["counting"]
    assert records[1]["options"]["num_questions"] == 2
    assert "secret" not in content
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(row["status"], row["answer"], row["right"]) for row in answers] == [
        ("answered", "5", True),
        ("answered", "5", False),
    ]


def test_estimated_tokens_decide_what_fits(
    fake_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data-path", str(write_gsm8k(tmp_path)), "--num-shots", "1", "--url", fake_server]
    flags += ["--result-filename", str(tmp_path / "result.jsonl"), "--num-questions", "1"]
    assert bench_rtp_llm.main([*flags, "--max-new-tokens", "10", "--context-length", "18"]) == 0
    assert FakeServer.bodies[0]["prompt"] == "Question: 2+3?\nAnswer:"  # 22 characters: 6 tokens
    assert "1 questions asked with fewer than 1 examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "1"], "cannot reach 127.0.0.1:1"),
        (["--url", "http://127.0.0.1:1", "--port", "1"], "give either --url or --host and --port"),
        (["--url", "ftp://x"], "the server's address must be like"),
    ],
)
def test_what_cannot_be_run(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--result-filename", str(tmp_path / "result.jsonl")]
    assert bench_rtp_llm.main(["--data-path", str(write_gsm8k(tmp_path)), "--num-shots", "1", *flags, *output]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "result.jsonl").exists()


def test_downloads_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_gsm8k(tmp_path)
    path = download.downloaded_file(source.as_uri(), "gsm8k/test.jsonl", "")
    assert path.read_bytes() == source.read_bytes() and path.is_relative_to(tmp_path / "cache")
    source.unlink()
    assert download.downloaded_file(source.as_uri(), "gsm8k/test.jsonl", "") == path


def test_an_archive_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = tmp_path / "data.tar"
    names = ["dev/law_dev.csv", "test/law_test.csv", "auxiliary_train/x.csv", "test/../../../evil.csv", "test/.."]
    with tarfile.open(archive, "w") as file:
        for name in names:
            member = tarfile.TarInfo(f"data/{name}")
            member.size = len(MMLU_CSV)
            file.addfile(member, io.BytesIO(MMLU_CSV.encode()))
    folder = download.downloaded_folder(archive.as_uri(), "mmlu", ("dev", "test"), "")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.csv")) == names[:2]
    assert not list(tmp_path.rglob("evil.csv"))
    assert len(mmlu.read_subject(folder, "law", 1)) == 2


def test_failed_downloads_leave_nothing_and_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data.tar").write_bytes(b"a page that says no" * 100)
    monkeypatch.setattr(gsm8k, "URL", "http://127.0.0.1:1/test.jsonl")
    monkeypatch.setattr(mmlu, "URL", (tmp_path / "data.tar").as_uri())
    with pytest.raises(EvaluationError, match=r"cannot download http://127.0.0.1:1/.*--data-path"):
        gsm8k.make_task(bench_args())
    with pytest.raises(EvaluationError, match=r"cannot download file:.*--data-path"):
        mmlu.make_task(bench_args())
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def bench_args() -> Any:
    return argparse.Namespace(data_path=None)


def test_prompts_of_like_length_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[str]] = []

    def continued(self: TransformersAnswers, prompts: list[Any], *_: Any) -> list[Reply]:
        batches.append(["".join(prompt) for prompt in prompts])
        return [Reply(f"after {text}") for text in batches[-1]]

    monkeypatch.setattr(TransformersAnswers, "_encode", lambda self, prompt: list(prompt))
    monkeypatch.setattr(TransformersAnswers, "_continue", continued)
    answerer = TransformersAnswers.__new__(TransformersAnswers)
    answerer._batch_size = 2
    done: list[int] = []
    replies = answerer.answer(["long one", "a", "longest one", "bc", "d"], 1, (), lambda: done.append(1))
    assert batches == [["a", "d"], ["bc", "long one"], ["longest one"]] and len(done) == 5
    assert [reply.text.removeprefix("after ") for reply in replies] == ["long one", "a", "longest one", "bc", "d"]


def test_answers_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = evaluate(task([question(f"q{i}", text) for i, text in enumerate("ABC")]), Parrot())
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    write_answers(ours, found)
    write_answers(theirs, found)
    assert compare_answers.main([str(ours), str(theirs)]) == 0
    assert "3 questions in both (3 answered in the first): 3 equal" in capsys.readouterr().out
    write_answers(theirs, [found[0], Outcome(found[1].ask, Reply(" D"), "D")])
    assert compare_answers.main([str(ours), str(theirs)]) == 1
    output = capsys.readouterr().out
    assert "2 questions in both (3 answered in the first): 1 equal" in output
    assert "text differs in 1: q1" in output and "1 questions in one only: q2" in output
    theirs.write_text("{}\n")
    assert compare_answers.main([str(ours), str(theirs)]) == 2


def write_answers(path: Path, found: Sequence[Outcome]) -> None:
    path.write_text("".join(json.dumps(outcome.to_dict()) + "\n" for outcome in found))
