"""The fuzzer and the soak themselves: what is wrong is noticed, and what is drawn is what it should be."""

import argparse
import json
import socket
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest

from benchmark.soak_good import GoodCounts, text_of
from benchmark.soak_report import Killing, Look, Run, Sample, missed, percentile, table
from benchmark.soak_workload import good_requests as soak_requests
from fuzzer import ServerLog, describe
from hostile_checks import problem_of
from hostile_heavy import HEAVY
from hostile_requests import Case, Generator, Good, good_requests
from hostile_wire import Answer, HangUp, NotHTTP, Outcome, Plan, ReadSome, Send, perform, request
from rtp_llm.tools.bench_serving.workloads import BenchRequest, Piece, Source

JSON_TYPE, NAMED = ("content-type", "application/json"), ("x-request-id", "a")
DOCUMENT = {
    "paths": {
        "/v1/completions": {
            "post": {"requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/C"}}}}}
        },
        "/health": {"get": {}},
        "/v1/models/{model}": {"get": {}},
    },
    "components": {
        "schemas": {
            "C": {
                "type": "object",
                "properties": {"prompt": {"type": "string"}, "n": {"type": "integer", "maximum": 128}},
            }
        }
    },
}
GOOD = Good("/v1/completions", {"prompt": "a"})
KNOWN = {GOOD.question: "b"}
POST = Plan((Send(b"x"),))
ERROR = {"message": "no", "type": "invalid_request_error", "param": None, "code": None}


def an_error(status: int, headers: tuple[tuple[str, str], ...] = (), **fields: object) -> Answer:
    return Answer(status, [JSON_TYPE, NAMED, *headers], json.dumps({"error": ERROR | fields}).encode())


def a_text(text: str, reason: str = "stop") -> Answer:
    return Answer(200, [JSON_TYPE], json.dumps({"choices": [{"text": text, "finish_reason": reason}]}).encode())


def a_stream(content: bytes) -> Answer:
    return Answer(200, [("content-type", "text/event-stream")], content)


def lines(content: bytes) -> Answer:
    return Answer(200, [("content-type", "application/x-ndjson")], content)


def problem(answer: Answer, *good: Good, may_be_aborted: bool = False) -> str | None:
    return problem_of(Case(1, "x", POST, good), Outcome([answer]), KNOWN, may_be_aborted)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (an_error(500), "the status is 500"),
        (an_error(502), "the status is 502"),
        (an_error(400, message=""), "message has 0 characters"),
        (an_error(400, message="a" * 2001), "message has 2001 characters"),
        (an_error(400, param=3), "whose param is '3'"),
        (an_error(400, extra=1), "with the fields"),
        (an_error(503), "without Retry-After"),
        (Answer(404, [JSON_TYPE, NAMED], b'{"detail": "Not Found"}'), "not {'error'"),
        (Answer(400, [JSON_TYPE], json.dumps({"error": ERROR}).encode()), "without X-Request-Id"),
        (Answer(400, [JSON_TYPE, NAMED], b'{"error": '), "JSON that is none"),
        (Answer(200, [JSON_TYPE], b'{"a": NaN}'), "NaN is no JSON"),
        (Answer(200, [JSON_TYPE], b'{"a": "\xff"}'), "JSON that is none"),
        (Answer(404, [("content-type", "text/html")], b"<html>"), "not JSON"),
        (a_stream(b'data: {"a": 1}\n\n'), "a stream that ends"),
        (a_stream(b"data: {}\n\ndata: [DONE]\n\ndata: {}\n\n"), "a stream that ends"),
        (a_stream('data: {"a": "\u2028"}\n\ndata: [DONE]\n\n'.encode()), "not one line"),
        (a_stream(b'data: {"stop": false}\n\n'), "a stream that ends"),
        (a_stream(b'data: {"stop": false}\n\ndata: {"stop": true}\n'), "not one line"),
        (a_stream(b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n'), "with the fields"),
        (Answer(400, [JSON_TYPE, NAMED], b'{"error": ""}'), "message has 0 characters"),
        (Answer(400, [JSON_TYPE, NAMED], b'{"error": "a", "code": 1}'), "beside"),
        (lines(b'{"done": false}\n'), "a stream that ends"),
        (lines(b'{"done": true}'), "a stream that ends"),
        (lines(b'{"done": true}\n{"done": true}\n'), "goes on after its end"),
        (lines('{"done": false, "a": "\u2028"}\n{"done": true}\n'.encode()), "Unterminated string"),
        (lines(b'{"done": false}\n{"error": "internal error; x"}\n'), "within a stream"),
        (
            a_stream(
                b"data: " + json.dumps({"error": ERROR | {"code": "internal_error"}}).encode() + b"\n\ndata: [DONE]\n\n"
            ),
            "within a stream",
        ),
    ],
)
def test_bad_answers_are_noticed(answer: Answer, words: str) -> None:
    assert words in (problem(answer) or "nothing")


