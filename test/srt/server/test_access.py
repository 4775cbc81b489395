"""Who may ask the server for what: keys, hosts, pages of other origins, TLS, and the page of its documentation."""

import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.entrypoints.access import ADMIN_KEY_VARIABLE, KEY_VARIABLE, Access, check_admin
from rtp_llm.srt.entrypoints.connections import tls_context
from tiny_server import InProcess, in_process

pytestmark = pytest.mark.xdist_group("server-in-process")


def asked(access: Access, path: str = "/generate", method: str = "GET", **headers: str) -> str | None:
    """The code of the refusal, if it is refused; ``admin`` if what only the administrator may do is allowed, too."""
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope: dict[str, Any] = {"path": path, "method": method, "headers": raw}
    refused = access.refusal(scope)
    if refused is not None:
        return refused.code
    return "admin" if check_admin(scope) is None else None


KEYS, ADMINS = ("one", "zwei"), ("boss",)


@pytest.mark.parametrize(
    ("keys", "admins", "shown", "generate", "flush"),
    [
        ((), (), None, "admin", "admin"),
        (KEYS, (), None, "invalid_api_key", "invalid_api_key"),
        (KEYS, (), "one", "admin", "admin"),
        (KEYS, (), "zwei", "admin", "admin"),
        (KEYS, (), "on", "invalid_api_key", "invalid_api_key"),
        (KEYS, (), "", "invalid_api_key", "invalid_api_key"),
        (KEYS, ADMINS, None, "invalid_api_key", "invalid_api_key"),
        (KEYS, ADMINS, "one", None, "invalid_api_key"),
        (KEYS, ADMINS, "boss", "admin", "admin"),
        ((), ADMINS, None, None, "invalid_api_key"),
        ((), ADMINS, "other", None, "invalid_api_key"),
        ((), ADMINS, "boss", "admin", "admin"),
    ],
)
def test_keys(
    keys: tuple[str, ...], admins: tuple[str, ...], shown: str | None, generate: str | None, flush: str | None
) -> None:
    access = Access(keys, admins)
    ways: list[dict[str, str]] = [{}] if shown is None else [{"authorization": f"Bearer {shown}"}, {"x_api_key": shown}]
    for headers in ways:
        assert asked(access, **headers) == generate
        assert asked(access, "/flush_cache", "POST", **headers) == flush
        for path in ("/health", "/ready", "/ping", "/metrics", "/health_generate"):
            assert asked(access, path, **headers) in (None, "admin")
        assert asked(access, method="OPTIONS", **headers) in (None, "admin")


def args(**options: Any) -> ServerArgs:
    return ServerArgs(model_path="m", **options)


def test_where_keys_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\none\n\n  zwei \n")
    assert Access.from_server_args(args(api_key_file=str(path))).keys == ("one", "zwei")
    monkeypatch.setenv(KEY_VARIABLE, "three")
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, "four")
    access = Access.from_server_args(args())
    assert (access.keys, access.admin_keys) == (("three",), ("four",))
    assert Access.from_server_args(args(api_key="five")).keys == ("five",)
    assert "three" not in repr(access) and "four" not in repr(access)


def test_keys_that_would_let_everybody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("# none\n")
    for options, told in (
        ({"api_key": ""}, "api_key is empty"),
        ({"admin_api_key": " "}, "admin_api_key is empty"),
        ({"api_key_file": str(path)}, "holds no key"),
        ({"api_key": "a", "api_key_file": str(path)}, "both given"),
    ):
        with pytest.raises(ServerArgsError, match=told):
            Access.from_server_args(args(**options))
    with pytest.raises(ServerArgsError, match="there is no file"):
        args(api_key_file=str(tmp_path / "other"))
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(ServerArgsError, match=KEY_VARIABLE):
        Access.from_server_args(args())


LOOPBACK = Access.from_server_args(args())


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:30000", "127.0.0.1:1", "[::1]:30000", "10.0.0.7", "box:80", "a.localhost", "", "x"]
)
def test_hosts_on_loopback(host: str) -> None:
    assert asked(LOOPBACK, host=host) == "admin"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:30000", "127.0.0.1.nip.io", "localhost.evil.example"])
def test_names_of_elsewhere_that_lead_here(host: str) -> None:
    assert asked(LOOPBACK, host=host) == "host_not_allowed"
    assert asked(LOOPBACK, "/health", host=host) in (None, "admin")
    for options in ({"api_key": "one"}, {"host": "0.0.0.0"}, {"allowed_hosts": ["*"]}):
        assert asked(Access.from_server_args(args(**options)), host=host, authorization="Bearer one") == "admin"


