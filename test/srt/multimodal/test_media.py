"""Media from hostile places: what is fetched, what is refused, and what pixels come of it."""

import asyncio
import base64
import io
import os
import struct
import threading
import time
import urllib.parse
import zlib
from contextlib import suppress
from fractions import Fraction

import aiohttp
import av
import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from rtp_llm.srt.multimodal import videos
from rtp_llm.srt.multimodal.media import MediaLoader, VideoInfo, decode_image, uniform_indices
from rtp_llm.srt.sampling_params import InvalidRequest

COLOURS = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3) * 2


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


PNG = encoded(Image.fromarray(COLOURS))


def load(loader: MediaLoader, source, **options) -> Image.Image:
    return asyncio.run(loader.load_image(source, **options))


def refusal(loader: MediaLoader, source) -> str:
    with pytest.raises(InvalidRequest) as caught:
        load(loader, source)
    assert caught.value.param == "image_data"
    return str(caught.value)


class Server:
    """An HTTP server on a free port of this machine, in a thread of its own."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *error) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/{name:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.requests.append(name)
        if name == "image.png":
            return web.Response(body=PNG)
        if name == "endless":  # no Content-Length at all
            return await self._stream(request, chunks=10_000)
        if name == "lying":
            return web.Response(body=PNG, headers={"Content-Encoding": "gzip"})
        if name == "slow":
            await asyncio.sleep(5)
        if name == "late.png":
            await asyncio.sleep(0.3)
            return web.Response(body=PNG)
        if name == "drip":
            return await self._stream(request, chunks=1000, pause_s=0.05)
        if name == "loop":
            raise web.HTTPFound("/loop")
        if name == "nowhere":
            return web.Response(status=302)
        if name == "to":
            return web.Response(status=302, headers={"Location": request.query["url"]})
        return web.Response(status=404, text="secret")

    async def _stream(self, request: web.Request, chunks: int, pause_s: float = 0) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(chunks):
            await response.write(b"x" * 4096)
            await asyncio.sleep(pause_s)
        return response


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture
def allowing():
    return MediaLoader(allowed_media_domains=["127.0.0.1"], max_file_size_mb=0.1, timeout_s=10)


# URLs


def test_a_url_of_an_allowed_host_is_fetched_although_it_is_private(server, allowing):
    assert np.array_equal(np.asarray(load(allowing, server.url("image.png"))), COLOURS)
    assert np.array_equal(np.asarray(load(allowing, {"url": server.url("image.png"), "detail": "high"})), COLOURS)
    assert np.array_equal(np.asarray(load(allowing, server.url("to?url=/image.png"))), COLOURS)
    assert load(allowing, server.url("image.png").replace("http://", "HTTP://name:word@")).size == (5, 6)


def test_a_name_is_connected_to_at_the_address_that_was_checked(server, monkeypatch):
    """The second time it is asked for, the name means this machine."""
    loader = MediaLoader(timeout_s=2)
    answers = []

    async def getaddrinfo(self, host, port, **options):
        answers.append(host)
        address = "192.0.2.1" if len(answers) > 1 else "127.0.0.1"
        return [(2, 1, 6, "", (address, port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    assert "public internet" in refusal(loader, f"http://rebinding.test:{server.port}/image.png")
    assert answers == ["rebinding.test"]
    # An allowed one is asked for once, and reached where that answer says.
    answers.clear()
    allowing = MediaLoader(allowed_media_domains=["rebinding.test"])
    assert load(allowing, f"http://rebinding.test:{server.port}/image.png").size == (5, 6)
    assert answers == ["rebinding.test"]


def test_one_private_address_among_public_ones_is_refused(monkeypatch):
    async def getaddrinfo(self, host, port, **options):
        return [(2, 1, 6, "", ("8.8.8.8", port)), (2, 1, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    assert "public internet" in refusal(MediaLoader(), "http://both.test/x.png")


@pytest.mark.parametrize(
    "target",
    ["http://localhost:{port}/image.png", "http://[::1]/", "http://169.254.169.254/latest/", "http://8.8.8.8/"],
)
def test_a_redirect_is_checked_as_the_first_url_is(server, allowing, target):
    server.requests.clear()
    message = refusal(allowing, server.url(f"to?url={target.format(port=server.port)}"))
    assert "--allowed-media-domains" in message and "169.254" not in message
    assert server.requests == ["to"]


@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433", "127.0.0.1.", "0", "[::1%25lo]", "１２７.０.０.１"])
def test_a_redirect_to_a_malformed_host_is_refused(server, allowing, host):
    for target in (f"http://{host}:{server.port}/image.png", f"//{host}:{server.port}/image.png"):
        server.requests.clear()
        assert "its host is" in refusal(allowing, server.url("to") + f"?url={urllib.parse.quote(target)}")
        assert server.requests == ["to"]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "data:,x"])
def test_a_redirect_to_another_scheme_is_refused(server, allowing, target):
    assert "no http or https URL" in refusal(allowing, server.url(f"to?url={target}"))


def test_redirects_end(server, allowing):
    assert "more than 5 times" in refusal(allowing, server.url("loop"))
    assert "where to" in refusal(allowing, server.url("nowhere"))


def test_size_and_time_are_limited_while_the_body_arrives(server, allowing):
    assert "0.1 MiB" in refusal(allowing, server.url("endless"))
    begin = time.perf_counter()
    hasty = MediaLoader(allowed_media_domains=["127.0.0.1"], timeout_s=0.3)
    assert "within 0.3 s" in refusal(hasty, server.url("slow"))
    assert "within 0.3 s" in refusal(hasty, server.url("drip"))
    assert time.perf_counter() - begin < 3


def test_the_time_limit_is_the_one_that_was_asked_for(server, allowing, monkeypatch):
    """The client has one of its own, of five minutes."""
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.05))
    assert load(allowing, server.url("late.png")).size == (5, 6)


def test_answers_of_no_use(server, allowing):
    message = refusal(allowing, server.url("missing?token=hidden"))
    assert "404" in message and "secret" not in message and "hidden" not in message
    assert "compressed" in refusal(allowing, server.url("lying"))
    assert "could not be fetched" in refusal(allowing, "http://127.0.0.1:1/x")
    assert "password" not in refusal(allowing, "http://user:password@127.0.0.1:1/x")


@pytest.mark.parametrize(
    "url", ["http://", "http:///x", "http://[::1", "http://a:99999999/", "http://\x00/", "https://"]
)
def test_urls_that_are_none(url):
    refusal(MediaLoader(), url)


@pytest.mark.parametrize("url", ["ftp://x/y.png", "s3://bucket/x", "javascript://x", "unix:///var/run/docker.sock"])
def test_other_schemes_are_refused_by_name(url):
    assert url.partition(":")[0] in refusal(MediaLoader(trusted=True), url)


# Texts


def test_data_uris_and_base64():
    loader, text = MediaLoader(), base64.b64encode(PNG).decode()
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)
    wrapped = "\n".join(text[i : i + 40] for i in range(0, len(text), 40))
    escaped = text.replace("+", "%2B").replace("/", "%2F")
    uris = [f"data:image/png;base64,{text}", f"DATA:;BASE64,{text.rstrip('=')}", f"data:image/png;base64,{escaped}"]
    for source in (*uris, text, wrapped, percent, PNG, bytearray(PNG)):
        assert np.array_equal(np.asarray(load(loader, source)), COLOURS)


@pytest.mark.parametrize(
    "source",
    ["", "data:", "data:image/png;base64", "data:image/png;base64,", "data:image/png;base64,@@@@", "data:,",
     "not an image", "data:image/png;base64,AAAA", b"", 7, None, ["x"], {}, {"url": None}, {"path": "/etc/passwd"},
     "\x00", "é" * 10, "A" * 5, "~/x.png"],
)  # fmt: skip
def test_texts_that_are_no_image(source):
    refusal(MediaLoader(), source)


def test_texts_are_measured_before_they_are_decoded():
    loader = MediaLoader(max_file_size_mb=0.001)
    for source in (
        "data:;base64," + "A" * 4000,
        "A" * 4000,
        "data:," + "%41" * 2000,
        "data:," + "a" * 9000,
        b"a" * 2000,
    ):
        assert "larger than" in refusal(loader, source)


# Files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "in.png").write_bytes(PNG)
    (tmp_path / "open" / "a b.png").write_bytes(PNG)
    (tmp_path / "out.png").write_bytes(PNG)
    (tmp_path / "open2").mkdir()
    (tmp_path / "open2" / "out.png").write_bytes(PNG)
    (tmp_path / "open" / "link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "open" / "good.png").symlink_to("in.png")
    (tmp_path / "open" / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "open" / "pipe.png")
    (tmp_path / "open" / "device.png").symlink_to("/dev/zero")
    return tmp_path


@pytest.mark.parametrize("name", ["in.png", "good.png", "../open/in.png"])
def test_files_below_the_allowed_directory_are_read(folder, name):
    loader = MediaLoader(allowed_local_media_path=str(folder / "open"))
    for source in (
        str(folder / "open" / name),
        f"file://{folder}/open/{name}",
        f"file://localhost{folder}/open/{name}",
        name,
    ):
        assert load(loader, source).size == (5, 6)
    assert load(loader, f"file://{folder}/open/a%20b.png").size == (5, 6)


@pytest.mark.parametrize(
    "name",
    ["open/link.png", "out.png", "open/../out.png", "open2/out.png", "missing.png", "open/missing.png", "open",
     "open/pipe.png", "open/device.png", "open/loop.png", "open/in.png/x"],
)  # fmt: skip
def test_other_files_are_refused_and_nothing_tells_whether_they_exist(folder, name):
    loader = MediaLoader(allowed_local_media_path=str(folder / "open"))
    expected = refusal(loader, f"file://{folder}/nothing.png")
    assert refusal(loader, f"file://{folder}/{name}") == expected and str(folder) not in expected
    assert refusal(loader, str(folder / name)) == refusal(loader, str(folder / "nothing.png"))


def test_no_file_may_be_named_unless_a_directory_is_allowed(folder):
    for source in (f"file://{folder}/open/in.png", str(folder / "open" / "in.png"), "/etc/passwd", "./x.png", "../x"):
        assert "--allowed-local-media-path" in refusal(MediaLoader(), source)
    assert "file:///path" in refusal(MediaLoader(), "file://host/x.png")


def test_a_source_of_no_kind_is_told_what_there_is():
    beginning = "the media are neither a URL, a data: URI nor"
    assert refusal(MediaLoader(), "hello") == f"{beginning} valid base64 text"
    named = refusal(MediaLoader(), "cat.png")
    assert named == f"{beginning} base64 text, and files may not be named here (--allowed-local-media-path)"
    assert refusal(MediaLoader(), "data:image/png;base64,A") == "the data: URI does not hold valid base64"


def test_callers_in_this_process_may_name_any_file(folder, monkeypatch):
    monkeypatch.chdir(folder)
    loader = MediaLoader(trusted=True)
    for source in (folder / "out.png", str(folder / "out.png"), "open/link.png", Image.fromarray(COLOURS)):
        assert np.array_equal(np.asarray(load(loader, source)), COLOURS)
    assert "file" in refusal(loader, "/nothing.png")
    assert "larger" in refusal(MediaLoader(trusted=True, max_file_size_mb=1e-5), folder / "out.png")


# Pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image, exif = Image.fromarray(COLOURS), Image.Exif()
    exif[0x0112] = orientation
    turned = np.asarray(load(MediaLoader(), encoded(image, exif=exif)))
    flipped = {2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1], 5: COLOURS.transpose(1, 0, 2),
               6: np.rot90(COLOURS, -1), 7: COLOURS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(COLOURS)}  # fmt: skip
    assert np.array_equal(turned, flipped.get(orientation, COLOURS))


def test_a_broken_exif_block_is_passed_over():
    image = load(MediaLoader(), encoded(Image.fromarray(COLOURS), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"))
    assert image.size == (5, 6)


def test_transparent_pixels_are_blended_with_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(load(MediaLoader(), encoded(image))).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    kept = load(MediaLoader(), encoded(image), keep_alpha=True)
    assert kept.mode == "RGBA" and kept.getpixel((1, 0)) == (0, 0, 0, 0)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    pixels = np.asarray(load(MediaLoader(), encoded(palette, transparency=1))).tolist()
    assert pixels == [[[10, 20, 30], [255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (100, 0))
    assert load(MediaLoader(), encoded(grey)).getpixel((0, 0)) == (255, 255, 255)


def test_the_pixels_are_those_of_transformers():
    from transformers.image_transforms import convert_to_rgb

    random = np.random.default_rng(0)
    for mode, depth in (("RGB", 3), ("RGBA", 4), ("L", 1), ("LA", 2), ("CMYK", 4)):
        pixels = random.integers(0, 256, (7, 9, depth), dtype=np.uint8).squeeze()
        image = Image.frombytes(mode, (9, 7), pixels.tobytes())
        ours = np.asarray(load(MediaLoader(), encoded(image, "TIFF")))
        assert np.array_equal(ours, convert_to_rgb(image, return_numpy=True)), mode


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "I;16", "I;16B", "LA", "RGBA", "PA", "RGBX"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (3, 2))
    assert load(MediaLoader(trusted=True), image).mode == "RGB"


def test_sixteen_bits_keep_the_upper_eight():
    image = Image.fromarray(np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16))
    assert np.asarray(load(MediaLoader(), encoded(image)))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    wide = Image.fromarray(np.array([[0, 1 << 20]], np.int32))
    assert "16 bits" in refusal(MediaLoader(), encoded(wide, "TIFF"))
    assert "floating-point" in refusal(MediaLoader(), encoded(Image.new("F", (2, 2)), "TIFF"))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_formats_are_taken_whole_and_refused_when_cut_short(file_format):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), file_format)
    assert load(MediaLoader(), data).size == (64, 64)
    for part in (0.9, 0.5, 0.05):
        refusal(MediaLoader(), data[: int(len(data) * part)])


@pytest.mark.parametrize("file_format", ["EPS", "PDF", "ICO", "TGA", "PCX"])
def test_formats_that_are_not_taken(file_format):
    assert "not supported" in refusal(MediaLoader(), encoded(Image.new("RGB", (16, 16)), file_format))


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for file_format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True)
        red = np.asarray(load(MediaLoader(), data))
        assert np.abs(red.astype(int) - [255, 0, 0]).max() < 3, file_format


def test_small_and_wide_images():
    assert load(MediaLoader(), encoded(Image.new("RGB", (1, 1)))).size == (1, 1)
    assert load(MediaLoader(), encoded(Image.new("L", (20_000, 100)))).size == (20_000, 100)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [9_500, 60_000, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(side):
    """A kilobyte that says it holds gigabytes; the pixels behind it are not even there."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    begin = time.perf_counter()
    refusal(MediaLoader(), bomb)
    assert time.perf_counter() - begin < 1


