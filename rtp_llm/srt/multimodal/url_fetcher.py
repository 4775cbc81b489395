"""Fetch media by http and https, from allowed hosts (``hosts.py``), with a deadline and a budget of memory."""

import asyncio
import io
import re
import urllib.parse
from collections.abc import Sequence

import aiohttp
from yarl import URL

from rtp_llm.srt.multimodal.hosts import (
    PublicResolver,
    check_public,
    host_of,
    plain_host,
    public_socket,
    refusal_in,
)
from rtp_llm.srt.multimodal.memory import MIB, Account, FileLimits
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.version import __version__

MAX_REDIRECTS = 5
GROWTH = MIB  # bytes that a growing file takes at once


class UrlFetcher:
    """Fetches URLs.

    Args:
        domains: the only hosts that URLs may name, those of private networks included; None: all hosts but those whose
            addresses are not public.
        timeout_s: until a URL must have been fetched, redirects included.
    """

    def __init__(self, domains: Sequence[str] | None, timeout_s: float, limits: FileLimits) -> None:
        self._domains = None if domains is None else {plain_host(name) for name in domains}
        self._timeout_s = timeout_s
        self._limits = limits

    async def fetch(self, text: str, files: Account, param: str) -> bytes:
        """Return the content of an http or https URL, whose bytes ``files`` accounts for."""
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                return await self._follow(text, files, deadline, param)
        except TimeoutError:
            raise InvalidRequest(
                f"{_shown(text)} was not fetched within {self._timeout_s:g} s (--media-io-timeout)", param
            ) from None
        except _Refused as error:
            raise InvalidRequest(f"{_shown(text)}: {error}", param) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(f"{_shown(text)}: {refusal_in(error) or 'it could not be fetched'}", param) from None

    async def _follow(self, text: str, files: Account, deadline: asyncio.Timeout, param: str) -> bytes:
        """Fetch a URL and follow redirects one by one: each is checked like the first."""
        url = self._checked_url(text)
        # No compression: a small body that expands to a large one could not be limited while it arrives.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"rtp-llm/{__version__}"}
        connector = aiohttp.TCPConnector(
            resolver=PublicResolver(self._may_be_private),
            use_dns_cache=False,
            socket_factory=public_socket if self._domains is None else None,
        )
        async with aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(),  # no timeout of aiohttp's
        ) as session:
            for _ in range(MAX_REDIRECTS + 1):
                async with session.get(url, allow_redirects=False) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        return await self._body(response, files, deadline, param)
                    location = response.headers.get("Location")
                if not location:
                    raise _Refused("the server redirects without saying where to")
                url = self._checked_url(urllib.parse.urljoin(str(url), location))
        raise _Refused(f"it is redirected more than {MAX_REDIRECTS} times")

    def _checked_url(self, text: str) -> URL:
        """Return a URL with an allowed host in canonical form."""
        host = host_of(text)
        if self._domains is None:
            check_public(host)
        elif host not in self._domains:
            raise _Refused("its host is not one of those that may be fetched from (--allowed-media-domains)")
        url = URL(text)
        if plain_host(url.raw_host or "") != host:
            raise _Refused("its host can be read in two ways")
        return url

    def _may_be_private(self, host: str) -> bool:
        return self._domains is not None and plain_host(host) in self._domains

    async def _body(
        self, response: aiohttp.ClientResponse, files: Account, deadline: asyncio.Timeout, param: str
    ) -> bytes:
        if response.status != 200:
            raise _Refused(f"the server answered with status {response.status}")
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise _Refused("the server sends it compressed, though asked not to")
        most = self._limits.max_bytes if response.content_length is None else response.content_length
        self._limits.check_size(most, param)
        files.give(0, lower_claim=self._limits.max_bytes - most)
        file, num_bytes, taken = io.BytesIO(), 0, 0
        async for chunk in response.content.iter_chunked(1 << 16):
            num_bytes += len(chunk)
            self._limits.check_size(num_bytes, param)
            if num_bytes > taken:
                step = min(max(GROWTH, num_bytes - taken), most - taken)
                await self._take_while_fetching(files, step, deadline, param)
                taken += step
            file.write(chunk)
        files.give(taken - num_bytes, lower_claim=most - num_bytes)
        return file.getvalue()

    async def _take_while_fetching(self, files: Account, num_bytes: int, deadline: asyncio.Timeout, param: str) -> None:
        """Take bytes, and extend the deadline by the time spent waiting for them."""
        loop, when = asyncio.get_running_loop(), deadline.when()
        left_s = (when or 0) - loop.time()
        deadline.reschedule(None)
        await self._limits.take(files, num_bytes, param)
        deadline.reschedule(loop.time() + left_s)


class _Refused(Exception):
    """A URL that must not be fetched, or an unusable answer."""


def _shown(url: str) -> str:
    """Return a URL for messages: without credentials and query, and short."""
    scheme, _, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    authority, slash, path = rest.partition("/")
    text = f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
    if not text.isprintable():
        return "the URL"
    return text if len(text) <= 100 else f"{text[:97]}..."
