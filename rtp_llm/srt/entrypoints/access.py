"""Who may use which endpoint: keys, hosts, and pages of other origins.

    /health, /ready, /ping, /health_generate, /metrics, preflights   anyone
    /flush_cache, aborting all requests                              the administrator, if there is such a key
    everything else                                                  a key, if there is one

Any page can make a browser send requests. Without a preflight a page cannot send what is declared to be JSON to another
origin; its other requests are refused here, such as those to endpoints that take no JSON, or take it undeclared. A page
whose own name resolves to this machine (DNS rebinding) is recognised by the ``Host`` of its requests.
"""

import hmac
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from starlette.types import Scope

from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.entrypoints.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/v1/health", "/ready", "/ping", "/health_generate", "/metrics"})
ADMIN_PATHS = frozenset({"/flush_cache"})
IS_ADMIN = "is_admin"  # in a scope's state
KEY_VARIABLE, ADMIN_KEY_VARIABLE = "RTP_LLM_API_KEY", "RTP_LLM_ADMIN_API_KEY"


@dataclass(frozen=True, slots=True)
class Access:
    """The rules of one server.

    Args:
        keys: any of them is accepted except for administration; none: no key is needed.
        admin_keys: any of them is accepted everywhere; none: administration needs a key of ``keys``.
        hosts: allowed ``Host`` names, ``*`` for any, a leading dot for all subdomains; None: any address, and any name
            without a dot, which no page of another site can have.
        origins: of pages whose scripts may send requests, ``*`` for any.
    """

    keys: Sequence[str] = field(default=(), repr=False)
    admin_keys: Sequence[str] = field(default=(), repr=False)
    hosts: Sequence[str] | None = ("*",)
    origins: Sequence[str] = ()

    @classmethod
    def from_server_args(cls, args: ServerArgs) -> "Access":
        """Raise ServerArgsError where a key is empty, or its file cannot be read."""
        keys = _keys("api_key", args.api_key, args.api_key_file, KEY_VARIABLE)
        hosts: Sequence[str] | None = args.allowed_hosts
        if hosts is None and (keys or not _is_loopback(args.host)):
            hosts = ("*",)
        return cls(
            keys,
            _keys("admin_api_key", args.admin_api_key, args.admin_api_key_file, ADMIN_KEY_VARIABLE),
            hosts,
            tuple(args.allowed_origins or ()),
        )

    def refusal(self, scope: Scope) -> ApiError | None:
        """Return the error of a refused request, else None. Note in the scope's state whether it has an admin key."""
        path, headers = scope["path"], _headers(scope)
        if path in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_allowed_host(host):
            return ApiError(
                403, f"the host {host!a} is not one of this server's (--allowed-hosts)", code="host_not_allowed"
            )
        if self._is_forged(scope, headers, host):
            return ApiError(
                403, "a page of another origin may not ask for this (--allowed-origins)", code="origin_not_allowed"
            )
        shown = _shown_keys(headers)
        is_admin = _is_one_of(shown, self.admin_keys or self.keys)
        scope.setdefault("state", {})[IS_ADMIN] = is_admin or not (self.admin_keys or self.keys)
        if path in ADMIN_PATHS:
            return check_admin(scope)
        if self.keys and not is_admin and not _is_one_of(shown, self.keys):
            return _wrong_key("API key")
        return None

    def _is_allowed_host(self, host: str) -> bool:
        name = _host_name(host)
        if self.hosts is None:
            return "." not in name.strip(".") or name.endswith(".localhost") or _is_address(name)
        return any(
            allowed in ("*", host, name) or (allowed.startswith(".") and name.endswith(allowed))
            for allowed in map(str.lower, self.hosts)
        )

    def _is_forged(self, scope: Scope, headers: Mapping[bytes, bytes], host: str) -> bool:
        """Return whether a page of another origin may have sent this, without a preflight."""
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind == b"application/json" or (scope["method"] in ("GET", "HEAD") and scope["path"] not in ADMIN_PATHS):
            return False
        if "*" in self.origins:
            return False
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin:
            return origin not in self.origins and urlsplit(origin).netloc.lower() != host.lower()
        return headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin")


def check_admin(scope: Scope) -> ApiError | None:
    """Return the error of a request for administration that is refused, else None."""
    return None if scope.get("state", {}).get(IS_ADMIN, True) else _wrong_key("administrator's key (--admin-api-key)")


def _wrong_key(what: str) -> ApiError:
    message = f"wrong or missing {what}: send Authorization: Bearer KEY, or X-Api-Key: KEY"
    return ApiError(401, message, code="invalid_api_key")


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(reversed(scope["headers"]))  # of equal names, the first counts


def _shown_keys(headers: Mapping[bytes, bytes]) -> list[bytes]:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    shown = [key.strip()] if scheme.lower() == b"bearer" else []
    return shown + ([headers[b"x-api-key"].strip()] if b"x-api-key" in headers else [])


def _is_one_of(shown: Sequence[bytes], keys: Sequence[str]) -> bool:
    found = [hmac.compare_digest(one, key.encode()) for one in shown for key in keys]  # all: constant time
    return any(found)


def _keys(name: str, given: str | None, path: str | None, variable: str) -> tuple[str, ...]:
    """Read keys from an option, a file with one in each line, or the environment: the first that is set."""
    if given is not None and path is not None:
        raise ServerArgsError(f"{name} and {name}_file are both given; give one")
    if path is not None:
        try:
            lines = [line.strip() for line in Path(path).read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ServerArgsError(f"{name}_file: cannot read {path!r}: {error}") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ServerArgsError(f"{name}_file: {path!r} holds no key; write one in each line")
        return tuple(keys)
    if given is None:
        given = os.environ.get(variable)
        name = f"the environment variable {variable}"
    if given is None:
        return ()
    if not given.strip():
        raise ServerArgsError(f"{name} is empty, which would let everybody in; give a key, or leave it out")
    return (given.strip(),)


def _host_name(host: str) -> str:
    """``example.com`` of ``Example.com:8000``; of ``[::1]:8000`` the address."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
