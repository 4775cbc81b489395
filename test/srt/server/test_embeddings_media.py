"""Vectors of conversations and of images: by HTTP and offline, as transformers computes them."""

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
import transformers
from mm_parity import draw_image, feed_qwen, open_vision_engine
from torch.nn.functional import normalize

from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_seeing import IMAGE, make_seeing
from tiny_server import InProcess, in_process

pytestmark = pytest.mark.xdist_group("server-embeddings-media")

PICTURE = draw_image(56, 84)
TEXT = f"See {IMAGE} here"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_seeing(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def seeing(checkpoint: str) -> Iterator[InProcess]:
    with in_process(checkpoint, convert="embed", dtype="float32", context_length=768) as running:
        yield running


@torch.inference_mode()
def expected(checkpoint: str, ids: list[int], media: MultimodalInputs) -> torch.Tensor:
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    options = {key: value for key, value in feed_qwen(ids, media).items() if value is not None}
    outputs = model(input_ids=torch.tensor([ids]), output_hidden_states=True, **options)
    return normalize(outputs.hidden_states[-1][0, -1], dim=0)


def test_images_are_in_the_vector(checkpoint: str, seeing: InProcess) -> None:
    with open_vision_engine(checkpoint, convert="embed") as engine:
        prepared = asyncio.run(engine.tokenizer_manager.with_media(Prompt(text=TEXT, image_data=[PICTURE])))
        assert prepared.media is not None
        wanted = expected(checkpoint, prepared.input_ids, MultimodalInputs.decode(prepared.media.content))
        both = engine.encode([TEXT, "See nothing"], image_data=[[PICTURE], None])
        torch.testing.assert_close(torch.tensor(both[0]["embedding"]), wanted, atol=1e-5, rtol=0)
        again = asyncio.run(engine.async_encode(TEXT, image_data=[PICTURE]))
        torch.testing.assert_close(torch.tensor(again["embedding"]), wanted, atol=1e-5, rtol=0)
        with pytest.raises(InvalidRequest, match="prompt 1: an input with media is not cut"):
            engine.encode(["a", TEXT], image_data=[None, [PICTURE]], truncate_prompt_tokens=4)
        with pytest.raises(InvalidRequest, match="taken by encode"):
            engine.score(TEXT, "a", image_data=PICTURE)
    content = [{"type": "text", "text": "See "}, image_part(), {"type": "text", "text": " here"}]
    answer = post(seeing, {"messages": [{"role": "user", "content": content}]}).json()
    text = f"user:{TEXT}\n"
    with open_vision_engine(checkpoint, convert="embed") as engine:
        [vector] = engine.encode([text], image_data=[[PICTURE]])
    assert answer["data"][0]["embedding"] == pytest.approx(list(vector["embedding"]), abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == vector["meta_info"]["prompt_tokens"]


def image_part() -> dict[str, Any]:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def post(server: InProcess, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": [{"role": "user", "content": "a"}], "input": "a"}, "either input or messages"),
        ({"messages": []}, "messages"),
        ({"input": "a", "add_generation_prompt": True}, "are for messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]}, ""),
        ({"messages": [{"role": "user", "content": "a " * 900}]}, "maximum context length is 768"),
    ],
)
def test_conversations_that_cannot_be_embedded(seeing: InProcess, body: dict[str, Any], words: str) -> None:
    response = post(seeing, body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_a_conversation_ends_where_it_is_asked_to(seeing: InProcess) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    ended, begun = (post(seeing, {"messages": messages, "add_generation_prompt": begins}) for begins in (False, True))
    texts = post(seeing, {"input": ["user:the cat\n", "user:the cat\nassistant:"]}).json()["data"]
    for answer, text in zip((ended, begun), texts, strict=True):
        assert answer.json()["data"][0]["embedding"] == pytest.approx(text["embedding"], abs=1e-5)
