"""The guard itself: a test that would leave this machine fails, even if the code under test swallows the refusal."""

from __future__ import annotations

import contextlib
import socket

import pytest
from no_network import NetworkForbiddenError

from rtp_mm.config import load_settings
from rtp_mm.media.addresses import Destinations
from rtp_mm.media.fetch import Fetcher
from rtp_mm.types import LIBRARY_CALLER, MultimodalInput

ELSEWHERE = "192.0.2.1"  # for documentation: nobody's


def test_no_connection_leaves_this_machine(dialled_elsewhere: list[str]) -> None:
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.setblocking(False)
        for call in (
            lambda: tcp.connect((ELSEWHERE, 80)),
            lambda: tcp.connect_ex((ELSEWHERE, 80)),
            lambda: udp.sendto(b"x", (ELSEWHERE, 53)),
            lambda: udp.sendmsg([b"x"], [], 0, (ELSEWHERE, 53)),
            lambda: socket.getaddrinfo("images.example", 80),
        ):
            with pytest.raises(NetworkForbiddenError):
                call()
    assert len(dialled_elsewhere) == 5
    dialled_elsewhere.clear()


def test_this_machine_can_be_reached(dialled_elsewhere: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1])).close()
    assert dialled_elsewhere == []


async def test_a_broken_address_policy_is_stopped_by_the_guard(
    monkeypatch: pytest.MonkeyPatch, dialled_elsewhere: list[str]
) -> None:
    monkeypatch.setattr(Destinations, "check", lambda *_: None)
    monkeypatch.setattr(Destinations, "admitted", lambda _self, _host, answers: [*answers])
    async with Fetcher(load_settings(mm_fetch_retries=0)) as fetcher:
        with contextlib.suppress(NetworkForbiddenError):
            await fetcher.fetch(MultimodalInput("http://169.254.169.254/latest/meta-data/"), LIBRARY_CALLER)
    assert any("169.254.169.254" in call for call in dialled_elsewhere)
    dialled_elsewhere.clear()
