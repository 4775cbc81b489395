"""Hosts in every spelling: which may be asked for media, by our own reading of URLs and by the loader's."""

import asyncio
import ipaddress
import socket

import pytest
from yarl import URL

from rtp_llm.srt.multimodal.hosts import (
    PublicResolver,
    RefusedHost,
    check_public,
    host_of,
    is_public,
    plain_host,
    public_socket,
)
from rtp_llm.srt.multimodal.media import MediaLoader
from rtp_llm.srt.sampling_params import InvalidRequest

# Neither an address as it is written by rule nor a DNS name: to some programs, many of them are this machine.
MALFORMED = [
    "2130706433", "0", "1", "127.1", "127.0.1", "0177.0.0.1", "0177.0.0.01", "00000177.0.0.1", "017700000001",
    "0x7f.1", "0x7f000001", "0X7F000001", "0x7f.0x0.0x0.0x1", "0x7f.0.0.1", "127.0.0.0x1", "127.0.0.1.", "127.0.0.1..",
    "127.0.0.01", "127.0.0.256", "127.0.0", "1.2.3.4.5", "8.8.8.8.", "999999999999", "0xffffffffff", "0x", "a.0x",
    "a.1", "example.123", "localhost.", "example.org.", ".example.org", "example..org", "..", ".", "-a.org", "a-.org",
    "%31%32%37.0.0.1", "127%2e0.0.1", "%6c%6f%63alhost", "localhos%74", "example.org%00.org",
    "１２７.０.０.１", "①②⑦.⓪.⓪.①", "127。0。0。1", "127．0．0．1", "localhoſt", "ⓛocalhost", "exämple.org",
    "ℯxample.org", "loc\u00adalhost", "local\u200bhost", "\u202elocalhost", "[::1%25lo]", "[::1%lo]", "[fe80::1%eth0]",
    "[fe80::1%25eth0]", "[::1", "::1", "[]", "[127.0.0.1]", "[::ffff:127.1]", "[::ffff:0x7f.0.0.1]", "[::g]", "[v1.x]",
    "[1:2:3:4:5:6:7:8:9]",
    "a b", "a\tb", "a\nb", "a\\b", "127.0.0.1\\@8.8.8.8", "8.8.8.8\\", "", "@", "a@b@8.8.8.8", "8.8.8.8:80:80", "a:b",
    "8.8.8.8:99999", "8.8.8.8:-1", "8.8.8.8:0x50", "a" * 64 + ".org", ".".join(["a" * 60] * 5),
    "*.example.org", "a,b", "{x}", "<x>",
]  # fmt: skip

# Well formed, and not public.
PRIVATE = [
    "127.0.0.1", "127.8.8.8", "localhost", "LOCALHOST", "LocalHost", "a.localhost", "x.y.LOCALHOST",
    "localhost.localdomain", "ip6-localhost", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.0.8", "192.88.99.1",
    "198.18.0.1", "192.0.2.1", "[::]", "[::1]",
    "[0:0:0:0:0:0:0:1]", "[0000:0000:0000:0000:0000:0000:0000:0001]", "[::FFFF:127.0.0.1]", "[::ffff:7f00:1]",
    "[::ffff:10.0.0.1]", "[::ffff:a9fe:a9fe]", "[::127.0.0.1]", "[::7f00:1]", "[::8.8.8.8]", "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a00:1]", "[64:ff9b:1::808:808]", "[2002:7f00:1::]", "[2002:a00:1::1]", "[2001:0:7f00:1::]",
    "[2001:0:808:808:0:0:80ff:fffe]", "[fe80::1]", "[fc00::1]", "[fd12::1]", "[fec0::1]", "[ff02::1]", "[2001:db8::1]",
    "[5f00::1]", "user@127.0.0.1", "user:word@localhost", "8.8.8.8@127.0.0.1", "8.8.8.8:80@127.0.0.1", "127.0.0.1:80",
]  # fmt: skip

