"""From Ollama's messages to those that chat templates take."""

from typing import Any

import pytest
from pydantic import ValidationError

from rtp_llm.srt.entrypoints.ollama.conversation import of_chat, of_completion
from rtp_llm.srt.entrypoints.ollama.protocol import ChatBody, GenerateBody
from rtp_llm.srt.sampling_params import InvalidRequest

IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:;base64,AA=="}}


def messages_of(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return of_chat(ChatBody.model_validate({"messages": list(messages)})).messages


def called(*names: str, **fields: Any) -> dict[str, Any]:
    calls = [{"function": {"name": name, "arguments": {"zone": "UTC"}}, **fields} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def test_texts_and_thinking() -> None:
    assert messages_of(
        {"role": "System", "content": "Be kind."},
        {"role": "user", "content": "Hi", "images": [], "tool_calls": None},
        {"role": "assistant", "content": "Hello", "thinking": "Hm"},
        {"role": "user"},
    ) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "Hm"},
        {"role": "user", "content": ""},
    ]


def test_images_come_first() -> None:
    both, alone = messages_of(
        {"role": "user", "content": "What is this?", "images": ["AA=="]}, {"role": "user", "images": ["AA=="] * 2}
    )
    assert both["content"] == [IMAGE_PART, {"type": "text", "text": "What is this?"}]
    assert alone["content"] == [IMAGE_PART, IMAGE_PART]


@pytest.mark.parametrize("image", ["https://example.com/a.png", "data:image/png;base64,AA==", "file:///etc/passwd"])
def test_an_image_names_no_place(image: str) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\].images\[1\] must be base64 alone"):
        messages_of({"role": "user", "content": "Hi", "images": ["AA==", image]})
    with pytest.raises(InvalidRequest, match=r"^images\[0\] must be base64 alone"):
        of_completion(GenerateBody.model_validate({"prompt": "Hi", "images": [image]}))


def test_calls_get_ids() -> None:
    [message] = messages_of(called("now", "later"))
    calls = message["tool_calls"]
    assert "content" not in message and len({call["id"] for call in calls}) == 2
    assert calls[0]["type"] == "function" and calls[0]["function"] == {"name": "now", "arguments": {"zone": "UTC"}}
    assert messages_of(called("now", id="c1"))[0]["tool_calls"][0]["id"] == "c1"


@pytest.mark.parametrize(
    ("results", "answered"),
    [
        ([{}, {}], [0, 1]),
        ([{"tool_name": "later"}, {"tool_name": "now"}], [1, 0]),
        ([{"name": "later"}, {}], [1, 0]),
        ([{"tool_name": "later", "name": "later"}, {}], [1, 0]),
        ([{"tool_call_id": "c1"}, {"tool_call_id": "c0"}], [1, 0]),
    ],
)
def test_results_find_their_calls(results: list[dict[str, Any]], answered: list[int]) -> None:
    names = ("now", "later")
    call = called(*names)
    for i, item in enumerate(call["tool_calls"]):
        item["id"] = f"c{i}"
    told = messages_of(call, *({"role": "tool", "content": "x", **result} for result in results))[1:]
    assert told == [{"role": "tool", "content": "x", "tool_call_id": f"c{i}", "name": names[i]} for i in answered]


def test_two_calls_of_one_function_are_answered_in_order() -> None:
    call = called("now", "now")
    told = messages_of(call, *[{"role": "tool", "content": "x", "tool_name": "now"}] * 2)
    assert [message["tool_call_id"] for message in told[1:]] == [item["id"] for item in told[0]["tool_calls"]]


def test_a_result_of_no_call_says_what_it_knows() -> None:
    assert messages_of({"role": "tool", "content": "x"}) == [{"role": "tool", "content": "x"}]
    assert messages_of(called("now"), {"role": "tool", "content": "x", "tool_name": "other"})[1]["name"] == "other"
    with pytest.raises(ValidationError, match="name and tool_name differ"):
        messages_of({"role": "tool", "content": "x", "name": "a", "tool_name": "b"})


def test_a_prompt() -> None:
    body = GenerateBody.model_validate({"prompt": "Hi", "system": "Be kind.", "images": ["AA=="]})
    assert of_completion(body).messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "Hi"}]},
    ]
    assert of_completion(GenerateBody.model_validate({"prompt": "Hi", "system": ""})).messages == [
        {"role": "user", "content": "Hi"}
    ]


@pytest.mark.parametrize(
    ("error", "place"),
    [
        ("messages[1].content[0] is an image", "messages[1].images[0] is an image"),
        ("messages[1].content[1] is bad", "messages[1].content is bad"),
        ("messages[0]: x", "messages[0]: x"),
    ],
)
def test_places_in_errors(error: str, place: str) -> None:
    user = {"role": "user", "content": "Hi"}
    made = of_chat(ChatBody.model_validate({"messages": [user, user | {"images": ["AA=="]}]}))
    with pytest.raises(InvalidRequest) as caught, made.naming_places():
        raise InvalidRequest(error, "messages")
    assert str(caught.value) == place


def test_places_in_errors_of_a_prompt() -> None:
    body = {"prompt": "Hi", "system": "x", "images": ["AA=="]}
    made = of_completion(GenerateBody.model_validate(body))
    with pytest.raises(InvalidRequest) as caught, made.naming_places():
        raise InvalidRequest("messages[0], messages[1], messages[1].content[0], messages[1].content[1]")
    assert str(caught.value) == "system, prompt, images[0], prompt"
