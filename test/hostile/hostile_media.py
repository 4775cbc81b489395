"""Images and videos that claim more than they hold, addresses that a server must not visit, and a few good ones."""

import base64
import struct
import zlib
from random import Random


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, pixels: bytes | None = None) -> bytes:
    """Return a PNG of 8-bit RGB. ``pixels``: rows with their filter bytes; None: all black."""
    rows = b"\0" * (height * (3 * width + 1)) if pixels is None else pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def png_with_text_bomb() -> bytes:
    """Compressed text of 16 MiB in a picture of one pixel."""
    text = _chunk(b"zTXt", b"x\0\0" + zlib.compress(b"a" * (1 << 24), 9))
    whole = png(1, 1)
    return whole[:33] + text + whole[33:]


def webp(width: int, height: int) -> bytes:
    """Lossless, of the size that it claims; with hardly any pixels behind that."""
    size = (width - 1) | (height - 1) << 14
    stream = b"\x2f" + struct.pack("<I", size) + b"\0" * 12
    return _riff(b"VP8L" + struct.pack("<I", len(stream)) + stream + b"\0" * (len(stream) % 2))


def webp_lossy(width: int, height: int) -> bytes:
    stream = b"\x30\x01\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + b"\0" * 20
    return _riff(b"VP8 " + struct.pack("<I", len(stream)) + stream)


def _riff(chunk: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def gif(width: int, height: int, num_frames: int) -> bytes:
    """Each frame of one pixel, on a screen of the size that is claimed."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\0\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return head + frame * num_frames + b";"


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 64, 0, 0, 54) + info + b"\0" * 64


def jpeg_header(width: int, height: int) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"\1\x22\0\2\x11\1\3\x11\1"
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0\x3f\0"


def tiff_loop() -> bytes:
    """A directory of images whose next directory is itself."""
    entry = struct.pack("<HHII", 256, 3, 1, 60000)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 8)


def mp4(num_bytes: int) -> bytes:
    return struct.pack(">I", 24) + b"ftypisom\0\0\2\0isomiso2" + struct.pack(">I", num_bytes) + b"moov" + b"\0" * 64


def bombs() -> dict[str, bytes]:
    """By name; each is small, and claims to be large, endless or something else."""
    return {
        "webp 16383 x 4880": webp(16383, 4880),
        "webp 16384 x 16384": webp(16384, 16384),
        "lossy webp 16383 x 4880": webp_lossy(16383, 4880),
        "gif 65535 x 65535": gif(65535, 65535, 1),
        "gif 4000 x 4000, 2000 frames": gif(4000, 4000, 2000),
        "gif of 50000 frames": gif(2, 2, 50_000),
        "png 2147483647 x 2147483647": png(2**31 - 1, 2**31 - 1, b"\0" * 64),
        "png 60000 x 60000": png(60000, 60000, b"\0" * 64),
        "png 0 x 0": png(0, 0, b""),
        "png 8000 x 8000, no pixels": png(8000, 8000, b""),
        "png 1 x 20000": png(1, 20_000),
        "png 20000 x 1": png(20_000, 1),
        "png with a text bomb": png_with_text_bomb(),
        "bmp 65535 x 65535": bmp(65535, 65535),
        "bmp of negative height": bmp(16, -(2**31)),
        "jpeg 65535 x 65535": jpeg_header(65535, 65535),
        "tiff that loops": tiff_loop(),
        "mp4 of 4 GiB": mp4(2**32 - 1),
        "cut png": png(64, 64)[:-30],
        "zip": b"PK\3\4" + b"\0" * 200,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "nothing": b"",
        "zeros": b"\0" * 4096,
    }


def forbidden_sources(port: int) -> list[str]:
    """What leads to this machine, where something listens at ``port``, to its files or to nowhere."""
    hosts = [
        "127.0.0.1", "localhost", "LOCALHOST.", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "0.0.0.0",
        "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]", "[64:ff9b::7f00:1]", "user:word@127.0.0.1",
        "public.example@127.0.0.1", "①②⑦.⓪.⓪.①", "127.0.0.1%00.example", "127。0。0。1", "[fe80::1%25lo]",
    ]  # fmt: skip
    return [
        *(f"http://{host}:{port}/image.png" for host in hosts),
        f"HTTP://127.0.0.1:{port}/", f"http:///127.0.0.1:{port}/", f"http:127.0.0.1:{port}", f"//127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}\r\nHost: other/", f" http://127.0.0.1:{port}/ ",
        f"http://127.0.0.1:{port}#@x.example/",
        f"https://127.0.0.1:{port}/", "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/",
        "http://[fd00::1]/",
        "http://127.0.0.1:99999/", "http://127.0.0.1:-1/", "http://[/", "http://", "http://\x00/",
        "http://" + "a" * 70_000,
        f"ftp://127.0.0.1:{port}/", f"gopher://127.0.0.1:{port}/_x", "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "file:///dev/zero", "/etc/passwd", "/proc/self/environ", "../../../etc/passwd", "~/.ssh/id_rsa", "data:,",
        "data:",
        "data:image/png;base64,", "data:image/png;base64,%%%", "data:image/png;base64," + "A" * 50_000,
        "javascript:1",
        "concat:/etc/passwd|/etc/hosts", "subfile,,start,0,end,9,,:/etc/passwd", "\ud800", "",
    ]  # fmt: skip


def good_png(draw: Random) -> bytes:
    """A square of one color on another, of some size."""
    side = draw.choice((112, 120, 128))
    ground, color = (bytes(draw.choice((0, 200, 255)) for _ in range(3)) for _ in range(2))
    low, high = side // 3, 2 * side // 3
    rows = (
        b"\0" + b"".join(color if low <= x < high and low <= y < high else ground for x in range(side))
        for y in range(side)
    )
    return png(side, side, b"".join(rows))