PUBLIC = {
    "8.8.8.8": "8.8.8.8",
    "1.1.1.1:8080": "1.1.1.1",
    "Example.ORG": "example.org",
    "a-b.c_d.example.org:443": "a-b.c_d.example.org",
    "xn--mnchen-3ya.de": "xn--mnchen-3ya.de",
    "1.example.org": "1.example.org",
    "0x7f.example.org": "0x7f.example.org",
    "127.0.0.1.example.org": "127.0.0.1.example.org",
    "user:word@example.org": "example.org",
    "127.0.0.1@example.org": "example.org",
    "[2606:4700::1111]": "2606:4700::1111",
    "[2606:4700:0:0:0:0:0:1111]:80": "2606:4700::1111",
    "[::ffff:8.8.8.8]": "::ffff:808:808",
    "[64:ff9b::808:808]": "64:ff9b::808:808",
}


def test_there_are_enough_forms():
    assert len(set(MALFORMED)) > 50 and len(set(PRIVATE)) > 40


@pytest.mark.parametrize("host", MALFORMED)
def test_what_is_neither_an_address_nor_a_name_is_refused(host):
    for url in (f"http://{host}/x.png", f"HTTPS://{host}", f"http://{host}?x"):
        with pytest.raises(RefusedHost, match="its host is"):
            host_of(url)


@pytest.mark.parametrize("host", PRIVATE)
def test_what_is_not_public_is_refused(host):
    with pytest.raises(RefusedHost, match="not on the public internet"):
        check_public(host_of(f"http://{host}/x.png"))


@pytest.mark.parametrize("host", PUBLIC)
def test_what_is_public_is_taken(host):
    found = host_of(f"http://{host}/x.png?a=@b#c")
    check_public(found)
    assert found == PUBLIC[host]
    assert plain_host(URL(f"http://{host}/").raw_host or "") == found, "the library reads another host"


@pytest.mark.parametrize("host", [*MALFORMED, *PRIVATE])
def test_the_loader_asks_nobody(host, monkeypatch):
    """No name is resolved and no socket made: it does not depend on how a library reads the host."""
    url = f"http://{host}/x.png"
    resolved = []

    async def resolve(self, name, port=0, family=socket.AF_INET):
        resolved.append(name)
        raise OSError("not here")

    monkeypatch.setattr(PublicResolver, "resolve", resolve)
    monkeypatch.setattr("rtp_llm.srt.multimodal.url_fetcher.public_socket", resolved.append)
    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(MediaLoader(timeout_s=5).load_image(url))
    assert "its host is" in str(caught.value) and caught.value.param == "image_data"
    assert not resolved


@pytest.mark.parametrize(
    "url", ["ftp://8.8.8.8/", "8.8.8.8", "//8.8.8.8/", "http:/8.8.8.8", "http:8.8.8.8", "file:///x"]
)
def test_other_schemes_have_no_host(url):
    with pytest.raises(RefusedHost, match="no http or https URL"):
        host_of(url)


def test_allowed_hosts_are_compared_in_one_form():
    assert plain_host(" Example.ORG. ") == "example.org"
    assert plain_host("[0:0::1]") == plain_host("::1") == "::1"


def test_a_host_that_a_library_reads_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(
        "rtp_llm.srt.multimodal.url_fetcher.URL", lambda text: type("U", (), {"raw_host": "127.0.0.1"})()
    )
    with pytest.raises(InvalidRequest, match="can be read in two ways"):
        asyncio.run(MediaLoader().load_image("http://example.org/x.png"))


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1", "0.0.0.0",
     "255.255.255.255", "127.8.8.8", "::", "::1", "fe80::1", "fe80::1%lo", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
     "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "::a00:1", "fec0::1", "64:ff9b:1::a00:1", "2001:0:7f00:1::",
     "192.0.0.8", "198.18.0.1", "2606:4700::1111%eth0"],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(RefusedHost):
        public_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 80)))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    assert is_public(ipaddress.ip_address(address))
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    with public_socket((kind, socket.SOCK_STREAM, 0, "", (address, 80))) as made:
        assert made.family == kind


def test_an_address_that_nobody_checked_is_not_connected_to(monkeypatch):
    """If the resolver were passed by, or its answer changed, the socket would still be refused."""

    async def resolve(self, host, port=0, family=socket.AF_INET):
        entry = {"hostname": host, "host": "127.0.0.1", "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
        return [entry]

    monkeypatch.setattr(PublicResolver, "resolve", resolve)
    with pytest.raises(InvalidRequest, match="not on the public internet"):
        asyncio.run(MediaLoader(timeout_s=5).load_image("http://rebinding.test:9/x.png"))