def test_the_pixel_limit_says_both_numbers():
    with pytest.raises(InvalidRequest, match=r"30 x 20 pixels; at most 599"):
        decode_image(encoded(Image.new("RGB", (30, 20))), max_pixels=599)
    assert decode_image(encoded(Image.new("RGB", (30, 20))), max_pixels=600).size == (30, 20)


def test_the_event_loop_goes_on_while_an_image_is_decoded():
    data = encoded(Image.effect_noise((3000, 2000), 50))

    async def ticks_while_loading() -> int:
        task = asyncio.ensure_future(MediaLoader().load_image(data))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert task.result().size == (3000, 2000)
        return ticks

    assert asyncio.run(ticks_while_loading()) > 3


def test_random_bytes_are_refused_politely():
    random, loader = np.random.default_rng(1), MediaLoader()
    for data in (PNG, encoded(Image.fromarray(COLOURS), "JPEG"), encoded(Image.fromarray(COLOURS), "GIF")):
        for _ in range(60):
            broken = bytearray(data)
            for place in random.integers(0, len(data), 4):
                broken[place] = random.integers(256)
            with suppress(InvalidRequest):
                assert load(loader, bytes(broken)).mode == "RGB"


# Videos


def video(num_frames=20, width=64, height=48, fps=10, container="mp4", codec="mpeg4") -> bytes:
    """Frame i is a grey of 10 * i, its left half darker."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            pixels = np.full((height, width, 3), 10 * i + 20, np.uint8)
            pixels[:, : width // 2] = 10 * i
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                output.mux(packet)
        for packet in stream.encode():
            output.mux(packet)
    return file.getvalue()


VIDEO = video()


def load_video(source, loader: MediaLoader | None = None, **options):
    return asyncio.run((loader or MediaLoader()).load_video(source, **options))


def brightness(frames: np.ndarray) -> list[int]:
    return [round(float(frame[:, -10:].mean() - 20) / 10) for frame in frames]


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")],
)
def test_frames_are_chosen_by_rate_and_number(container, codec):
    data = video(container=container, codec=codec, fps=25 if codec == "mpeg2video" else 10)
    whole = load_video(data)
    assert whole.frames.shape == (20, 48, 64, 3) and whole.indices == list(range(20))
    assert brightness(whole.frames) == list(range(20))
    few = load_video(data, max_frames=4)
    assert few.indices == [0, 6, 13, 19] and brightness(few.frames) == [0, 6, 13, 19]
    assert np.allclose(few.timestamps, np.array(few.indices) / few.fps, atol=1e-3)


def test_rates_and_durations():
    found = load_video(VIDEO, fps=2)
    assert (found.fps, found.duration, len(found.indices)) == (10.0, 2.0, 4)
    assert len(load_video(VIDEO, fps=0.1, min_frames=3).indices) == 3
    assert load_video({"url": base64.b64encode(VIDEO).decode(), "max_frames": 2}).indices == [0, 19]
    assert load_video(VIDEO, sample=lambda info: [info.total_frames // 2]).indices == [10]
    with pytest.raises(InvalidRequest, match="fps of a video must be a positive number"):
        load_video({"url": "x", "fps": -1})


def test_uniform_indices():
    info = VideoInfo(total_frames=100, fps=25.0, duration=4.0, height=2, width=2)
    assert uniform_indices(info, fps=1) == [0, 33, 66, 99]
    assert uniform_indices(info) == list(range(100))
    assert uniform_indices(info, max_frames=1) == [0]
    assert len(uniform_indices(info, fps=1000)) == 100


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotation_is_applied(matrix, turns):
    """The matrix of a track's header: (a, b, c, d) sends (x, y) to (a x + c y, b x + d y)."""
    data, (a, b, c, d) = bytearray(VIDEO), matrix
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    turned, plain = load_video(bytes(data)), load_video(VIDEO)
    assert np.array_equal(turned.frames, np.rot90(plain.frames, turns, axes=(1, 2)))


