"""Where downloads may go: public addresses of allowed hosts, on every hop, however they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import ip_address
from typing import Any

import pytest
import pytest_asyncio
from pretend_network import PretendNetwork
from web_source import Source

from rtp_mm.config import load_settings
from rtp_mm.errors import DownloadFailedError, MMError, NotSupportedError, StartError
from rtp_mm.media.addresses import is_public
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.limits import SizeLimit
from rtp_mm.types import LIBRARY_CALLER, MultimodalInput

LIMIT = SizeLimit(1 << 16, "MM_IMAGE_MAX_FILE_SIZE_KB")
PUBLIC_V4 = "93.184.215.14"
PUBLIC_V6 = "2606:2800:21f:cb07::1"


def _words(text: str) -> list[str]:
    return text.split()


# First and last of every range that is not public, and the well-known ones inside.
NOT_PUBLIC = _words("""
    0.0.0.0 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.100.100.200 100.127.255.255 127.0.0.1 127.255.255.255
    168.63.129.16 169.254.0.0 169.254.169.254 169.254.255.255 172.16.0.0 172.31.255.255 192.0.0.0 192.0.0.192
    192.0.0.255 192.0.2.1 192.88.99.1 192.168.0.0 192.168.255.255 198.18.0.0 198.19.255.255 198.51.100.1 203.0.113.1
    224.0.0.1 239.255.255.255 240.0.0.0 255.255.255.255
    :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:a9fe:a9fe ::ffff:0:127.0.0.1 64:ff9b::127.0.0.1
    64:ff9b::a9fe:a9fe 64:ff9b:1::1 64:ff9b:1::5db8:d70e 100::1 1fff:ffff:: 2001::1 2001:0:7f00:1:: 2001:2::1
    2001:10::1 2001:20::1 2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff 2001:db8::1 2002:7f00:1:: 2002:a9fe:a9fe::1
    2002:5db8:d70e::1 3fff::1 3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff 4000:: 5f00::1 fc00::1 fd00:ec2::254 fe80::1
    fe80::1%2 febf::1 fec0::1 ff02::1 ff0e::1
""")

# Their neighbours, and what IPv4 looks like to a network without it.
PUBLIC = _words("""
    1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 168.63.129.15 168.63.129.17
    169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.3.0 192.167.255.255
    192.169.0.0 198.17.255.255 198.20.0.0 223.255.255.255
    ::ffff:93.184.215.14 64:ff9b::93.184.215.14 2000::1 2001:200::1 2001:db7::1 2001:db9::1 2003::1
    2606:2800:21f:cb07::1 2a00:1450:4001:80b::200e 3ffe::1 3fff:1000::1