@pytest.mark.parametrize(
    "answer",
    [
        an_error(400),
        an_error(503, (("retry-after", "5"),)),
        Answer(400, [("connection", "close"), ("content-type", "text/plain")], b"Invalid HTTP request received."),
        a_stream(b'data: {"a": 1}\n\ndata: [DONE]\n\n'),
        a_stream(b'data: {"stop": false}\n\ndata: {"stop": true}\n\n'),
        Answer(501, [JSON_TYPE, NAMED], b'{"error": "no embeddings"}'),
        lines(b'{"done": false}\n{"done": true}\n'),
        lines(b'{"error": "no such grammar"}\n'),
    ],
)
def test_answers_that_are_all_right(answer: Answer) -> None:
    assert problem(answer) is None


def test_good_requests_must_be_answered_right() -> None:
    assert problem(a_text("b"), GOOD) is None
    assert problem(an_error(503, (("retry-after", "5"),)), GOOD) is None
    assert "got 'c'" in (problem(a_text("c"), GOOD) or "")
    assert "got 400" in (problem(an_error(400), GOOD) or "")
    assert "got ''" in (problem(a_text("", "abort"), GOOD) or "")
    assert problem(a_text("", "abort"), GOOD, may_be_aborted=True) is None
    assert "0 of 1 answers" in (problem_of(Case(1, "x", POST), Outcome(problem="Closed"), {}) or "")


def test_good_requests_in_ollamas_form() -> None:
    good = Good("/api/generate", {"prompt": "a", "stream": False})
    streamed = Good("/api/generate", {"prompt": "a", "stream": True})
    told = [{"response": "b", "done": False}, {"response": "c", "done": True, "done_reason": "length"}]
    answers = (
        lines("".join(json.dumps(part) + "\n" for part in told).encode()),
        Answer(200, [JSON_TYPE], json.dumps(told[1] | {"response": "bc"}).encode()),
    )
    for case, answer in zip((streamed, good), answers, strict=True):

        def asked(known: str, may_be_aborted: bool = False, case: Good = case, answer: Answer = answer) -> str | None:
            return problem_of(Case(1, "x", POST, (case,)), Outcome([answer]), {case.question: known}, may_be_aborted)

        assert asked("bc") is None and asked("bcd", may_be_aborted=True) is None
        assert "got 'bc'" in (asked("bcd") or "")


def test_tracebacks_in_the_log_are_noticed_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("Traceback (most recent call last)\nof before\n")
    log = ServerLog(path)
    assert log.new_bug() is None
    with path.open("a") as file:
        file.write("a line\nTraceback (most recent call last):\n  somewhere\nValueError: x\n")
    assert "ValueError: x" in (log.new_bug() or "")
    assert log.new_bug() is None


# Requests


def test_a_request_is_decided_by_seed_and_number() -> None:
    one, other = (Generator(DOCUMENT, seed, 9) for seed in (3, 4))
    cases = [one.case(number) for number in range(400)]
    assert cases == [Generator(DOCUMENT, 3, 9).case(number) for number in range(400)]
    assert cases != [other.case(number) for number in range(400)]
    assert {case.kind for case in cases} == set(one.kinds)
    shown = describe(cases[7], 3, ("127.0.0.1", 9))
    assert "--seed 3 --only 7" in shown and "request 7 of seed 3" in shown


def test_what_repeats_a_request_sends_the_same_bytes() -> None:
    sent = bytes(range(256)) + b"GET /%s 012\xc3\xa9"
    command = describe(Case(1, "x", Plan((Send(sent),))), 0, ("127.0.0.1", 9)).splitlines()[-1]
    printf = command.strip().partition(" | ")[0]
    assert subprocess.run(["/bin/sh", "-c", printf], capture_output=True, check=True).stdout == sent


def test_heavy_requests_have_negative_numbers() -> None:
    generator = Generator(DOCUMENT, 0, 9)
    assert [generator.case(-1 - i).kind for i in (0, len(HEAVY) - 1)] == [*HEAVY][:: len(HEAVY) - 1]


def test_streams_have_the_answers_of_the_same_requests() -> None:
    goods = good_requests()
    assert len({good.question for good in goods}) * 2 == len({good.key for good in goods}) == len(goods)


