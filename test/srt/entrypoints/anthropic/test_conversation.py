"""From Anthropic's messages to those that chat templates take."""

from typing import Any

import pytest

from rtp_llm.srt.entrypoints.anthropic.conversation import converted
from rtp_llm.srt.entrypoints.anthropic.protocol import CountTokensRequest
from rtp_llm.srt.sampling_params import InvalidRequest

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
CALL = {"type": "tool_use", "id": "c1", "name": "now", "input": {"zone": "UTC"}}
BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=a1b2c;"


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "c1", "content": content, **more}


def body(*messages: tuple[str, Any], **fields: Any) -> CountTokensRequest:
    return CountTokensRequest(messages=[{"role": role, "content": content} for role, content in messages], **fields)


def messages_of(*messages: tuple[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return converted(body(*messages, **fields)).messages


@pytest.mark.parametrize(
    ("system", "content"),
    [
        ("Be kind.", "Be kind."),
        ([text("Be kind.")], "Be kind."),
        ([text("Be kind."), text("Be short.")], [text("Be kind."), text("Be short.")]),
        (f"{BILLING}\nBe kind.", "Be kind."),
        (f"{BILLING}\nx-anthropic-session: 7\n\nBe kind.\n{BILLING}", f"Be kind.\n{BILLING}"),
        ([text(BILLING), text("Be kind.")], "Be kind."),
        ([text(f"{BILLING}\n")], None),
        ("", None),
        ([], None),
    ],
)
def test_system(system: Any, content: Any) -> None:
    expected = [] if content is None else [{"role": "system", "content": content}]
    assert messages_of(("user", "Hi"), system=system) == [*expected, {"role": "user", "content": "Hi"}]


def test_a_system_message_between_others() -> None:
    assert messages_of(("user", "Hi"), ("system", f"{BILLING}\nBe kind.")) == [
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Be kind."},
    ]


def test_an_assistants_blocks() -> None:
    thinking = {"type": "thinking", "thinking": "Hm", "signature": "x"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
    assert messages_of(("user", "Hi"), ("assistant", [hidden, thinking, text("I look."), CALL]))[1] == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm",
        "tool_calls": [call],
    }
    assert messages_of(("assistant", [CALL]))[0] == {"role": "assistant", "tool_calls": [call]}
    omitted = {"type": "thinking", "thinking": "", "signature": "x"}
    assert messages_of(("assistant", [omitted, text("a"), text("b")]))[0] == {"role": "assistant", "content": "a\nb"}
    assert messages_of(("assistant", []))[0] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("block", "content"),
    [
        (result("noon"), "noon"),
        (result([text("noon")]), "noon"),
        (result([text("noon"), text("sharp")]), [text("noon"), text("sharp")]),
        (result(None), ""),
        (result([]), ""),
        (result("no clock", is_error=True), "Error: no clock"),
        (result("error: no clock", is_error=True), "error: no clock"),
        (result([], is_error=True), "Error"),
        (result("noon", is_error=False), "noon"),
    ],
)
def test_a_result(block: dict[str, Any], content: Any) -> None:
    """It knows the name of what was called."""
    made = messages_of(("assistant", [CALL]), ("user", [block, text("And now?")]))
    assert made[1:] == [
        {"role": "tool", "tool_call_id": "c1", "name": "now", "content": content},
        {"role": "user", "content": "And now?"},
    ]


def test_a_users_blocks_stay_in_order() -> None:
    made = messages_of(("user", [text("Look"), IMAGE, result([text("noon"), IMAGE]), result("one"), text("So?")]))
    tool = {"role": "tool", "tool_call_id": "c1"}
    assert made == [
        {"role": "user", "content": [text("Look"), IMAGE_PART]},
        tool | {"content": "noon"},
        tool | {"content": "one"},
        {"role": "user", "content": [IMAGE_PART, text("So?")]},
    ]
    url = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    part = {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
    assert messages_of(("user", [url])) == [{"role": "user", "content": [part]}]
    assert messages_of(("user", [])) == [{"role": "user", "content": ""}]


@pytest.mark.parametrize(
    ("role", "block", "words"),
    [
        ("user", CALL, r"messages\[0\].content\[1\] is of type 'tool_use', which a message of role 'user' cannot hold"),
        ("assistant", result("x"), "'tool_result'"),
        ("assistant", IMAGE, "'image'"),
        ("system", IMAGE, "'image'"),
    ],
)
def test_blocks_in_the_wrong_message(role: str, block: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        messages_of((role, [text("a"), block]))


def test_errors_name_the_requests_own_places() -> None:
    request = body(("user", [result([text("a"), IMAGE]), text("b")]), ("user", "c"), system=[text("d"), text("e")])
    made = converted(request)
    for ours, theirs in (
        ("messages[0] and messages[0].content[1]", "system and system[1]"),
        ("messages[1].content is", "messages[0].content[0].content is"),
        ("messages[2].content[0]", "messages[0].content[0].content[1]"),
        ("messages[2].content[1].text", "messages[0].content[1].text"),
        ("messages[3].content[5]", "messages[1].content[5]"),
        ("messages[9]", "messages[9]"),
    ):
        with pytest.raises(InvalidRequest) as caught, made.naming_places():
            raise InvalidRequest(ours, "messages")
        assert (str(caught.value), caught.value.param) == (theirs, "messages")
