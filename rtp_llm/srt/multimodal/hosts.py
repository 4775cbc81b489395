"""Checks of the hosts in URLs of media, and of the addresses that they resolve to.

Programs read odd spellings of hosts in different ways: ``http://127.1/``, ``http://0x7f.1/`` and ``http://2130706433/``
are this machine to some. So a host must be an address in canonical form or a proper DNS name; anything else is refused
here, before any library reads it. Addresses are checked when a name is resolved, and once more when a socket is made.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable

from aiohttp import AddrInfoType
from aiohttp.abc import AbstractResolver, ResolveResult

NOT_PUBLIC = "its host is not on the public internet (--allowed-media-domains can allow it)"

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")
_LOCAL = tuple(  # local to a site or a protocol, but global for Python's ``is_global`` (in some versions)
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "fec0::/10", "5f00::/16"))
)
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)  # hosts with such a last label are addresses for some programs
_AUTHORITY = re.compile(
    r"(?:[A-Za-z0-9._~!$&'()*+,;=:%-]*@)?(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{0,5}))?",
    re.ASCII,
)
_MAX_NAME = 253  # characters

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class RefusedHost(OSError):
    """A host or an address that must not be reached. An OSError, which aiohttp expects from resolvers and sockets."""


def host_of(url: str) -> str:
    """Return the host of an http or https URL in canonical form: a DNS name in lower case, or an address.

    Raises:
        RefusedHost: it is neither.
    """
    scheme, separator, rest = url.partition("://")
    if scheme.lower() not in ("http", "https") or not separator:
        raise RefusedHost("it leads to something that is no http or https URL")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    found = _AUTHORITY.fullmatch(authority)
    if found is None or int(found["port"] or 0) > 0xFFFF:
        raise RefusedHost(
            "its host is neither an address nor a DNS name as they are written (names of other alphabets in their "
            "xn-- form)"
        )
    return checked_host(found["host"])


def checked_host(host: str) -> str:
    """Return a host, without a port, in canonical form.

    Raises:
        RefusedHost: it is neither a canonical address nor a proper DNS name.
    """
    name = host.lower()
    if name.startswith("["):
        try:
            return str(ipaddress.IPv6Address(name[1:-1]))
        except ValueError:
            raise RefusedHost("its host is no IPv6 address") from None
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise RefusedHost("its host is a number, but no IPv4 address of four decimal parts") from None
    if len(name) > _MAX_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        raise RefusedHost("its host is no DNS name as they are written (without a dot at the end)")
    return name


def plain_host(host: str) -> str:
    """Return a host of --allowed-media-domains in the form of ``host_of``."""
    name = host.strip().strip("[]").lower()
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.rstrip(".")


def check_public(host: str) -> None:
    """Check a host of ``host_of`` before names are resolved.

    Raises:
        RefusedHost: it is an address that is not public, or a name of this machine.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if host.rpartition(".")[2] in ("localhost", "localdomain") or host in ("ip6-localhost", "ip6-loopback"):
            raise RefusedHost(NOT_PUBLIC) from None
        return
    if not is_public(address):
        raise RefusedHost(NOT_PUBLIC)


def is_public(address: Address) -> bool:
    """Return whether an address belongs to the public internet, also in an IPv6 form of an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:  # link-local
            return False
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner is None and (address in _NAT64 or address in _COMPATIBLE):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner) and address not in _COMPATIBLE  # never routed
    if any(address in network for network in _LOCAL):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _checked_address(text: str) -> None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise RefusedHost(NOT_PUBLIC) from None
    if not is_public(address):
        raise RefusedHost(NOT_PUBLIC)


class PublicResolver(AbstractResolver):
    """Resolves a name and checks its addresses in one step, so that the connection goes to a checked address even if
    the name resolves differently later (DNS rebinding)."""

    def __init__(self, may_be_private: Callable[[str], bool]) -> None:
        self._may_be_private = may_be_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        addresses = [(kind, str(address[0])) for kind, _, _, _, address in found]
        if not self._may_be_private(host):
            for _, address in addresses:
                _checked_address(address)
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kind, proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, address in addresses
        ]  # fmt: skip

    async def close(self) -> None:
        pass


def public_socket(info: AddrInfoType) -> socket.socket:
    """Create a socket for an address, checked once more to be public."""
    kind, socket_type, proto, _, address = info
    _checked_address(str(address[0]))
    return socket.socket(kind, socket_type, proto)


def refusal_in(error: BaseException | None) -> str | None:
    """Return the message of a RefusedHost among an error's causes; None: there is none."""
    while error is not None:
        if isinstance(error, RefusedHost):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