def test_hosts_that_are_named() -> None:
    access = Access.from_server_args(args(allowed_hosts=["llm.example", ".inner.example"], host="0.0.0.0"))
    for host in ("llm.example", "LLM.example:8000", "a.inner.example"):
        assert asked(access, host=host) == "admin"
    for host in ("other.example", "127.0.0.1", "inner.example.org", "xllm.example"):
        assert asked(access, host=host) == "host_not_allowed"


@pytest.mark.parametrize(
    ("path", "method", "headers", "is_refused"),
    [
        ("/flush_cache", "GET", {"sec_fetch_site": "cross-site"}, True),
        ("/flush_cache", "GET", {"sec_fetch_site": "same-site"}, True),
        ("/flush_cache", "POST", {"origin": "https://evil.example"}, True),
        ("/flush_cache", "POST", {"origin": "null"}, True),
        ("/generate", "POST", {"origin": "https://evil.example", "content_type": "text/plain"}, True),
        ("/flush_cache", "POST", {}, False),
        ("/flush_cache", "GET", {"sec_fetch_site": "none"}, False),
        ("/flush_cache", "POST", {"origin": "http://localhost:1", "sec_fetch_site": "same-origin"}, False),
        ("/flush_cache", "POST", {"origin": "https://chat.example"}, False),
        ("/generate", "POST", {"origin": "app://editor", "content_type": "application/json"}, False),
        ("/docs", "GET", {"sec_fetch_site": "cross-site"}, False),
    ],
)
def test_requests_that_pages_forge(path: str, method: str, headers: dict[str, str], is_refused: bool) -> None:
    access = Access(origins=("https://chat.example",))
    expected = "origin_not_allowed" if is_refused else "admin"
    assert asked(access, path, method, host="localhost:1", **headers) == expected


@pytest.fixture(scope="module")
def keyed(tiny_checkpoint: str) -> Iterator[InProcess]:
    with in_process(tiny_checkpoint, api_key="one", admin_api_key="boss") as running:
        yield running


def test_the_administrator(keyed: InProcess) -> None:
    def post(path: str, key: str, body: Any = None) -> int:
        return httpx.post(f"{keyed.url}{path}", json=body, headers={"X-Api-Key": key}).status_code

    assert [post("/flush_cache", key) for key in ("one", "boss")] == [401, 200]
    assert [post("/abort_request", key, {"abort_all": True}) for key in ("one", "boss")] == [401, 200]
    assert [post("/abort_request", key, {"rid": "x"}) for key in ("one", "boss")] == [200, 200]
    for path, status in (("/metrics", 200), ("/health_generate", 200), ("/v1/models", 401), ("/docs", 401)):
        assert httpx.get(f"{keyed.url}{path}").status_code == status
    info = httpx.get(f"{keyed.url}/server_info", headers={"X-Api-Key": "one"}).text
    assert "boss" not in info and '"api_key":"***"' in info


def test_the_page_loads_nothing_from_elsewhere(server: InProcess) -> None:
    response = httpx.get(f"{server.url}/docs")
    page = response.text
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"<script|src=|https?://", page)
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert all(f"<code>{path}</code>" in page for path in document["paths"])
    assert "<code>chat_template_kwargs</code>" in page and "at most 32 strings that end the text" in page


def test_tls(tiny_checkpoint: str, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    with in_process(tiny_checkpoint, ssl_certfile=cert, ssl_keyfile=key) as server:
        url = server.url.replace("http:", "https:")
        with httpx.Client(verify=ssl.create_default_context(cafile=cert)) as client:
            assert client.get(f"{url}/health").status_code == 200
            body = {"prompt": "a", "max_tokens": 3, "stream": True}
            assert client.post(f"{url}/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health")
        assert httpx.get(f"{url}/health", verify=False).status_code == 200  # who spoke no TLS has hurt nobody


def test_a_certificate_that_cannot_be_used(certificate: tuple[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    with pytest.raises(ValueError, match=r"--ssl-certfile .* cannot be used"):
        tls_context(args(ssl_certfile=str(broken), ssl_keyfile=certificate[1]))
    with pytest.raises(ServerArgsError, match="without ssl_certfile"):
        args(ssl_keyfile=certificate[1])
