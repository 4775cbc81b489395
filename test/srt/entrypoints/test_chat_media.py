"""From a chat request with media to the prompt that the engine gets, with a manager that loads nothing."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.conversation import ChatTemplate, ConversationTemplate
from rtp_llm.srt.entrypoints.errors import ApiError
from rtp_llm.srt.entrypoints.native import GenerateBody, NativeEndpoints, TokenizeBody
from rtp_llm.srt.entrypoints.openai.protocol import ChatCompletionRequest
from rtp_llm.srt.entrypoints.openai.serving_chat import ChatEndpoint
from rtp_llm.srt.entrypoints.serving import Serving
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.sampling_params import InvalidRequest

SEEING = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text if p.type == 'text' else '<' ~ p.type ~ '>' }}{% endfor %}{% endif %};{% endfor %}"
)
IMAGE = {"type": "image_url", "image_url": {"url": "u"}}
VIDEO = {"type": "video_url", "video_url": {"url": "v"}}
TEXT = {"type": "text", "text": "what?"}


class FakeManager:
    """An id per character; images become three ids each."""

    tokenizer = object()
    context_length = 200
    max_req_len = 100

    def __init__(self) -> None:
        self.seen: list[Prompt] = []
        self.submitted: list[Prompt] = []

    def encode(self, text: str, add_special_tokens: bool = True, is_prompt: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(char) for char in text]

    async def with_media(self, prompt: Prompt) -> Prompt:
        self.seen.append(prompt)
        if prompt.image_data == ["broken"]:
            raise InvalidRequest("the image is broken", "image_data")
        ids = self.encode(prompt.text, prompt.add_special_tokens) + [7, 7, 7] * len(prompt.image_data or [])
        return replace(prompt, text=None, input_ids=ids, image_data=None, video_data=None, media=b"media")

    def check_media(self, prompts: Any) -> None:
        pass

    def requests(self, prompt: Prompt) -> list[Any]:
        self.submitted.append(prompt)
        return []


def serving(template: Any, is_multimodal: bool = True, **options: Any) -> Serving:
    args = ServerArgs(model_path="m", **options)
    config = SimpleNamespace(is_multimodal=is_multimodal, generation_defaults={})
    core = SimpleNamespace(
        is_ready=True, client=SimpleNamespace(num_live=0), info=SimpleNamespace(max_running_requests=1)
    )
    return Serving(args, config, core, SimpleNamespace(manager=FakeManager()), template)


class Listening:
    """A request whose client is there, until it hangs up."""

    def __init__(self) -> None:
        self.has_left = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.has_left.wait()
        return {"type": "http.disconnect"}


def submitted(served: Serving, *messages: dict[str, Any], **fields: Any) -> Prompt:
    body = ChatCompletionRequest.model_validate({"messages": list(messages), **fields})
    asyncio.run(ChatEndpoint(served)._answers(body, Listening()))
    return served.manager.submitted[-1]


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_media_go_through_the_manager_and_texts_do_not() -> None:
    served = serving(ChatTemplate(SEEING))
    prompt = submitted(served, user(IMAGE, TEXT, VIDEO), rid="r", cache_salt="s", logprobs=True)
    (seen,) = served.manager.seen
    assert (seen.text, seen.image_data, seen.video_data, seen.add_special_tokens) == (
        "<image>what?<video>;",
        ["u"],
        ["v"],
        False,
    )
    assert prompt.media == b"media" and prompt.input_ids[-3:] == [7, 7, 7]
    assert prompt.options == {"rid": "r", "cache_salt": "s", "return_logprob": True, "top_logprobs_num": 0}
    assert prompt.sampling_params.max_new_tokens is None and prompt.default_max_new_tokens is None, "all that is left"
    text = submitted(served, user(TEXT))
    assert text.media is None and len(served.manager.seen) == 1


def test_how_media_are_to_be_looked_at_goes_along() -> None:
    low = {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}
    few = {"type": "video_url", "video_url": {"url": "v", "max_frames": 4, "fps": None}}
    served = serving(ChatTemplate(SEEING))
    submitted(served, user(low, IMAGE, few, VIDEO, TEXT))
    [seen] = served.manager.seen
    assert seen.image_data == [{"url": "u", "detail": "low"}, "u"]
    assert seen.video_data == [{"url": "v", "max_frames": 4}, "v"]


def test_a_conversation_s_stops_join_the_request_s() -> None:
    served = serving(ConversationTemplate("chatml"))
    params = submitted(served, user(TEXT), stop=["END"], stop_token_ids=[5]).sampling_params
    assert params.stop == ["END", "<|endoftext|>", "<|im_end|>"] and params.stop_token_ids == [5]
    assert served.manager.submitted[0].input_ids[0] == 1  # encoded with the tokenizer's special tokens


def test_tokenize_counts_media() -> None:
    served = serving(ChatTemplate(SEEING))
    body = TokenizeBody.model_validate({"messages": [user(IMAGE, TEXT)]})
    answer = json.loads(asyncio.run(NativeEndpoints(served, CollectorRegistry()).tokenize(body, Listening())).body)
    assert answer["count"] == len("<image>what?;") + 3 and answer["tokens"][-3:] == [7, 7, 7]


@pytest.mark.parametrize("kind", ["chat", "stream", "generate", "tokenize"])
def test_hanging_up_ends_the_loading_of_media(kind: str) -> None:
    served = serving(ChatTemplate(SEEING))
    ended = []

    async def with_media(prompt: Prompt) -> Prompt:
        request.has_left.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(prompt)
        return prompt

    async def ask() -> int:
        messages = [user(IMAGE, TEXT)]
        native = NativeEndpoints(served, CollectorRegistry())
        if kind == "generate":
            answer = await native.generate(GenerateBody(text="<image>", image_data="u"), request)
        elif kind == "tokenize":
            answer = await native.tokenize(TokenizeBody.model_validate({"messages": messages}), request)
        else:
            body = ChatCompletionRequest.model_validate({"messages": messages, "stream": kind == "stream"})
            answer = await ChatEndpoint(served).create(body, request)
        return answer.status_code

    request: Any = Listening()
    served.manager.with_media = with_media
    assert asyncio.run(asyncio.wait_for(ask(), 10)) == 499
    assert len(ended) == 1 and not served.manager.submitted


@pytest.mark.parametrize(
    ("served", "parts", "words"),
    [
        (serving(ChatTemplate(SEEING), False), [TEXT, IMAGE], "content[1] is an image, and this model takes text only"),
        (serving(ChatTemplate(SEEING)), [{"type": "input_audio", "input_audio": {}}], "content[0] is audio, and this"),
        (
            serving(ChatTemplate(SEEING), limit_mm_data_per_request='{"image": 1}'),
            [IMAGE, IMAGE],
            "hold 2 images, and this server takes at most 1",
        ),
        (serving(ChatTemplate(SEEING)), [{"type": "image_url", "image_url": "broken"}], "the image is broken"),
    ],
)
def test_what_cannot_be_taken_is_a_400(served: Serving, parts: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ApiError) as caught:
        submitted(served, {"role": "user", "content": "hi"}, user(*parts))
    assert caught.value.status == 400 and caught.value.param == "messages"
    assert words in str(caught.value)