def test_broken_videos_are_refused():
    for source in (b"", b"nothing", VIDEO[:100], VIDEO[: len(VIDEO) // 2], PNG[:20]):
        with pytest.raises(InvalidRequest) as caught:
            load_video(source)
        assert caught.value.param == "video_data"


@pytest.mark.parametrize(
    "playlist",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{url}'\n",
     "<?xml version='1.0'?><MPD><Period><AdaptationSet><BaseURL>{url}</BaseURL></AdaptationSet></Period></MPD>"],
)  # fmt: skip
def test_a_playlist_reaches_nothing(server, tmp_path, playlist):
    (tmp_path / "video.mp4").write_bytes(VIDEO)
    server.requests.clear()
    for url in (server.url("video.ts"), f"file://{tmp_path}/video.mp4", str(tmp_path / "video.mp4")):
        with pytest.raises(InvalidRequest):
            load_video(playlist.format(url=url).encode())
    assert not server.requests


def test_limits_of_videos():
    with pytest.raises(InvalidRequest, match="at most 1 s"):
        load_video(VIDEO, MediaLoader(max_video_duration_s=1))
    with pytest.raises(InvalidRequest, match="20 frames of 64 x 48 pixels were chosen"):
        load_video(VIDEO, MediaLoader(max_video_pixels=19 * 64 * 48))
    assert len(load_video(VIDEO, MediaLoader(max_video_pixels=19 * 64 * 48), max_frames=19).indices) == 19
    with pytest.raises(InvalidRequest, match="too many"):
        load_video(VIDEO, MediaLoader(max_pixels=64 * 48 - 1))


def video_of_frames(*sizes: tuple[int, int], header: tuple[int, int] = (64, 48)) -> bytes:
    """Each frame is a JPEG of its own size, whatever the header says."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as output:
        stream = output.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = *header, "yuvj420p"
        for i, size in enumerate(sizes):
            packet = av.Packet(encoded(Image.new("RGB", size, "teal"), "JPEG"))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 10)
            output.mux(packet)
    return file.getvalue()


def test_frames_that_outgrow_the_first_are_no_way_around_the_limits(monkeypatch):
    """FFmpeg would give each the memory that it asks for."""
    grows = video_of_frames((64, 48), (80, 60), (64, 48))
    assert load_video(grows).frames.shape == (3, 48, 64, 3)
    bomb = (4000, 4000)
    small = MediaLoader(max_pixels=100 * 100)
    for sizes, header in (((64, 48), bomb), (64, 48)), ((bomb, bomb), (64, 48)), ((bomb,), bomb):
        with pytest.raises(InvalidRequest, match=r"cannot be decoded|no size|4000 x 4000 pixels, which is too many"):
            load_video(video_of_frames(*sizes, header=header), small)
    pixels = 2 * 64 * 48 + 80 * 60
    monkeypatch.setattr(videos, "MAX_VIDEO_SOURCE_PIXELS", pixels)
    assert len(load_video(grows).frames) == 3
    monkeypatch.setattr(videos, "MAX_VIDEO_SOURCE_PIXELS", pixels - 1)
    with pytest.raises(InvalidRequest, match="which is too many"):
        load_video(grows)


def test_frames_may_be_given():
    array = np.stack([COLOURS, COLOURS[::-1]])
    images = [Image.fromarray(frame) for frame in array]
    for source in (array, images, list(array)):
        found = load_video(source)
        assert np.array_equal(found.frames, array) and found.indices == [0, 1]
    for wrong in (array.astype(float), array[..., :2], [], np.zeros((0, 2, 2, 3), np.uint8), ["x"]):
        with pytest.raises(InvalidRequest):
            load_video(wrong)


def test_low_detail_makes_large_images_smaller():
    loader = MediaLoader(trusted=True)
    wide = Image.new("RGB", (2000, 500))
    assert load(loader, {"url": wide, "detail": "low"}).size == (512, 128) and wide.size == (2000, 500)
    assert load(loader, {"url": wide, "detail": "high"}).size == load(loader, {"url": wide}).size == (2000, 500)
    assert load(loader, {"url": Image.new("RGB", (300, 512)), "detail": "low"}).size == (300, 512)
    with pytest.raises(InvalidRequest, match="detail must be one of auto, low, high, not 'tiny'"):
        load(loader, {"url": wide, "detail": "tiny"})
