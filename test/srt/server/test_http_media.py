"""Images and videos over HTTP: asked by OpenAI's client, counted, cached, refused, and through the core's death."""

import asyncio
import base64
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import pytest
import transformers
from mm_parity import draw_image, joined, of_kind, token_types, vision_reference
from PIL import Image

from rtp_llm.srt.checkpoint import read_model_config, read_processor, read_tokenizer
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.managers.tokenizer_manager import Prompt, TokenizerManager
from rtp_llm.srt.multimodal.items import Modality, MultimodalInputs
from tiny_models import assert_same_ids
from tiny_seeing import IMAGE, VIDEO, VIDEO_PAD, make_seeing
from tiny_server import Process, own_process

pytestmark = pytest.mark.xdist_group("server-process")

CAT, DOG = draw_image(56, 84, seed=1), draw_image(84, 56, seed=2)
NUM_NEW = 8
GREEDY = {"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True}


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(image), "detail": "auto"}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def seeing_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_seeing(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def seeing(seeing_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    flags = ["--dtype", "float32", "--limit-mm-data-per-request", '{"image": 3}', "--chunked-prefill-size", "24"]
    folder = tmp_path_factory.mktemp("server")
    with own_process(folder, seeing_checkpoint, *flags, "--allowed-local-media-path", str(folder)) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def client(seeing: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, timeout=60) as connected:
        yield connected


def mp4(num_frames: int = 12, fps: int = 6) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        for seed in range(num_frames):
            output.mux(stream.encode(av.VideoFrame.from_image(draw_image(84, 56, seed))))
        output.mux(stream.encode())
    return file.getvalue()


def expected_ids(
    model_dir: str, text: str, *images: Image.Image, video: dict[str, Any] | None = None
) -> tuple[list[int], Any]:
    """(ids of the prompt, what transformers answers)."""
    args = ServerArgs(model_path=model_dir, dtype="float32", device="cpu")
    config = read_model_config(args)
    tokenizer = read_tokenizer(args, config)
    processor = read_processor(args, config, tokenizer, trusted=True)
    manager = TokenizerManager(tokenizer, config.vocab_size, 1024, 1024, processor=processor)
    asked = Prompt(text=text, image_data=list(images), video_data=video, add_special_tokens=False)
    prompt = asyncio.run(manager.with_media(asked))
    media = MultimodalInputs.decode(prompt.media.content)
    model = transformers.AutoModelForImageTextToText.from_pretrained(model_dir, dtype="float32").eval()
    seen, watched = of_kind(media, Modality.IMAGE), of_kind(media, Modality.VIDEO)
    options = {
        "pixel_values": joined(seen),
        "image_grid_thw": joined(seen, "image_grid_thw"),
        "pixel_values_videos": joined(watched),
        "video_grid_thw": joined(watched, "video_grid_thw"),
        "mm_token_type_ids": token_types(prompt.input_ids, media),
    }
    return prompt.input_ids, vision_reference(
        model, prompt.input_ids, {name: value for name, value in options.items() if value is not None}
    )


def test_a_chat_about_two_images(seeing: Process, seeing_checkpoint: str, client: openai.OpenAI) -> None:
    content = [text_part("Is "), image_part(CAT), text_part(" like "), image_part(DOG), text_part("?")]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=NUM_NEW,
        logprobs=True,
        extra_body={"ignore_eos": True},
    )
    text = f"user:Is {IMAGE} like {IMAGE}?\nassistant:"
    prompt_ids, expected = expected_ids(seeing_checkpoint, text, CAT, DOG)
    tokenizer = transformers.AutoTokenizer.from_pretrained(seeing_checkpoint)
    assert answer.choices[0].message.content == tokenizer.decode(expected.output_ids, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == len(prompt_ids)
    logprobs = [entry.logprob for entry in answer.choices[0].logprobs.content]
    assert logprobs == pytest.approx(expected.output_logprobs, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "num_times"), [({}, 2), ({"fps": 6}, 6), ({"max_frames": 2}, 1), ({"fps": 4, "max_frames": 6}, 3)]
)
def test_a_chat_about_a_video(
    seeing: Process, seeing_checkpoint: str, client: openai.OpenAI, options: dict[str, Any], num_times: int
) -> None:
    """Two seconds of it: two frames per second, unless the message says otherwise. Two frames make one time."""
    video = {"url": "data:video/mp4;base64," + base64.b64encode(mp4()).decode(), **options}
    content: Any = [text_part("Watch "), {"type": "video_url", "video_url": video}, text_part("!")]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=NUM_NEW,
        extra_body={"ignore_eos": True},
    )
    prompt_ids, expected = expected_ids(seeing_checkpoint, f"user:Watch {VIDEO}!\nassistant:", video=video)
    for video_data in (video, [video], *([video["url"]] if not options else [])):  # in /generate, one or a list
        body = {"text": f"user:Watch {VIDEO}!\nassistant:", "video_data": video_data, "sampling_params": GREEDY}
        generated = httpx.post(f"{seeing.url}/generate", json=body, timeout=60).raise_for_status().json()
        assert_same_ids(generated["output_ids"], expected)
    assert prompt_ids.count(VIDEO_PAD) == num_times * (84 // 28) * (56 // 28)
    assert answer.usage.prompt_tokens == len(prompt_ids)
    tokenizer = transformers.AutoTokenizer.from_pretrained(seeing_checkpoint)
    assert answer.choices[0].message.content == tokenizer.decode(expected.output_ids, skip_special_tokens=True)


def test_an_image_in_the_first_of_three_turns(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": [image_part(draw_image(70, 70, seed=5)), text_part("What?")]}]
    cached = []
    for question in ("And then?", "Why?", ""):
        answer = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=5, extra_body={"ignore_eos": True}
        )
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        before = answer.usage.prompt_tokens
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": question},
        ]
    assert cached[0] < 10 and cached[1] > 4 and cached[2] > cached[1] and cached[2] > before // 2


