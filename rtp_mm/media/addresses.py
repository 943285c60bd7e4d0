"""Where downloads may go: which hosts a URL may name, and which of their addresses may be dialled.

A name is checked by its answers, and the answers that pass are the ones dialled: nobody resolves it a second time.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from aiohttp.abc import AbstractResolver, ResolveResult

from rtp_mm.config import Settings
from rtp_mm.errors import NotSupportedError

# IANA's special-purpose registry (RFC 6890), the ranges that are not globally reachable, and what is not unicast.
_NOT_PUBLIC_V4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this host; Linux takes it for the loopback
            "10.0.0.0/8",
            "100.64.0.0/10",  # carrier-grade NAT; also where some clouds keep their metadata
            "127.0.0.0/8",
            "168.63.129.16/32",  # looks public, is Azure's own services in every virtual network
            "169.254.0.0/16",  # link-local, cloud metadata
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)

# IPv6 the other way round: global unicast, less what of it is special. All else is refused, fe80::/10, fc00::/7,
# ff00::/8, loopback, IPv4-compatible addresses and the NAT64 prefix for local use among it.
_UNICAST_V6 = IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments; Teredo, which embeds IPv4 addresses, among them
            "2001:db8::/32",
            "2002::/16",  # 6to4, which embeds IPv4 addresses
            "3fff::/20",
        ),
    )
)

# IPv6 forms of an IPv4 address, which is the last 32 bits and is what is judged: mapped, and NAT64, by which networks
# without IPv4 reach hosts that have nothing else.
_TRANSLATED = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))

# Suffixes that name no public host (RFC 6761, 6762, 8375; ICANN for "internal").
_PRIVATE_SUFFIXES = ("localhost", "local", "internal", "home.arpa")

NAMES_AT_ONCE = 64
_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV

_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")  # RFC 1035; no resolver takes a longer label
_ENDS_IN_NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")  # WHATWG URL: such a host can be nothing but IPv4


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether the address is unicast, and reached over the public internet."""
    if isinstance(address, IPv6Address):
        if not any(address in network for network in _TRANSLATED):
            return address in _UNICAST_V6 and not any(address in network for network in _NOT_PUBLIC_V6)
        address = IPv4Address(int(address) & 0xFFFFFFFF)
    return not any(address in network for network in _NOT_PUBLIC_V4)


class Destinations:
    """The rule: only hosts of `MM_ALLOWED_MEDIA_DOMAINS` where that is set, and of these only public addresses unless
    `MM_ALLOW_PRIVATE_NETWORK=1`.
    """

    def __init__(self, settings: Settings) -> None:
        self._allows_private = settings.mm_allow_private_network
        self._allowed = settings.mm_allowed_media_domains

    def check(self, host: str) -> None:
        """A URL's host (ASCII, no brackets), as far as it can be judged without resolving it.

        Raises `NotSupportedError`, also for an address in any but its usual form (`127.1`, `0x7f000001`), which a
        resolver, a proxy or a socket may each read in its own way.
        """
        name = host.lower().removesuffix(".")
        address = _literal(name)
        if address is None and (_ENDS_IN_NUMBER.fullmatch(name) or not _NAME.fullmatch(name)):
            raise NotSupportedError(f"host {_shown(host)} is neither a name nor an address in its usual form")
        if address is not None:
            name = str(address)
        if self._allowed is not None and not any(_matches(name, pattern) for pattern in self._allowed):
            raise NotSupportedError(f"host {_shown(host)} is not among those allowed (MM_ALLOWED_MEDIA_DOMAINS)")
        if self._allows_private:
            return
        if any(_matches(name, pattern) for s in _PRIVATE_SUFFIXES for pattern in (s, f"*.{s}")):
            raise _not_public(host)
        if address is not None and not is_public(address):
            raise _not_public(host)

    def admitted(self, host: str, answers: Iterable[ResolveResult]) -> list[ResolveResult]:
        """Those of a name's answers that may be dialled. Raises `NotSupportedError`, which shows none, if none may."""
        admitted = [a for a in answers if self._allows_private or is_public(ip_address(a["host"]))]
        if not admitted:
            raise _not_public(host)
        return admitted


class SystemResolver(AbstractResolver):
    """The system's, in threads apart from all others: one that waits for a server of names is lost for a while."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NAMES_AT_ONCE, "rtp_mm-names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises `OSError` for a name that does not resolve."""
        ask = partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return [
            ResolveResult(hostname=host, host=_numeric(*address), port=port, family=family, proto=proto, flags=_NUMERIC)
            for family, _, proto, _, address in found
        ]

    async def close(self) -> None:
        """Waits for nobody."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class CheckedResolver(AbstractResolver):
    """A resolver whose answers are only those that `Destinations` admits."""

    def __init__(self, resolver: AbstractResolver, destinations: Destinations) -> None:
        self._resolver = resolver
        self._destinations = destinations

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises `NotSupportedError`, and `OSError` for a name that does not resolve."""
        return self._destinations.admitted(host, await self._resolver.resolve(host, port, family))

    async def close(self) -> None:
        await self._resolver.close()


def _numeric(address: str, _port: int, _flow: int = 0, scope: int = 0) -> str:
    """An address as the system gives it, with the interface that a link-local one is at."""
    return f"{address}%{scope}" if scope else address


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _matches(name: str, pattern: str) -> bool:
    """`*.suffix` stands for every name under the suffix, but not for the suffix itself."""
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern


def _not_public(host: str) -> NotSupportedError:
    return NotSupportedError(f"host {_shown(host)} is not on the public internet (MM_ALLOW_PRIVATE_NETWORK)")


def _shown(host: str) -> str:
    return repr(host if len(host) <= 80 else host[:77] + "...")
