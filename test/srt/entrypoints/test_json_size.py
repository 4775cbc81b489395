"""How much a JSON text holds, counted without parsing it."""

import json
import random
from typing import Any

import pytest

from rtp_llm.srt.entrypoints import json_size
from rtp_llm.srt.entrypoints.edge import MAX_CONTAINERS
from rtp_llm.srt.entrypoints.json_size import MAX_MEMBERS, MAX_VALUES, check_json_size
from rtp_llm.srt.sampling_params import InvalidRequest


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[" + b"[]," * MAX_CONTAINERS + b"[]]", f"{MAX_CONTAINERS} lists and objects"),
        (b"[" + b"{}," * MAX_CONTAINERS + b"{}]", f"{MAX_CONTAINERS} lists and objects"),
        (b"[" * (MAX_CONTAINERS + 1), f"{MAX_CONTAINERS} lists and objects"),
        (b'{"a":0' + b',"":0' * MAX_MEMBERS + b"}", f"{MAX_MEMBERS} members of objects"),
        (b"[0" + b",0" * (MAX_VALUES + 1) + b"]", f"{MAX_VALUES} values"),
        (b'[""' + b',""' * (MAX_VALUES + 1) + b"]", f"{MAX_VALUES} values"),
    ],
)
def test_what_holds_too_much_is_refused(body: bytes, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        check_json_size(body)


@pytest.mark.parametrize(
    "text", ["[{:,]" * 10**6, '"' * 10**6, "\\" * 10**6, '\\"[{' * 10**5, "é[" * 10**6, "\n{" * 10**6]
)
def test_what_stands_in_a_text_does_not_count(text: str) -> None:
    check_json_size(json.dumps({"text": text}).encode())
    check_json_size(json.dumps({"text": text}, ensure_ascii=False).encode())


def counts(value: Any) -> tuple[int, int, int]:
    """Containers, members and commas of a value."""
    if not isinstance(value, (dict, list)):
        return 0, 0, 0
    inner = [counts(item) for item in (value.values() if isinstance(value, dict) else value)]
    containers, members, commas = map(sum, zip(*inner, strict=True)) if inner else (0, 0, 0)
    return containers + 1, members + len(value) * isinstance(value, dict), commas + max(len(value) - 1, 0)


def test_counts_are_exact_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_size, "BLOCK", 7)
    draw = random.Random(0)

    def value(depth: int) -> Any:
        text = "".join(draw.choice('a"\\[]{}:,é') for _ in range(draw.randrange(6)))
        if depth == 0 or draw.random() < 0.3:
            return text
        items = [value(depth - 1) for _ in range(draw.randrange(5))]
        return items if draw.random() < 0.5 else {f"{text}{i}": item for i, item in enumerate(items)}

    for _ in range(200):
        seen: dict[str, int] = {}
        monkeypatch.setattr(json_size, "_check", lambda what, count, _limit, seen=seen: seen.update({what: count}))
        body = value(4)
        check_json_size(json.dumps(body).encode())
        assert (seen["lists and objects"], seen["members of objects"], seen["values"]) == counts(body), body
