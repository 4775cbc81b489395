"""Server-sent events, and lines of JSON, as bytes."""

import json

import pytest

from rtp_llm.srt.entrypoints.asgi import event, line


@pytest.mark.parametrize("text", [chr(code) for code in (*range(32), 0x7F, 0x85, 0x2028, 0x2029)] + ["東\u2028é\x85🙂"])
def test_an_event_is_one_line_to_every_reader(text: str) -> None:
    sent = event({"text": f"a{text}b", "name": "\\u2028"}).decode()
    [data, empty] = sent.splitlines()
    assert empty == "" and json.loads(data.removeprefix("data: ")) == {"text": f"a{text}b", "name": "\\u2028"}
    [alone] = line({"text": f"a{text}b"}).decode().splitlines()
    assert json.loads(alone) == {"text": f"a{text}b"}
