"""Requests whose bodies are harmless and whose heads, framing, methods and paths are not."""

from random import Random

UNKNOWN_PATHS = (
    "/", "//", "/v1", "/v1/", "/v1/chat/completions/", "/v1//completions", "/V1/COMPLETIONS",
    "/v1/completions?x=1&x=2",
    "/v1/completions#a", "/..", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/%63ompletions", "/%00",
    "/a%00b",
    "/%ff%fe", "/v1/models/%00", "/v1/models/%ff", "/v1/models/..%2f..%2fx", "/v1/models/" + "a" * 20_000,
    "/v1/models//x/y",
    "/openapi.json", "/docs", "/redoc", "/docs/x", "/" + "a" * 60_000, "/favicon.ico", "/v1/embeddings",
    "/v1/responses", "/api", "/api/", "/api/nope", "/api/chat/", "/api/pull", "/api/delete", "/api/embed",
    "/api/blobs/%00",
    "/health/", "/metrics/", "*", "http://127.0.0.1/health", "http://other.example/v1/models", "/;/x", "/static/../x",
    "/?" + "a" * 30_000,
    "/static/%2e%2e/%2e%2e/main.py", "/é", "/\\..\\x", "/v1/models?model=" + "%41" * 5000,
)  # fmt: skip
METHODS = (
    "GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "QUERY",
    "A" * 500, "M-SEARCH",
)  # fmt: skip
UPGRADE = b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n"
CONTENT_TYPES = (
    "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "multipart/form-data",
    "application/json; charset=utf-16",
    "application/json;charset=\"", "APPLICATION/JSON", "application/json, text/plain", "application/xml",
    "application/octet-stream", "application/jsonx",
    "application/vnd.api+json", "*/*", "application/json\t", "a" * 8000, "application/json; " + "a=b;" * 1000,
)  # fmt: skip


def framing(path: str, body: bytes, draw: Random) -> tuple[bytes, bool]:
    """A whole request, and whether it is one that must be answered."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n".encode()
    size, chunked = str(len(body)).encode(), b"Transfer-Encoding: chunked\r\n"
    good_chunks = chunks(body, draw)
    return draw.choice(
        (
            (head + chunked + b"\r\n" + good_chunks + b"0\r\n\r\n", True),
            (head + chunked + b"\r\n" + good_chunks + b"0\r\nX-Trailer: 1\r\n\r\n", True),
            (head + chunked + b"\r\n" + good_chunks.replace(b"\r\n", b";x=y\r\n", 1) + b"0\r\n\r\n", False),
            (head + chunked + b"\r\n" + good_chunks.replace(b"\r\n", b"\n"), False),
            (head + chunked + b"\r\nffffffffffffffff\r\n" + body, False),
            (head + chunked + b"\r\n-5\r\n" + body, False),
            (head + chunked + b"\r\nzz\r\n" + body, False),
            (head + chunked + b"\r\n0x5\r\nhello\r\n0\r\n\r\n", False),
            (head + chunked + b"\r\n" + b"1\r\n \r\n" * 3000 + good_chunks + b"0\r\n\r\n", True),
            (head + chunked + b"Content-Length: " + size + b"\r\n\r\n" + good_chunks + b"0\r\n\r\n", False),
            (head + b"Content-Length: 3\r\n" + chunked + b"\r\n" + good_chunks + b"0\r\n\r\n", False),
            (head + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + good_chunks + b"0\r\n\r\n", False),
            (head + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + good_chunks + b"0\r\n\r\n", False),
            (head + b"Transfer-Encoding: identity\r\nContent-Length: " + size + b"\r\n\r\n" + body, False),
            (head + b"Transfer-Encoding: xchunked\r\n\r\n" + good_chunks + b"0\r\n\r\n", False),
            (head + b"Transfer-Encoding : chunked\r\n\r\n" + good_chunks + b"0\r\n\r\n", False),
            (head + b"Content-Length: " + size + b"\r\nContent-Length: " + size + b"\r\n\r\n" + body, False),
            (head + b"Content-Length: " + size + b"\r\nContent-Length: 1\r\n\r\n" + body, False),
            (head + b"Content-Length: " + size + b", " + size + b"\r\n\r\n" + body, False),
            (head + b"Content-Length: +" + size + b"\r\n\r\n" + body, False),
            (head + b"Content-Length: -1\r\n\r\n" + body, False),
            (head + b"Content-Length: 1e3\r\n\r\n" + body, False),
            (head + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + body, False),
            (head + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + body, False),
            (head + "Content-Length: ٣\r\n\r\n".encode() + body, False),
            (head + b"Content-Length: 99999999999\r\n\r\n" + body, False),
            (head + b"Content-Length: \r\n\r\n" + body, False),
            (head + b"\r\n" + body, False),
            (head + b"Expect: 100-continue\r\nContent-Length: " + size + b"\r\n\r\n" + body, True),
            (head + b"Expect: x\r\nContent-Length: " + size + b"\r\n\r\n" + body, False),
        )
    )


def headers(path: str, body: bytes, draw: Random) -> bytes:
    """A whole request, or what may be taken for one."""
    first = f"POST {path} HTTP/1.1\r\n".encode()
    rest = b"Content-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    host = b"Host: x\r\n"
    return draw.choice(
        (
            first + host + b"X-Big: " + b"a" * draw.choice((8000, 60_000, 70_000, 1_000_000)) + b"\r\n" + rest,
            first + host + b"".join(b"X-%d: a\r\n" % i for i in range(draw.choice((90, 200, 5000)))) + rest,
            first + host + b"Cookie: " + b"a=b;" * 1000 + b"\r\n" + rest,
            first + rest,
            first + host * 2 + rest,
            first + b"Host: \r\n" + rest,
            first + b"Host: " + draw.choice((b"a b", b"\xff", b"x" * 5000, b"evil.example", b"x:99999", b"[::1",
            b"a@b", b"x/../y")) + b"\r\n" + rest,
            first + host + b"Bad Header: 1\r\n" + rest,
            first + host + b": empty\r\n" + rest,
            first + host + b"X-Null: a\0b\r\n" + rest,
            first + host + b"X-Bytes: \x80\xff\r\n" + rest,
            first + host + b"X-Folded: a\r\n b\r\n" + rest,
            first + host + b"no colon\r\n" + rest,
            first.replace(b"HTTP/1.1", draw.choice((b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/9.9",
            b"HTTP/1.1 x", b"http/1.1", b"ICY/1"))) + host + rest,
            first + host + UPGRADE + rest,
            first + host + b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n" + rest,
            first + host + b"X-Request-Id: " + draw.choice((b"", b"a" * 500, b"\xff", b"a b", b"a\tb",
            b"ok-1")) + b"\r\n" + rest,
            first + host + b"Authorization: " + draw.choice((b"Bearer", b"Bearer \xff", b"Basic eDp5",
            b"Bearer " + b"a" * 9000)) + b"\r\n" + rest,
            first + host + b"Origin: null\r\nAccept-Encoding: gzip, br\r\nRange: bytes=0-0\r\n" + rest,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 300,
            b"\r\n" * draw.choice((1, 5, 3000)) + first + host + rest,
            b"GET /health\r\n\r\n",
            b"\0" * 100,
            (first + host + rest).replace(b"\r\n", b"\n"),
        )
    )  # fmt: skip


def chunks(body: bytes, draw: Random) -> bytes:
    parts, at = [], 0
    while at < len(body):
        piece = body[at : at + draw.choice((1, 3, 20, 1000))]
        parts.append(b"%x\r\n%s\r\n" % (len(piece), piece))
        at += len(piece)
    return b"".join(parts)
