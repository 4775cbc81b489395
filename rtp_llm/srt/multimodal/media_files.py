"""Read the bytes of media: from URLs, ``data:`` URIs, base64 text and files."""

import base64
import binascii
import functools
import os
import re
import stat
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rtp_llm.srt.multimodal.memory import Account, FileLimits
from rtp_llm.srt.multimodal.url_fetcher import UrlFetcher
from rtp_llm.srt.multimodal.work import Workers
from rtp_llm.srt.sampling_params import InvalidRequest

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}")
_SHORTEST_BASE64 = 100  # characters; a shorter text that begins like a path is a path
_MAX_PATH = 4096  # characters; a longer text is no path
_NO_SOURCE = "the media are neither a URL, a data: URI nor"


class MediaFiles:
    """Reads the files of sources.

    Args:
        local_root: directory below which files may be named; None: none may.
        trusted: callers are this process's own code, which may name any file.
    """

    def __init__(
        self, local_root: str | None, trusted: bool, limits: FileLimits, fetcher: UrlFetcher, workers: Workers
    ) -> None:
        self._local_root = None if local_root is None else Path(local_root).resolve()
        self._trusted = trusted
        self._limits = limits
        self._fetcher = fetcher
        self._run = workers.run

    def claim(self, source: Any) -> int:
        """Return the most bytes that a source's file may take."""
        source = source.get("url") if isinstance(source, Mapping) else source
        if isinstance(source, (bytes, bytearray, memoryview)):
            return len(source)
        if not isinstance(source, (str, Path)):
            return 0
        text = str(source)
        is_text = text.lstrip()[:5].lower() == "data:" or len(text) > _MAX_PATH
        return min(len(text), self._limits.max_bytes) if is_text else self._limits.max_bytes

    async def read(self, source: Any, files: Account, param: str) -> bytes:
        """Return a source's file, whose bytes ``files`` accounts for."""
        if isinstance(source, Path):
            source = str(source)
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._limits.check_size(len(source), param)
            await self._limits.take(files, len(source), param)
            return bytes(source)
        if not isinstance(source, str):
            raise InvalidRequest(
                f"media must be a URL, a data: URI, base64 text, a path or bytes, not {type(source).__name__}", param
            )
        text = source.strip()
        scheme = _SCHEME.match(text)
        if scheme is not None and scheme[1].lower() in ("http", "https"):
            return await self._fetcher.fetch(text, files, param)
        if text[:5].lower() == "data:":
            return await self._decoded_text(functools.partial(self._data_uri, text, param), files, len(text), param)
        if scheme is None:
            return await self._file_or_base64(text, files, param)
        if scheme[1].lower() == "file":
            return await self._file_uri(text, files, param)
        raise InvalidRequest(f"media cannot be had by {scheme[1][:20]}://; use http, https, data: or base64", param)

    async def _decoded_text(self, decode: Callable[[], bytes], files: Account, num_chars: int, param: str) -> bytes:
        most = min(num_chars, self._limits.max_bytes)
        await self._limits.take(files, most, param)
        data = await self._run(decode)
        files.give(most - len(data), lower_claim=most - len(data))
        return data

    def _data_uri(self, uri: str, param: str) -> bytes:
        header, comma, payload = uri[5:].partition(",")
        if not comma:
            raise InvalidRequest("the data: URI has no comma between its type and its data", param)
        if header.lower().rstrip().endswith(";base64"):
            return self._base64(urllib.parse.unquote(payload) if "%" in payload else payload, param)
        if len(payload) > 3 * self._limits.max_bytes:  # each byte takes one character, or three if it is escaped
            raise self._limits.too_large(param)
        return self._limits.checked_size(urllib.parse.unquote_to_bytes(payload), param)

    def _base64(self, text: str, param: str, problem: str = "the data: URI does not hold valid base64") -> bytes:
        if len(text) > self._limits.max_bytes * 1.5 + 64:  # 4/3 of the bytes, and line ends
            raise self._limits.too_large(param)
        text = "".join(text.split()).rstrip("=")
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest(problem, param) from None
        if not data:
            raise InvalidRequest("the media are empty", param)
        return self._limits.checked_size(data, param)

    async def _file_uri(self, uri: str, files: Account, param: str) -> bytes:
        parts = urllib.parse.urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise InvalidRequest("a file:// URI must name a file of this machine: file:///path", param)
        file = await self._run(self._open_file, urllib.parse.unquote(parts.path))
        if file is None:
            raise self._no_file(param)
        return await self._read_file(file, files, param)

    async def _file_or_base64(self, text: str, files: Account, param: str) -> bytes:
        """Read a file or base64 text. Base64 may look like a path (JPEG: /9j/), so the file must exist."""
        file = await self._run(self._open_file, text)
        if file is not None:
            return await self._read_file(file, files, param)
        if not (len(text) < _SHORTEST_BASE64 and text.startswith(("/", ".", "~"))) and _BASE64.fullmatch(text):
            decode = functools.partial(self._base64, text, param, f"{_NO_SOURCE} valid base64 text")
            return await self._decoded_text(decode, files, len(text), param)
        raise self._no_file(param, f"{_NO_SOURCE} base64 text, and ")

    def _no_file(self, param: str, beginning: str = "") -> InvalidRequest:
        """Return the error for a file that is missing or not allowed: the same text for both."""
        if self._trusted:
            return InvalidRequest(f"{beginning}there is no such file", param)
        if self._local_root is None:
            return InvalidRequest(f"{beginning}files may not be named here (--allowed-local-media-path)", param)
        return InvalidRequest(
            f"{beginning}there is no file of this name below the directory of --allowed-local-media-path", param
        )

    def _open_file(self, name: str) -> BinaryIO | None:
        """Open a regular file; None if it does not exist or is not allowed."""
        if not (self._trusted or self._local_root) or not name or len(name) > _MAX_PATH:
            return None
        base = Path() if self._trusted or self._local_root is None else self._local_root
        try:
            path = (base / name).resolve(strict=True)
            if not self._trusted and not path.is_relative_to(base):
                return None
            # Not blocking: opening a named pipe would wait for its other end.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (OSError, ValueError, RuntimeError):  # missing, not readable, a null byte, a loop of links
            return None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            return None
        return os.fdopen(handle, "rb")

    async def _read_file(self, file: BinaryIO, files: Account, param: str) -> bytes:
        with file:
            num_bytes = os.fstat(file.fileno()).st_size
            self._limits.check_size(num_bytes, param)
            files.give(0, lower_claim=self._limits.max_bytes - num_bytes)
            await self._limits.take(files, num_bytes, param)
            data = await self._run(file.read, num_bytes)
        files.give(num_bytes - len(data), lower_claim=num_bytes - len(data))
        return data
