"""What must be true of every answer, whatever was asked."""

import json
from collections.abc import Mapping
from typing import Any

from hostile_pooled import GOODS, outline_of
from hostile_requests import Case, Good
from hostile_wire import Answer, Outcome

ERROR_FIELDS = {"message", "type", "param", "code"}
MESSAGES_FIELDS = {"message", "type"}, {"message", "type", "details"}  # of errors in Anthropic's form
BUSY = (503, 529)  # the second in Anthropic's form
# Types of the last event of a stream whose events have names.
LAST = ("message_stop", "error", "response.completed", "response.incomplete", "response.failed")
MAX_MESSAGE_CHARS = 2000
ABORTED_IN_OLLAMA = "length"  # why an aborted answer ends, in Ollama's form
INTERNAL = "internal error"  # how the message of a bug begins
# What is told before there is a request that could be named or understood.
PLAIN_REFUSALS = (400, 408, 413, 414, 431, 501, 503, 505)


def problem_of(case: Case, outcome: Outcome, known: Mapping[str, str], may_be_aborted: bool = False) -> str | None:
    """What is wrong with what came, as a sentence; None if nothing is. ``known``: question of a Good -> its answer."""
    for answer in outcome.answers:
        if problem := _problem_of_answer(answer, case.plan.methods[0]):
            return problem
    if outcome.timed_out or case.plan.hangs_up:
        return None  # the runner's business
    if case.plan.must_answer and len(outcome.answers) < len(case.plan.methods):
        return f"{len(outcome.answers)} of {len(case.plan.methods)} answers came: {outcome.problem}"
    for good, answer in zip(case.good, outcome.answers, strict=False):
        if answer.status not in BUSY and (problem := wrong(good, answer, known, may_be_aborted)):
            return problem
    return None


def _problem_of_answer(answer: Answer, method: str) -> str | None:
    if answer.status >= 500 and answer.status not in (501, *BUSY, 505):
        return f"the status is {answer.status}: {answer.body[:300]!r}"
    if answer.status in (501, 505) and not (answer.is_json or _is_plain_refusal(answer)):
        return f"the status is {answer.status}: {answer.body[:300]!r}"
    if method == "HEAD":
        return None
    if answer.status >= 400 and not answer.is_json:
        return (
            None if _is_plain_refusal(answer) else f"an error that is not JSON: {answer.status} {answer.body[:300]!r}"
        )
    if answer.is_stream:
        return _problem_of_stream(answer)
    if answer.is_json:
        return _problem_of_json(answer)
    return None


def _is_plain_refusal(answer: Answer) -> bool:
    return (
        answer.status in PLAIN_REFUSALS
        and (answer.header("connection") or "").lower() == "close"
        and len(answer.body) < 300
    )


def _problem_of_json(answer: Answer) -> str | None:
    try:
        value = json.loads(answer.body.decode(), parse_constant=_refuse)
    except ValueError as error:
        return f"{answer.status} with JSON that is none ({error}): {answer.body[:300]!r}"
    if answer.status < 400:
        return None
    if problem := problem_of_error(value):
        return f"{answer.status}: {problem}"
    if answer.status in BUSY and answer.header("retry-after") is None:
        return f"a {answer.status} without Retry-After"
    if not answer.header("x-request-id"):
        return f"{answer.status} without X-Request-Id"
    return None


def problem_of_error(value: Any) -> str | None:
    """What is wrong with an error; None: nothing. In OpenAI's form, in Anthropic's, which has a type beside it, or in
    Ollama's, which is a text."""
    if isinstance(value, dict) and isinstance(value.get("error"), str):
        return _problem_of_message(value["error"]) if set(value) == {"error"} else f"an error beside {sorted(value)}"
    names = set(value) - {"type"} if isinstance(value, dict) and value.get("type") == "error" else None
    is_messages = names is not None
    if not isinstance(value, dict) or (names or set(value)) != {"error"} or not isinstance(value["error"], dict):
        return f"an error that is not {{'error': {{...}}}}: {str(value)[:300]}"
    error = value["error"]
    if set(error) not in (MESSAGES_FIELDS if is_messages else (ERROR_FIELDS,)):
        return f"an error with the fields {sorted(error)}"
    kinds = {"message": str, "type": str, "param": str | None, "code": str | None, "details": dict}
    for name in error:
        if not isinstance(error[name], kinds[name]):
            return f"an error whose {name} is {str(error[name])[:100]!r}"
    return _problem_of_message(error["message"])


def _problem_of_message(message: str) -> str | None:
    if not 0 < len(message) <= MAX_MESSAGE_CHARS:
        return f"an error whose message has {len(message)} characters"
    return None