def test_generate_takes_images_from_where_it_may(seeing: Process, seeing_checkpoint: str) -> None:
    CAT.save(seeing.log.parent / "cat.png")
    text = f"See {IMAGE}!"
    _, expected = expected_ids(seeing_checkpoint, text, CAT)
    for source in (data_uri(CAT), data_uri(CAT).partition(",")[2], str(seeing.log.parent / "cat.png")):
        body = {"text": text, "image_data": source, "sampling_params": GREEDY}
        answer = httpx.post(f"{seeing.url}/generate", json=body, timeout=60).raise_for_status().json()
        assert_same_ids(answer["output_ids"], expected)


def test_generate_takes_images_in_every_shape(seeing: Process, seeing_checkpoint: str) -> None:
    """One, an object, a list; for several prompts one for all, one each, a list each, and none."""
    text, cat, dog = f"See {IMAGE}!", data_uri(CAT), data_uri(DOG)
    two = f"{IMAGE} or {IMAGE}"
    of_cat, of_dog = (expected_ids(seeing_checkpoint, text, image)[1] for image in (CAT, DOG))
    of_both = expected_ids(seeing_checkpoint, two, CAT, DOG)[1]
    cases: list[tuple[str | list[str], Any, list[Any]]] = [
        (text, cat, [of_cat]),
        (text, {"url": cat, "detail": "high"}, [of_cat]),
        (text, [cat], [of_cat]),
        (two, [cat, {"url": dog}], [of_both]),
        ([text], [cat], [of_cat]),
        ([text, text], cat, [of_cat, of_cat]),
        ([text, text], [cat, dog], [of_cat, of_dog]),
        ([text, two], [[cat], [cat, dog]], [of_cat, of_both]),
        ([text, "No image", two], [cat, None, [cat, dog]], [of_cat, None, of_both]),
        (["No image", text], [[], [dog]], [None, of_dog]),
    ]
    for prompt, image_data, expected in cases:
        body = {"text": prompt, "image_data": image_data, "sampling_params": GREEDY}
        answers = httpx.post(f"{seeing.url}/generate", json=body, timeout=60).raise_for_status().json()
        assert isinstance(answers, list) is isinstance(prompt, list)
        for answer, reference in zip(answers if isinstance(answers, list) else [answers], expected, strict=True):
            if reference is not None:
                assert_same_ids(answer["output_ids"], reference)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": "See!", "image_data": [data_uri(CAT)]}, "Prompt has 0 image placeholders but 1 image inputs"),
        ({"text": IMAGE * 4, "image_data": [data_uri(CAT)] * 4}, "at most 3"),
        ({"text": IMAGE, "image_data": ["data:image/png;base64,AAAA"]}, "image"),
        ({"text": IMAGE, "image_data": ["/etc/passwd"]}, "allowed-local-media-path"),
        ({"text": IMAGE, "image_data": ["http://127.0.0.1:9/cat.png"]}, "not on the public internet"),
        ({"text": "Hear!", "audio_data": ["data:audio/wav;base64,AAAA"]}, "audio"),
        ({"text": VIDEO, "video_data": ["data:video/mp4;base64,AAAA"]}, "video"),
        ({"text": IMAGE, "image_data": 5}, "image_data: Input should be a valid string or dictionary or list, not 5"),
        ({"text": IMAGE, "image_data": [[data_uri(CAT)]]}, "not list"),
        ({"text": [IMAGE] * 2, "image_data": [data_uri(CAT)]}, "image_data is a list of 1 values for 2 prompts"),
        (
            {"text": ["x", IMAGE * 2], "image_data": [None, [data_uri(CAT), "hello"]]},
            "text 1: image 2 of 2: the media are neither a URL, a data: URI nor valid base64 text",
        ),
    ],
)
def test_what_is_wrong_is_told(seeing: Process, body: dict[str, Any], words: str) -> None:
    answer = httpx.post(f"{seeing.url}/generate", json=body | {"sampling_params": GREEDY}, timeout=60)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