""")

# What inet_aton, a browser, a resolver or a proxy may each take for an address.
ODD = [
    "127.1", "127.0.1", "2130706433", "0x7f.1", "0x7f000001", "0X7F000001", "017700000001", "0177.0.0.1", "127.0.0.01",
    "127.0.0.0x1", "0", "0x", "1.2.3.4.5", "256.0.0.1", "8.8", "134744072", "127.0.0.1..", "a.0x4", "1.", "%31.0.0.1",
    "127.0.0.1%00.a.example", "a b.example", "a..example", "...", "[a:b]", "①2⑦.1", "a" * 64,
    "a." + "b" * 64 + ".example",
]  # fmt: skip


@pytest_asyncio.fixture
async def web() -> AsyncIterator[Source]:
    async with Source.serving() as source:
        source.answers_with("/x", body=b"body")
        yield source


@pytest.fixture
def network(web: Source) -> PretendNetwork:
    network = PretendNetwork(web.port)
    network.name("cdn.example", [PUBLIC_V4])
    return network


async def download(network: PretendNetwork, url: str, **options: Any) -> bytes | None:
    async with network.source(**options) as source:
        return (await source.download(url, LIMIT)).body


async def refusal(network: PretendNetwork, url: str, **options: Any) -> str:
    """The text of the refusal."""
    with pytest.raises(NotSupportedError) as caught:
        await download(network, url, **options)
    return str(caught.value)


def host_of(address: str) -> str:
    """As a URL writes it."""
    return f"[{address}]" if ":" in address else address


@pytest.mark.parametrize("address", NOT_PUBLIC)
async def test_what_is_not_public_is_never_dialled(network: PretendNetwork, address: str) -> None:
    assert not is_public(ip_address(address))
    text = await refusal(network, f"http://{host_of(address)}/x")
    assert text == f"host {address!r} is not on the public internet (MM_ALLOW_PRIVATE_NETWORK)"
    network.name("inside.example", [address])
    text = await refusal(network, "http://user:secret@inside.example/x?secret")
    assert text == "host 'inside.example' is not on the public internet (MM_ALLOW_PRIVATE_NETWORK)"  # and not where
    assert network.asked == ["inside.example"]
    assert network.dialled == []


@pytest.mark.parametrize("address", PUBLIC)
async def test_what_is_public_is_dialled(network: PretendNetwork, address: str) -> None:
    assert is_public(ip_address(address))
    network.name("outside.example", [address])
    for host in (host_of(address), "outside.example"):
        assert await download(network, f"http://{host}/x") == b"body"
    assert network.dialled == [address, address]


@pytest.mark.parametrize("host", ODD)
@pytest.mark.parametrize("allow", [False, True])
async def test_an_address_in_an_odd_form_is_refused(network: PretendNetwork, host: str, allow: bool) -> None:
    network.name(host.lower(), ["127.0.0.1"], [PUBLIC_V4])
    text = await refusal(network, f"http://{host}/x", mm_allow_private_network=allow)
    assert text.endswith(" is neither a name nor an address in its usual form")
    assert (network.asked, network.dialled) == ([], [])


@pytest.mark.parametrize("host", ["localhost", "LocalHost.", "a.localhost", "db.local", "metadata.google.internal"])
async def test_names_of_private_networks_are_not_even_resolved(network: PretendNetwork, host: str) -> None:
    network.name(host, [PUBLIC_V4])
    assert "MM_ALLOW_PRIVATE_NETWORK" in await refusal(network, f"http://{host}/x")
    assert (network.asked, network.dialled) == ([], [])
    assert await download(network, f"http://{host}/x", mm_allow_private_network=True) == b"body"


async def test_of_several_answers_only_the_public_ones_are_dialled(network: PretendNetwork) -> None:
    network.name("mixed.example", ["127.0.0.1", PUBLIC_V6, "10.0.0.1", PUBLIC_V4, "::ffff:10.0.0.1", "fe80::1%2"])
    network.down = {PUBLIC_V6}
    assert await download(network, "http://mixed.example/x") == b"body"
    assert network.dialled == [PUBLIC_V6, PUBLIC_V4]
    network.down = {PUBLIC_V6, PUBLIC_V4}
    with pytest.raises(DownloadFailedError, match=r"^no connection to mixed\.example:80: "):
        await download(network, "http://mixed.example/x", mm_fetch_retries=0)
    assert network.dialled[2:] == [PUBLIC_V6, PUBLIC_V4]


async def test_the_answer_that_was_checked_is_the_one_dialled(network: PretendNetwork) -> None:
    network.name("rebinds.example", [PUBLIC_V4], ["127.0.0.1"])
    assert await download(network, "http://rebinds.example/x") == b"body"
    assert (network.asked, network.dialled) == (["rebinds.example"], [PUBLIC_V4])


async def test_every_new_answer_is_checked(network: PretendNetwork) -> None:
    network.name("rebinds.example", [PUBLIC_V4], ["127.0.0.1"])
    async with network.source(reuse=False) as source:
        assert (await source.download("http://rebinds.example/x", LIMIT)).body == b"body"
        with pytest.raises(NotSupportedError):
            await source.download("http://rebinds.example/x", LIMIT)
    assert network.asked == ["rebinds.example"] * 2
    assert network.dialled == [PUBLIC_V4]


async def test_a_retry_is_checked_anew(network: PretendNetwork) -> None:
    network.name("rebinds.example", [PUBLIC_V4], ["127.0.0.1"])
    network.down = {PUBLIC_V4}
    assert "MM_ALLOW_PRIVATE_NETWORK" in await refusal(network, "http://rebinds.example/x", reuse=False)
    assert network.dialled == [PUBLIC_V4]


async def test_all_who_wait_for_one_blocked_name_are_refused(network: PretendNetwork) -> None:
    network.name("inside.example", ["10.0.0.1"])
    async with network.source() as source:
        downloads = (source.download(f"http://inside.example/{i}", LIMIT) for i in range(20))
        outcomes = await asyncio.gather(*downloads, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {NotSupportedError}
    assert network.dialled == []


@pytest.mark.parametrize(
    "target",
    ["//127.0.0.1/x", "http://169.254.169.254/latest/meta-data/", "http://[::ffff:a9fe:a9fe]/", "http://inside.example/",
     "https://inside.example/x", "http://2130706433/", "http://0x7f.1/x", "http://localhost/x", "http://[::1]/x"],
)  # fmt: skip
@pytest.mark.parametrize("hops", [1, 2])
async def test_every_hop_is_checked(network: PretendNetwork, web: Source, target: str, hops: int) -> None:
    network.name("inside.example", ["10.0.0.1"])
    network.name("other.example", [PUBLIC_V6])
    web.redirects("/1", "http://other.example/2" if hops == 2 else target)
    web.redirects("/2", target)
    text = await refusal(network, "http://cdn.example/1")
    assert "MM_ALLOW_PRIVATE_NETWORK" in text or "usual form" in text
    assert network.dialled == [PUBLIC_V4, PUBLIC_V6][:hops]
    assert len(web.requests) == hops


async def test_redirects_between_public_hosts_are_followed(network: PretendNetwork, web: Source) -> None:
    network.name("other.example", [PUBLIC_V6])
    web.redirects("/1", "http://other.example/2")
    web.redirects("/2", f"http://{PUBLIC_V4}/x")
    assert await download(network, "http://cdn.example/1") == b"body"
    assert network.dialled == [PUBLIC_V4, PUBLIC_V6, PUBLIC_V4]


async def test_private_addresses_are_dialled_where_the_option_says_so(network: PretendNetwork, web: Source) -> None:
    network.name("inside.example", ["10.0.0.1", "fd00::1"])
    web.redirects("/1", "http://[fd00::2]/x")
    for url in ("http://inside.example/x", "http://192.168.0.1/1"):
        assert await download(network, url, mm_allow_private_network=True) == b"body"
    assert network.dialled == ["10.0.0.1", "192.168.0.1", "fd00::2"]


async def test_a_trusted_library_caller_is_held_to_the_same_rule() -> None:
    async with Fetcher(load_settings()) as fetcher:
        with pytest.raises(NotSupportedError, match="MM_ALLOW_PRIVATE_NETWORK"):
            await fetcher.fetch(MultimodalInput("http://127.0.0.1:1/x"), LIBRARY_CALLER)


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("cdn.example", True),
        ("CDN.Example", True),
        ("cdn.example.", True),
        ("a.media.example", True),
        ("a.b.media.example", True),
        (PUBLIC_V4, True),
        ("[2606:2800:21F:CB07:0:0:0:1]", True),
        ("media.example", False),  # *.suffix is what is under it
        ("evilmedia.example", False),
        ("a.cdn.example", False),
        ("cdn.example.evil.example", False),
        ("93.184.215.15", False),
    ],
)
async def test_only_allowed_hosts_are_asked(network: PretendNetwork, host: str, is_allowed: bool) -> None:
    allowed = {"mm_allowed_media_domains": f"Cdn.example, *.media.example,{PUBLIC_V4},{PUBLIC_V6}"}
    network.names = {name: [[PUBLIC_V4]] for name in (host, host.lower())}
    if is_allowed:
        assert await download(network, f"http://{host}/x", **allowed) == b"body"
        return
    text = await refusal(network, f"http://{host}/x", **allowed)
    assert text == f"host {host!r} is not among those allowed (MM_ALLOWED_MEDIA_DOMAINS)"
    assert (network.asked, network.dialled) == ([], [])


async def test_an_allowed_host_does_not_redirect_to_others(network: PretendNetwork, web: Source) -> None:
    network.name("other.example", [PUBLIC_V4])
    web.redirects("/1", "http://other.example/x")
    text = await refusal(network, "http://cdn.example/1", mm_allowed_media_domains="cdn.example")
    assert text == "host 'other.example' is not among those allowed (MM_ALLOWED_MEDIA_DOMAINS)"
    assert network.asked == ["cdn.example"]


async def test_an_allowed_host_is_private_only_where_both_options_say_so(network: PretendNetwork) -> None:
    network.name("inside.example", ["10.0.0.1"])
    allowed: dict[str, Any] = {"mm_allowed_media_domains": "inside.example,10.0.0.2,store.internal"}
    network.name("store.internal", ["10.0.0.3"])
    for url in ("http://inside.example/x", "http://10.0.0.2/x", "http://store.internal/x"):
        assert "MM_ALLOW_PRIVATE_NETWORK" in await refusal(network, url, **allowed)
        assert await download(network, url, **allowed, mm_allow_private_network=True) == b"body"
    text = await refusal(network, "http://10.0.0.4/x", **allowed, mm_allow_private_network=True)
    assert "MM_ALLOWED_MEDIA_DOMAINS" in text
    assert network.dialled == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


async def test_a_hostile_host_is_shown_short_and_on_one_line(network: PretendNetwork) -> None:
    text = await refusal(network, "http://a\x1bb" + "c" * 240 + "/")
    assert len(text) < 200
    assert text.isprintable()


@pytest.mark.parametrize(
    "domains",
    ["*", "https://a.example", "a.example:80", "a.example/x", "a*.example", "a,,b", ",", "[::1]", "ü.example"],
)
def test_a_domain_that_can_never_match_stops_the_start(domains: str) -> None:
    with pytest.raises(StartError, match="MM_ALLOWED_MEDIA_DOMAINS"):
        load_settings(mm_allowed_media_domains=domains)


def test_an_empty_list_of_domains_allows_none() -> None:
    assert load_settings(mm_allowed_media_domains=[]).mm_allowed_media_domains == ()


async def test_no_domains_no_downloads(network: PretendNetwork) -> None:
    assert "MM_ALLOWED_MEDIA_DOMAINS" in await refusal(network, "http://cdn.example/x", mm_allowed_media_domains=[])


# With a proxy, which resolves the names of sources itself.

PROXY = {"mm_fetch_proxy": "http://user:secret@proxy.internal:3128"}


async def test_a_proxy_is_sent_whole_urls_and_may_be_private(network: PretendNetwork, web: Source) -> None:
    network.name("proxy.internal", ["10.0.0.9"])
    web.redirects("/1", "http://photos.example/x?a=b")
    assert await download(network, "http://cdn.example/1", **PROXY) == b"body"
    assert (set(network.asked), set(network.dialled)) == ({"proxy.internal"}, {"10.0.0.9"})
    assert [request.raw_path for request in web.requests] == [
        "http://cdn.example/1",
        "http://photos.example/x?a=b",
    ]
    assert {request.headers["Proxy-Authorization"] for request in web.requests} == {"Basic dXNlcjpzZWNyZXQ="}


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "169.254.169.254", "[::1]", "2130706433", "localhost", "metadata.google.internal"]
)
async def test_a_proxy_is_asked_for_no_host_that_is_known_to_be_private(
    network: PretendNetwork, web: Source, host: str
) -> None:
    network.name("proxy.internal", ["10.0.0.9"])
    await refusal(network, f"http://{host}/x", **PROXY)
    assert network.dialled == []
    web.redirects("/1", f"http://{host}/x")
    await refusal(network, "http://cdn.example/1", **PROXY)
    assert len(web.requests) == 1


async def test_a_proxy_is_asked_for_allowed_hosts_only(network: PretendNetwork) -> None:
    network.name("proxy.internal", ["10.0.0.9"])
    options = {**PROXY, "mm_allowed_media_domains": "cdn.example"}
    assert await download(network, "http://cdn.example/x", **options) == b"body"
    await refusal(network, "http://other.example/x", **options)
    assert network.dialled == ["10.0.0.9"]


async def test_what_is_wrong_with_the_proxy_is_told_without_where_it_is(network: PretendNetwork, web: Source) -> None:
    async def failure(url: str) -> str:
        with pytest.raises(MMError) as caught:
            await download(network, url, **PROXY)
        assert type(caught.value) is DownloadFailedError
        return str(caught.value)

    assert await failure("http://cdn.example/x") == "no connection to the proxy (MM_FETCH_PROXY)"  # no such name
    network.name("proxy.internal", ["10.0.0.9"])
    network.down = {"10.0.0.9"}
    assert await failure("http://cdn.example/x") == "no connection to the proxy (MM_FETCH_PROXY)"
    network.down = set()
    web.answers_with("", status=407)
    web.answers_with("/", status=407)
    assert await failure("https://cdn.example/x") == "the proxy answered 407 (MM_FETCH_PROXY)"


@pytest.mark.parametrize(
    "proxy", ["proxy:3128", "socks5://u:secret@proxy", "http://", "http://u:secret@h:0", "http://h/x"]
)
def test_what_is_no_http_proxy_stops_the_start_without_its_password(proxy: str) -> None:
    with pytest.raises(StartError, match=r"^MM_FETCH_PROXY: ") as caught:
        load_settings(mm_fetch_proxy=proxy)
    assert "secret" not in str(caught.value)
