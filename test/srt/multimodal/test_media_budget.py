"""Media under a budget: bombs are known by their headers, prompts wait for room, and nobody works for who has left."""

import asyncio
import io
import struct
import threading
import time
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
import transformers
from aiohttp import web
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from rtp_llm.srt.managers.tokenizer_manager import Prompt, TokenizerManager
from rtp_llm.srt.multimodal import decoder_process, images, media, memory, videos
from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from rtp_llm.srt.multimodal.decoder_process import decode_apart
from rtp_llm.srt.multimodal.estimates import Prepared
from rtp_llm.srt.multimodal.images import ImageHeader, decode_image, read_header
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem
from rtp_llm.srt.multimodal.media import MediaLoader
from rtp_llm.srt.multimodal.work import Workers, check_stopped
from rtp_llm.srt.sampling_params import ContextLengthExceeded, InvalidRequest

MIB = memory.MIB
WORDS = ["<bos>", "a", "<image>", "<pad>", "<video>"]


def make_tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<unk>"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<pad>", "<video>"]})
    return fast


TOKENIZER = make_tokenizer()
CONFIG = SimpleNamespace(architectures=["X"], get_text_config=lambda: SimpleNamespace(hidden_size=4))


class XProcessor(BaseMultimodalProcessor):
    """An image, or a frame, is one token and twelve numbers for each hundred pixels of its width."""

    models = ["X"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mm_tokens = MultimodalSpecialTokens(
            image_token="<image>", image_token_id=3, video_token="<video>", video_token_id=3
        ).build(self._processor)

    def prepared_image(self, height: int, width: int) -> Prepared:
        return Prepared(-(-width // 100), 12 * -(-width // 100))

    def prepared_video(self, num_frames: int, height: int, width: int) -> Prepared:
        return Prepared(num_frames, 12 * num_frames)

    def image_item(self, image: Image.Image) -> MultimodalDataItem:
        check_stopped()
        return MultimodalDataItem(Modality.IMAGE, torch.zeros(-(-image.width // 100), 12))

    def video_item(self, video: media.VideoFrames) -> MultimodalDataItem:
        return MultimodalDataItem(Modality.VIDEO, torch.zeros(len(video.frames), 12))

    def replacement(self, item: MultimodalDataItem) -> str:
        return "<pad>" * len(item.feature)

    async def process_mm_data_async(self, image_data, audio_data, input_text, request_obj, **kwargs):  # type: ignore[no-untyped-def]
        return await self.process(image_data, audio_data, input_text, request_obj)


def manager_of(
    budget_mb: float = 2048, limits: Any = None, trusted: bool = True, most_tokens: int = 5000, **options: Any
) -> TokenizerManager:
    loader = MediaLoader(trusted=trusted, memory_budget_mb=budget_mb, **options)
    processor = XProcessor(CONFIG, None, TOKENIZER, loader=loader)
    return TokenizerManager(TOKENIZER, 100, 5000, most_tokens, processor=processor, media_limits=limits)


def room_of(manager: TokenizerManager) -> memory.Room:
    return manager._processor.loader.memory.pixels  # type: ignore[union-attr]


def check_all_given_back(manager: TokenizerManager) -> None:
    budget = manager._processor.loader.memory  # type: ignore[union-attr]
    for room in (budget.pixels, budget.files):
        assert (room.held, room.num_waiting, room._accounts) == (0, 0, {})


def asked(*sources: Any, kind: str = "image") -> Prompt:
    return Prompt(text=f"<{kind}>" * len(sources), **{f"{kind}_data": list(sources)})


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def movie(num_frames: int = 8, width: int = 64, height: int = 48) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            image = np.full((height, width, 3), 10 * (i % 20), np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


# Bombs


def png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def webp_bomb(width: int, height: int) -> bytes:
    """A whole lossless image in 28 bytes: codes of one symbol each need no bits for the pixels."""
    fields = [(0x2F, 8), (width - 1, 14), (height - 1, 14), (0, 1), (0, 3), (0, 1), (0, 1), (0, 1)]
    fields += [(1, 1), (0, 1), (0, 1), (0, 1)] * 5
    value = sum(field << sum(bits for _, bits in fields[:i]) for i, (field, _) in enumerate(fields))
    data = value.to_bytes(-(-sum(bits for _, bits in fields) // 8), "little")
    body = b"WEBPVP8L" + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_bomb(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_bomb(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (16, 16)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


BOMBS = {"png": png_bomb, "webp": webp_bomb, "jpeg": jpeg_bomb, "gif": gif_bomb}


@pytest.fixture
def nothing_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*arguments: Any) -> None:
        raise AssertionError("it was decoded")

    for name in ("decode_image", "decode_apart", "decode_video"):
        monkeypatch.setattr(media, name, decode)
    monkeypatch.setattr(videos, "_upright", decode)


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.usefixtures("nothing_decoded")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_above_the_budget_is_refused_by_its_header(kind: str) -> None:
    bomb = BOMBS[kind](16_000, 4_800)
    manager = manager_of(budget_mb=100)
    with pytest.raises(InvalidRequest, match=r"the image would take .* --media-memory-budget-mb") as caught:
        asyncio.run(manager.with_media(asked(bomb)))
    assert caught.value.param == "image_data"
    with pytest.raises(InvalidRequest, match=r"^image [23] of 3: the image would take .* --media-memory-budget-mb"):
        asyncio.run(manager.with_media(asked(encoded(noise(3, 3)), bomb, bomb)))
    with pytest.raises(InvalidRequest, match="--media-memory-budget-mb"):
        asyncio.run(MediaLoader(memory_budget_mb=100).load_image(bomb))
    check_all_given_back(manager)


@pytest.mark.usefixtures("nothing_decoded")
def test_images_that_fit_one_by_one_but_not_together_are_refused() -> None:
    manager = manager_of(budget_mb=200)
    with pytest.raises(InvalidRequest, match=r"images and videos together would take .* --media-memory-budget-mb"):
        asyncio.run(manager.with_media(asked(*[png_bomb(2000, 1500)] * 20)))
    check_all_given_back(manager)


@pytest.mark.usefixtures("nothing_decoded")
def test_a_video_above_the_budget_is_refused_by_its_header() -> None:
    for data, mb in (
        (movie(num_frames=40, width=640, height=480), 20),
        (movie(num_frames=1, width=4000, height=3000), 200),
    ):
        manager = manager_of(budget_mb=mb)
        with pytest.raises(InvalidRequest, match=r"the video would take .* --media-memory-budget-mb") as caught:
            asyncio.run(manager.with_media(asked(data, kind="video")))
        assert caught.value.param == "video_data"
        check_all_given_back(manager)


def test_a_video_without_a_size_is_refused() -> None:
    head = b"GIF89a" + b"\xff" * 4 + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    data = head + b"!\xf9\4\0\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D"
    manager = manager_of(budget_mb=100)
    with pytest.raises(InvalidRequest, match="tells no size that its frames could have"):
        asyncio.run(manager.with_media(asked(data, kind="video")))
    check_all_given_back(manager)


@pytest.mark.usefixtures("nothing_decoded")
def test_files_above_the_budget_are_refused() -> None:
    manager = manager_of(budget_mb=2)
    with pytest.raises(InvalidRequest, match=r"files, larger than the 0.5 MiB .* --media-memory-budget-mb"):
        asyncio.run(manager.with_media(asked(bytes(MIB))))
    check_all_given_back(manager)


def test_a_decoder_gets_no_more_memory_than_the_header_said() -> None:
    """A process that decodes has a limit of its own."""
    large = webp_bomb(16_000, 4_800)
    lie = ImageHeader("WEBP", 10, 10, 100, 2000)
    with pytest.raises((EOFError, ConnectionError)):
        decode_apart(large, lie, 80_000_000, False, False)
    honest = webp_bomb(1600, 480)
    assert decode_apart(honest, read_header(honest), 80_000_000, False, False).size == (1600, 480)


def test_a_jp2_whose_codestream_is_larger_than_its_header_says() -> None:
    data = bytearray(encoded(noise(600, 400), "JPEG2000"))
    place = data.index(b"ihdr") + 4
    data[place : place + 8] = struct.pack(">II", 4, 6)
    with pytest.raises(InvalidRequest, match="cannot be decoded"):
        asyncio.run(MediaLoader().load_image(bytes(data)))


def test_sizes_in_headers_are_as_shown() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    header = read_header(encoded(noise(60, 40), "JPEG", exif=exif))
    assert (header.width, header.height, header.num_file_pixels) == (40, 60, 2400)
    header = read_header(encoded(Image.new("RGB", (8000, 4000)), "JPEG", exif=exif), is_low=True)
    assert (header.width, header.height) == (256, 512)
    assert decode_image(encoded(Image.new("RGB", (8000, 4000)), "JPEG", exif=exif), is_low=True).size == (256, 512)
    whole = read_header(encoded(Image.new("RGB", (8000, 4000)), "JPEG"))
    assert header.need.alone < whole.need.alone / 10, "in low detail a JPEG is decoded at a smaller size"


# Waiting


def test_prompts_wait_and_never_hold_more_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they hold is what was told: at most so many images are being decoded."""
    data, running, most_running = encoded(noise(600, 400)), 0, 0
    lock = threading.Lock()
    real = decode_image

    def counted(*arguments: Any) -> Image.Image:
        nonlocal running, most_running
        with lock:
            running += 1
            most_running = max(most_running, running)
        time.sleep(0.01)
        try:
            return real(*arguments)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(media, "decode_image", counted)
    manager = manager_of(budget_mb=20)
    room = room_of(manager)

    async def run() -> None:
        prompts = [asked(*[data] * (1 + i % 3)) for i in range(16)]
        done = await asyncio.wait_for(asyncio.gather(*map(manager.with_media, prompts)), 120)
        assert [prompt.input_ids.count(3) for prompt in done] == [6 * (1 + i % 3) for i in range(16)]

    asyncio.run(run())
    one = 600 * 400 * 13
    assert 2 * one < room.most_held <= room.size and most_running <= room.size // one
    check_all_given_back(manager)


def test_who_hangs_up_waits_no_more_and_the_next_goes_on() -> None:
    manager = manager_of(budget_mb=20)
    room = room_of(manager)

    async def run() -> None:
        with room.account(room.size) as all_of_it:
            await all_of_it.take(room.size)
            first, second = (asyncio.ensure_future(manager.with_media(asked(encoded(noise(60, 40))))) for _ in range(2))
            while room.num_waiting < 2:
                await asyncio.sleep(0.01)
            first.cancel()
            await asyncio.wait([first])
            assert first.cancelled() and room.num_waiting == 1
        assert (await asyncio.wait_for(second, 30)).media

    asyncio.run(run())
    check_all_given_back(manager)


@pytest.mark.parametrize("seed", range(3))
def test_random_prompts_all_end(seed: int) -> None:
    """Good and broken, cancelled at any time, with files that come slowly, through a budget for two or three."""
    draw = np.random.default_rng(seed)
    image = encoded(noise(300, 200), "JPEG")
    broken = image[:-500]

    async def answer(request: web.Request) -> web.StreamResponse:
        body = image if request.path == "/good" else broken
        response = web.StreamResponse(headers={"Content-Length": str(len(body))} if draw.random() < 0.5 else {})
        await response.prepare(request)
        for start in range(0, len(body), 4096):
            await response.write(body[start : start + 4096])
            await asyncio.sleep(0.001)
        return response

    async def run() -> TokenizerManager:
        app = web.Application()
        app.router.add_get("/{name}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        manager = manager_of(budget_mb=4, allowed_media_domains=["127.0.0.1"], max_file_size_mb=0.5)
        sources = [f"{url}/good", image, movie(), f"{url}/bad", broken]
        tasks = []
        for _ in range(40):
            chosen = [sources[i] for i in draw.choice(5, draw.integers(1, 4), p=[0.5, 0.3, 0.0, 0.1, 0.1])]
            prompt = asked(*chosen) if draw.random() < 0.8 else asked(sources[2], kind="video")
            tasks.append(asyncio.ensure_future(manager.with_media(prompt)))
            await asyncio.sleep(draw.random() * 0.01)
            if draw.random() < 0.2:
                tasks[draw.integers(len(tasks))].cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 120)
        await runner.cleanup()
        for result in results:
            assert isinstance(result, (Prompt, InvalidRequest, asyncio.CancelledError)), result
        assert sum(isinstance(result, Prompt) for result in results) > 5
        return manager

    manager = asyncio.run(run())
    assert room_of(manager).most_held <= room_of(manager).size
    check_all_given_back(manager)


# Leaving


def cancelled_while(
    decoding: threading.Event, manager: TokenizerManager, prompt: Prompt, then: Callable[[], None] = lambda: None
) -> float:
    """Seconds from hanging up until nothing is left of it."""

    async def run() -> float:
        task = asyncio.ensure_future(manager.with_media(prompt))
        while not decoding.is_set():
            assert not task.done(), task.exception()
            await asyncio.sleep(0.005)
        begin = time.perf_counter()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        then()
        return time.perf_counter() - begin

    elapsed_s = asyncio.run(run())
    check_all_given_back(manager)
    return elapsed_s


def test_an_image_is_not_decoded_to_its_end_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, reads = threading.Event(), threading.Event(), []

    class Watched(images.WatchedFile):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            reads.append(len(data))
            if sum(reads) > 1 << 18:  # it is being decoded, not only looked at
                begun.set()
                go_on.wait(30)
            return data

    monkeypatch.setattr(images, "WatchedFile", Watched)
    data = encoded(noise(1500, 1000))
    task_gone = threading.Timer(0.2, go_on.set)  # after the client has left
    task_gone.start()
    cancelled_while(begun, manager_of(), asked(data))
    assert sum(reads) < len(data) / 2


def test_a_video_is_not_decoded_to_its_end_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, seen = threading.Event(), []
    real = videos._unless_stopped

    def counted(values: Any) -> Any:
        for value in real(values):
            if isinstance(value, av.VideoFrame):
                seen.append(value)
                begun.set()
                time.sleep(0.02)
            yield value

    monkeypatch.setattr(videos, "_unless_stopped", counted)
    cancelled_while(begun, manager_of(), asked(movie(num_frames=300), kind="video"))
    assert 0 < len(seen) < 100


def test_a_decoding_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, children = threading.Event(), []
    real = decoder_process.start_python

    def started(module: str) -> Any:
        children.append(real(module))
        begun.set()
        return children[-1]

    monkeypatch.setattr(decoder_process, "start_python", started)
    cancelled_while(begun, manager_of(), asked(webp_bomb(16_000, 2_000)))
    assert [child.process.poll() is not None for child in children] == [True]


def test_preparing_stops_between_images(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, prepared = threading.Event(), []
    real = XProcessor.image_item

    def image_item(self: XProcessor, image: Image.Image) -> MultimodalDataItem:
        prepared.append(image)
        begun.set()
        time.sleep(0.1)
        return real(self, image)

    monkeypatch.setattr(XProcessor, "image_item", image_item)
    cancelled_while(begun, manager_of(), asked(*[noise(9, 9)] * 30))
    assert len(prepared) < 10


def test_what_waits_for_a_thread_is_never_begun() -> None:
    async def run() -> list[str]:
        workers, go_on, begun = Workers(1, "test"), threading.Event(), []

        def work(name: str) -> None:
            begun.append(name)
            go_on.wait(30)

        first = asyncio.ensure_future(workers.run(work, "first"))
        second = asyncio.ensure_future(workers.run(work, "second"))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.wait([second])
        go_on.set()
        await first
        assert await workers.run(lambda: 5) == 5
        return begun

    assert asyncio.run(run()) == ["first"]


def test_room_is_held_until_a_thread_has_really_ended() -> None:
    async def run() -> None:
        workers, go_on, ended = Workers(1, "test"), threading.Event(), []

        def work() -> None:
            go_on.wait(30)
            ended.append(True)

        task = asyncio.ensure_future(workers.run(work))
        await asyncio.sleep(0.05)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.02)
        assert not task.done()
        go_on.set()
        await asyncio.wait([task])
        assert task.cancelled() and ended

    asyncio.run(run())


# Numbers and lengths


def test_more_than_a_request_may_have_are_refused_before_any_is_looked_at() -> None:
    limits = {"image": 3, "video": 1}
    server, own = manager_of(limits=limits, trusted=False), manager_of(limits=limits)
    words = r"comes with 4 of kind image, and this server takes at most 3 in a request \(--limit-mm-data-per-request\)"
    for manager in (server, own):
        with pytest.raises(InvalidRequest, match=words) as caught:
            asyncio.run(manager.with_media(asked(*["http://nowhere.invalid/x.png"] * 4)))
        assert caught.value.param == "image_data"
    two = [asked("x", "x"), Prompt(text="a"), asked("x", "x")]
    own.check_media(two)  # this process's own code may send many prompts at once
    with pytest.raises(InvalidRequest, match=words):
        server.check_media(two)
    server.check_media([asked("x", "x"), Prompt(text="<image>", image_data="x")])


@pytest.mark.usefixtures("nothing_decoded")
def test_what_cannot_fit_into_the_context_is_not_decoded() -> None:
    manager = manager_of(most_tokens=40)
    words = r"^This model's maximum context length is 40 tokens: the prompt's media alone have at least 41"
    for prompt in (asked(png_bomb(4001, 10)), asked(*[png_bomb(1999, 10)] * 2, png_bomb(10, 10))):
        with pytest.raises(ContextLengthExceeded, match=words) as caught:
            asyncio.run(manager.with_media(prompt))
        assert caught.value.param == "image_data"
    with pytest.raises(ContextLengthExceeded, match=words):  # none of them is even looked for
        asyncio.run(manager.with_media(asked(*["http://nowhere.invalid/x.png"] * 41)))
    with pytest.raises(ContextLengthExceeded, match=words) as caught:
        asyncio.run(manager.with_media(asked({"url": movie(num_frames=41), "fps": 10}, kind="video")))
    assert caught.value.param == "video_data"
    check_all_given_back(manager)