def events_of(answer: Answer) -> list[Any]:
    """The stream's values. Raises ValueError if it is none, or breaks off."""
    if answer.is_lines:
        return _lines(answer.body.decode())
    parts = answer.body.decode().split("\n\n")
    if parts[0].startswith("event: "):
        return _named_events(parts)
    if _has_stops(parts[0]):
        return _events_with_stops(parts)
    if parts[-2:] != ["data: [DONE]", ""]:
        raise ValueError(f"a stream that ends {''.join(parts[-2:])[-100:]!r}")
    if not all(part.startswith("data: ") and len(part.splitlines()) == 1 for part in parts[:-2]):
        raise ValueError("a stream with an event that is not one line")
    return [json.loads(part.removeprefix("data: "), parse_constant=_refuse) for part in parts[:-2]]


def _lines(text: str) -> list[Any]:
    """The values of a stream in Ollama's form."""
    values = [json.loads(line, parse_constant=_refuse) for line in text.splitlines()]
    if not (text.endswith("\n") and values and (values[-1].get("done") or "error" in values[-1])):
        raise ValueError(f"a stream that ends {text[-100:]!r}")
    if any(value.get("done") is not False for value in values[:-1]):
        raise ValueError("a stream that goes on after its end")
    return values


def _named_events(parts: list[str]) -> list[Any]:
    lines = [part.splitlines() for part in parts[:-1]]
    if parts[-1] or not all(len(pair) == 2 and pair[1].startswith("data: ") for pair in lines):
        raise ValueError("a stream with an event that is not a name and one line")
    events = [json.loads(data.removeprefix("data: "), parse_constant=_refuse) for _, data in lines]
    if any(name != f"event: {event['type']}" for (name, _), event in zip(lines, events, strict=True)):
        raise ValueError("a stream with an event whose name is not its type")
    if events[-1]["type"] not in LAST:
        raise ValueError(f"a stream that ends {lines[-1][1][-100:]!r}")
    return events


def _has_stops(part: str) -> bool:
    """Whether a stream begins as one of /completion, which no [DONE] ends."""
    event = json.loads(part.removeprefix("data: ")) if part.startswith("data: {") else None
    return isinstance(event, dict) and "stop" in event


def _events_with_stops(parts: list[str]) -> list[Any]:
    if parts[-1] or not all(part.startswith("data: ") and len(part.splitlines()) == 1 for part in parts[:-1]):
        raise ValueError("a stream with an event that is not one line")
    events = [json.loads(part.removeprefix("data: "), parse_constant=_refuse) for part in parts[:-1]]
    if "error" not in events[-1] and events[-1].get("stop") is not True:
        raise ValueError(f"a stream that ends {parts[-2][-100:]!r}")
    return events


def _problem_of_stream(answer: Answer) -> str | None:
    try:
        events = events_of(answer)
    except ValueError as error:
        return str(error)
    for event in events:
        if isinstance(event, dict) and "error" in event:
            if problem := problem_of_error(event):
                return problem
            if _is_failure(event["error"]):
                return f"an error within a stream: {event['error']}"
    return None


def _is_failure(error: Any) -> bool:
    """Whether an error tells that the server, and not the request, is wrong."""
    if isinstance(error, str):
        return error.startswith(INTERNAL)
    code = error.get("code", error.get("details", {}).get("error_code"))
    return code in ("internal_error", "request_failed", "engine_failed")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def wrong(good: Good, answer: Answer, known: Mapping[str, str], may_be_aborted: bool = False) -> str | None:
    """Why an answer is not the known one; None if it is."""
    if answer.status != 200:
        return f"a good request got {answer.status}: {answer.body[:300]!r}"
    try:
        text, reason = text_of(good, answer)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return f"a good request got no completion ({error!r}): {answer.body[:300]!r}"
    expected = known[good.question]
    ends = ABORTED_IN_OLLAMA if good.path.startswith("/api/") else "abort"
    if text == expected or (may_be_aborted and reason == ends and expected.startswith(text)):
        return None
    return f"a good request got {text!r} ({reason}), not {expected!r}"


def text_of(good: Good, answer: Answer) -> tuple[str, str | None]:
    """A completion's text and finish reason, streamed or not; of pooled outputs, what ``outline_of`` leaves."""
    if good.path in GOODS:
        return outline_of(answer), "stop"
    if good.path == "/generate":
        value = events_of(answer)[-1] if good.streams else json.loads(answer.body)
        return value["text"], value["meta_info"]["finish_reason"]["type"]
    if good.path.startswith("/api/"):
        parts = events_of(answer) if good.streams else [json.loads(answer.body)]
        said = [part["message"]["content"] if "message" in part else part["response"] for part in parts]
        return "".join(said), parts[-1]["done_reason"]
    if not good.streams:
        choice = json.loads(answer.body)["choices"][0]
        return choice["message"]["content"] if "message" in choice else choice["text"], choice["finish_reason"]
    choices = [choice for event in events_of(answer) for choice in event["choices"]]
    pieces = (c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)
    return "".join(pieces), choices[-1]["finish_reason"]