def answering(data: bytes) -> tuple[str, int]:
    """Where somebody answers one request with these bytes, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with listener, connection:
            connection.recv(1 << 16)
            connection.sendall(data)

    threading.Thread(target=answer).start()
    return listener.getsockname()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"


def test_answers_are_read_as_they_are() -> None:
    plan = Plan((Send(request("GET", "/")),), ("GET",))
    assert perform(answering(b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED), plan, 10).answers[0].body == b"abc"
    assert perform(answering(b"HTTP/1.1 204 No Content\r\n\r\n"), plan, 10).answers[0].status == 204
    assert "after 5 bytes" in (perform(answering(b"HTTP/"), plan, 10).problem or "")
    assert "2 of 5 bytes" in (
        perform(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"), plan, 10).problem or ""
    )
    for wrong in (b"hello\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"):
        with pytest.raises(NotHTTP):
            perform(answering(wrong), plan, 10)
    left = Plan((Send(request("GET", "/")), ReadSome(4), HangUp(reset=True)), ())
    assert perform(answering(CHUNKED), left, 10).answers == []


# The soak


def a_run(tmp_path: Path, **changes: object) -> Run:
    """A run of twenty minutes in which all went well."""
    log = tmp_path / "log"
    log.write_text("all is well\n")
    run = Run(
        argparse.Namespace(minutes=20.0, speed=1.0), log, GoodCounts(sent=3, right=3), begun_s=0.0, ended_s=1200.0
    )
    run.looks = [Look(at_s, 0.01, 200, 0.0) for at_s in range(1, 1200)]
    run.samples = steady("HTTP") + steady("core")
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def steady(role: str) -> list[Sample]:
    return [Sample(at_s, role, 7, 100 << 20) for at_s in range(0, 1200, 5)]


def grown(role: str) -> list[Sample]:
    return [Sample(at_s, role, 7, (100 + at_s // 100) << 20) for at_s in range(0, 1200, 5)]


def test_a_run_without_fault(tmp_path: Path) -> None:
    run = a_run(tmp_path, hostile={"bomb": Counter({"400": 3, "503": 1, "none": 1})})
    assert missed(run) == []
    assert "| good requests | 3 sent" in table(run) and "| hostile: bomb | 5: 3 400, 1 503, 1 none |" in table(run)
    assert "ratio 1.000" in table(run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"good": GoodCounts(sent=4, right=3)}, "of 4 good requests 3 were right"),
        ({"good": GoodCounts(sent=4, right=3, wrong=["request 8 got 400"])}, "request 8 got 400"),
        ({"good": GoodCounts()}, "no good request"),
        ({"problems": ["processes are left: [7]"]}, "processes are left"),
        ({"hostile": {"bomb": Counter({"500": 1})}}, "bomb 500"),
        ({"hostile": {"fuzz": Counter({"no HTTP": 1})}}, "fuzz no HTTP"),
        ({"looks": [Look(9.0, 0.01, 0, 0.0)]}, "not at all"),
        (
            {"looks": [Look(at_s, 0.01, 200, 0.0) for at_s in range(1, 99)] + [Look(99.0, 9.0, 200, 0.0)]},
            "p99 of /health",
        ),
        ({"samples": [*grown("HTTP"), *steady("core")]}, "the HTTP process grew"),
        ({"samples": [Sample(s, "core", s // 600, 1 << 20) for s in range(0, 1200, 5)]}, "died by itself"),
    ],
)
def test_what_is_missed_is_told(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    assert words in "\n".join(missed(a_run(tmp_path, **changes)))


def test_times_without_a_server_do_not_count(tmp_path: Path) -> None:
    looks = [Look(5.0, 0.01, 200, 0.0), Look(50.0, 8.0, 0, 0.0), Look(99.0, 0.01, 200, 0.0)]
    run = a_run(tmp_path, looks=looks, restarts=[(44.0, 60.0)], killings=[Killing(44.0, "HTTP", 3, 16.0)])
    assert missed(run) == [] and "3 good requests live; ready again within 16.0 s" in table(run)


def test_percentiles() -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], p) for p in (25, 50, 99, 100)] == [1.0, 2.0, 4.0, 4.0]


def test_conversations_share_what_the_trace_shares() -> None:
    pieces = [Piece(Source.BLOCK, number, 30) for number in (1, 2, 3)]
    trace = [
        BenchRequest((*pieces, Piece(Source.BLOCK, 4, 30)), 20, 0.0),
        BenchRequest((*pieces, Piece(Source.BLOCK, 5, 30)), 200, 1.5),
    ]
    one, other = soak_requests(trace, image_share=0.0, seed=0, most_exchanges=12)
    assert one.body["messages"][:6] == other.body["messages"][:6] and one.body["messages"] != other.body["messages"]
    assert (one.body["max_tokens"], other.body["max_tokens"], other.arrival_s) == (20, 96, 1.5)
    assert one.content(True) == soak_requests(trace, 0.0, 0, 12)[0].content(True)
    with_image = soak_requests(trace, 1.0, 0, 12)[0]
    assert with_image.has_image and b"data:image/png" in with_image.content(False)


def test_texts_of_answers() -> None:
    stream = (
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"choices": [{"delta": {}}]}\n\ndata: [DONE]\n\n'
    )
    assert text_of("/v1/chat/completions", stream, True) == "a"
    assert text_of("/generate", b'data: {"text": "a"}\n\ndata: {"text": "ab"}\n\ndata: [DONE]\n\n', True) == "ab"
    assert text_of("/v1/completions", b'{"choices": [{"text": "abc"}]}', False) == "abc"
    with pytest.raises(ValueError, match="a stream that ends"):
        text_of("/generate", b'data: {"text": "a"}\n\n', True)
    with pytest.raises(ValueError, match="an error within"):
        text_of("/generate", b'data: {"error": {}}\n\ndata: [DONE]\n\n', True)
