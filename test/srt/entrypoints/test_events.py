"""Server-sent events as bytes."""

import json

import pytest

from rtp_llm.srt.entrypoints.asgi import event


@pytest.mark.parametrize("text", [chr(code) for code in (*range(32), 0x7F, 0x85, 0x2028, 0x2029)] + ["東\u2028é\x85🙂"])
def test_an_event_is_one_line_to_every_reader(text: str) -> None:
    sent = event({"text": f"a{text}b", "name": "\\u2028"}).decode()
    [line, empty] = sent.splitlines()
    assert empty == "" and json.loads(line.removeprefix("data: ")) == {"text": f"a{text}b", "name": "\\u2028"}
