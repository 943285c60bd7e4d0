"""The server's two ports are its own."""

from __future__ import annotations

import socket

import pytest
from fake_engine import free_start_port, serving

from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.server.app import open_ports
from rtp_mm.server.state import ServerState


@pytest.mark.parametrize(("offset", "use"), [(0, "HTTP"), (1, "gRPC")])
async def test_a_taken_port_is_one_clear_line(offset: int, use: str, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_start_port()
    settings = load_settings(None, start_port=port, mm_bind_address="127.0.0.1")
    line = f"cannot listen on 127.0.0.1:{port + offset} for {use}: Address already in use"
    with socket.create_server(("127.0.0.1", port + offset)), pytest.raises(StartError) as caught:
        async with open_ports(ServerState(), settings):
            pass
    assert str(caught.value) == line
    assert capfd.readouterr().err == ""


async def test_two_servers_never_share_a_port() -> None:
    async with serving(mm_bind_address="0.0.0.0") as server:
        settings = load_settings(None, start_port=server.settings.start_port + 1)
        with pytest.raises(StartError, match="Address already in use"):
            async with open_ports(ServerState(), settings):
                pass