def test_a_model_of_text_refuses_images(server_process: Process) -> None:
    messages = [{"role": "user", "content": [image_part(CAT), text_part("What?")]}]
    for path, body in [
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 4}),
        ("/generate", {"text": "a cat", "image_data": data_uri(CAT)}),
    ]:
        answer = httpx.post(f"{server_process.url}{path}", json=body, timeout=60)
        assert answer.status_code == 400, answer.text
        assert "image" in answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_killed_core_changes_no_answer_about_an_image(seeing: Process, seeing_checkpoint: str) -> None:
    num_new = 300
    text = f"Tell of {IMAGE} and {IMAGE}"
    body = {"text": text, "image_data": [data_uri(CAT), data_uri(DOG)], "stream": True}
    body["sampling_params"] = GREEDY | {"max_new_tokens": num_new}
    whole = httpx.post(f"{seeing.url}/generate", json=body | {"stream": False}, timeout=120).json()
    httpx.post(f"{seeing.url}/flush_cache", timeout=60).raise_for_status()
    last, killed = None, False
    with httpx.stream("POST", f"{seeing.url}/generate", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            last = httpx.Response(200, content=line.removeprefix("data: ")).json()
            if not killed and len(last["output_ids"]) > 20:
                [core] = seeing.children()
                os.kill(core, signal.SIGKILL)
                killed = True
    assert killed and last["output_ids"] == whole["output_ids"]
    assert last["meta_info"]["prompt_tokens"] == whole["meta_info"]["prompt_tokens"]


def test_bytes_in_the_process(seeing_checkpoint: str, tmp_path: Path) -> None:
    """The offline engine's callers may give images in more ways."""
    from rtp_llm import Engine

    buffer = io.BytesIO()
    CAT.save(buffer, "PNG")
    (tmp_path / "cat.png").write_bytes(buffer.getvalue())
    text = f"See {IMAGE}!"
    _, expected = expected_ids(seeing_checkpoint, text, CAT)
    with Engine(model_path=seeing_checkpoint, device="cpu", dtype="float32", max_total_tokens=1024) as engine:
        for source in (CAT, buffer.getvalue(), str(tmp_path / "cat.png"), {"url": data_uri(CAT)}):
            assert_same_ids(engine.generate(text, GREEDY, image_data=source)["output_ids"], expected)

        async def in_a_loop() -> Any:
            streamed = [engine.generate(text, GREEDY, image_data=CAT)]  # even where a loop is running
            streamed.append(await engine.async_generate(text, GREEDY, image_data=[CAT]))
            return streamed

        for result in asyncio.run(in_a_loop()):
            assert_same_ids(result["output_ids"], expected)
