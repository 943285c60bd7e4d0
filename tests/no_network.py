"""A guard beneath every test: no socket of Python's leaves this machine, whatever the code under test does.

It is an audit hook, which no monkeypatching gets past and which stays for the life of the process. gRPC's own core does
not pass by it, nor do processes that a test starts.
"""

from __future__ import annotations

import sys
from ipaddress import ip_address
from typing import Any

forbidden_calls: list[str] = []  # since a test last cleared it, those that were caught and swallowed too


class NetworkForbiddenError(BaseException):
    """No Exception, so that no fallback of the code under test takes it for a failure of the network."""


def watch_sockets() -> None:
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    match event, arguments:
        case "socket.connect" | "socket.sendto" | "socket.sendmsg", (_, address) if not _is_here(address):
            _forbid(f"{event} {address}")
        case "socket.getaddrinfo", (host, *_) if not _is_here((host,)):
            _forbid(f"{event} {host}")


def _is_here(address: Any) -> bool:
    """Whether it is this machine: the loopback, a path, or an address to listen on."""
    if not isinstance(address, tuple):
        return True  # Unix and others that no network carries; `None` of sendmsg on a connected socket
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    if host in (None, "", "localhost", "0.0.0.0", "::"):
        return True
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except (ValueError, AttributeError):
        return False


def _forbid(call: str) -> None:
    forbidden_calls.append(call)
    raise NetworkForbiddenError(call)
