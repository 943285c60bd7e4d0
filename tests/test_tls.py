"""TLS and client certificates: who gets in, who does not."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from pathlib import Path

import aiohttp
import pytest
from authority import Authority, Pair, as_pem
from cryptography.hazmat.primitives.asymmetric import ec
from fake_engine import serving
from server_calls import embed, get
from waiting import until

from rtp_mm import errors
from rtp_mm.cli import main as cli
from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.server.client import RemoteEngine
from rtp_mm.server.security import ServerTls, Watched

TOKEN = "correct-horse.battery~staple"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """An authority that nobody here trusts."""
    return Authority(tmp_path, "stranger")


def trusting(authority: Authority, own: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.cert)
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    return context


async def test_over_tls_both_ports_answer_and_loopback_is_still_local(authority: Authority) -> None:
    async with serving(**authority.issue("server").as_server()) as server:
        assert await embed(server, mm_remote_tls_ca=authority.cert) == 3
        assert server.engine.asked[0][1].is_local
        assert await get(server, "/health", trusting(authority)) == 200
        assert await get(server, "/metrics", trusting(authority)) == 200


async def test_nothing_answers_in_the_clear_or_to_who_trusts_another(authority: Authority, stranger: Authority) -> None:
    async with serving(**authority.issue("server").as_server()) as server:
        for options in ({}, {"mm_remote_tls_ca": stranger.cert}):
            with pytest.raises(errors.RemoteCallError):
                await embed(server, **options)
        with pytest.raises(aiohttp.ClientError):
            await get(server, "/health")
        with pytest.raises(aiohttp.ClientError):
            await get(server, "/health", trusting(stranger))
    assert not server.engine.asked


async def test_mutual_tls_takes_certificates_of_its_own_authority_only(
    authority: Authority, stranger: Authority
) -> None:
    async with serving(**authority.issue("server").as_server(mm_tls_client_ca=authority.cert)) as server:
        ca = {"mm_remote_tls_ca": authority.cert}
        friend, foe = authority.issue("friend"), stranger.issue("foe")
        assert await embed(server, **ca, **friend.as_server()) == 3
        for options in (ca, ca | foe.as_server()):
            with pytest.raises(errors.RemoteCallError):
                await embed(server, **options)
        assert await get(server, "/metrics", trusting(authority, friend)) == 200
        assert await get(server, "/metrics", trusting(authority)) == 401
        assert await get(server, "/health", trusting(authority)) == 200  # a kubelet has no certificate
        with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
            await get(server, "/metrics", trusting(authority, foe))


async def test_a_renewed_certificate_serves_from_the_next_connection_on(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    """`stranger` becomes the server's authority while it runs."""
    pair = authority.issue("server")
    async with serving(**pair.as_server()) as server:
        assert await embed(server, mm_remote_tls_ca=authority.cert) == 3
        stranger.issue("server")
        assert await embed(server, mm_remote_tls_ca=stranger.cert) == 3
        assert await get(server, "/health", trusting(stranger)) == 200
        with pytest.raises(errors.RemoteCallError):
            await embed(server, mm_remote_tls_ca=authority.cert)
        with pytest.raises(aiohttp.ClientError):
            await get(server, "/health", trusting(authority))


async def test_a_replaced_client_authority_counts_on_both_ports(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    clients = tmp_path / "clients.pem"
    clients.write_bytes(authority.cert.read_bytes())
    friend, foe = authority.issue("friend"), stranger.issue("foe")
    async with serving(**authority.issue("server").as_server(mm_tls_client_ca=clients)) as server:
        ca = {"mm_remote_tls_ca": authority.cert}
        assert await get(server, "/", trusting(authority, friend)) == 200
        clients.write_bytes(stranger.cert.read_bytes())
        assert await embed(server, **ca, **foe.as_server()) == 3
        assert await get(server, "/", trusting(authority, foe)) == 200
        with pytest.raises(errors.RemoteCallError):
            await embed(server, **ca, **friend.as_server())
        with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
            await get(server, "/", trusting(authority, friend))


async def test_half_a_renewal_is_not_served(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    pair = authority.issue("server")
    async with serving(**pair.as_server()) as server:
        old_key = pair.key.read_bytes()
        authority.issue("server")
        new_key = pair.key.read_bytes()
        pair.key.write_bytes(old_key)  # the certificate is new, its key is not there yet
        assert await get(server, "/health", trusting(authority)) == 200
        assert await embed(server, mm_remote_tls_ca=authority.cert) == 3
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
            "kept what was read before"
        ]
        pair.key.write_bytes(new_key)
        assert await get(server, "/health", trusting(authority)) == 200
        assert "PRIVATE KEY" not in caplog.text


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("cert",), "TLS takes both MM_TLS_CERT and MM_TLS_KEY"),
        (("key",), "TLS takes both MM_TLS_CERT and MM_TLS_KEY"),
        (("client_ca",), "TLS takes both MM_TLS_CERT and MM_TLS_KEY"),
        (("cert", "absent key"), "MM_TLS_KEY=.*absent: No such file or directory"),
        (("cert", "folder key"), "MM_TLS_KEY=.*: Is a directory"),
        (("cert", "other key"), "no certificate and its key .key values mismatch."),
        (("cert", "encrypted key"), "MM_TLS_KEY=.* is encrypted"),
        (("garbage cert", "key"), "MM_TLS_CERT=.*garbage, .*: no certificate"),
        (("cert", "key", "garbage client_ca"), "MM_TLS_CLIENT_CA=.*garbage holds no certificates"),
        (("cert", "key", "absent client_ca"), "MM_TLS_CLIENT_CA=.*absent: No such file"),
        (("cert", "key", "key as client_ca"), "MM_TLS_CLIENT_CA=.* holds no certificates"),
    ],
)
def test_files_that_do_not_serve_end_the_start_with_one_line(
    authority: Authority, tmp_path: Path, options: tuple[str, ...], line: str
) -> None:
    pair, other = authority.issue("server"), authority.issue("other")
    (tmp_path / "garbage").write_text("no PEM")
    (tmp_path / "encrypted").write_bytes(as_pem(ec.generate_private_key(ec.SECP256R1()), b"password"))
    files = {
        "cert": ("mm_tls_cert", pair.cert),
        "key": ("mm_tls_key", pair.key),
        "client_ca": ("mm_tls_client_ca", authority.cert),
        "absent key": ("mm_tls_key", tmp_path / "absent"),
        "folder key": ("mm_tls_key", tmp_path),
        "other key": ("mm_tls_key", other.key),
        "encrypted key": ("mm_tls_key", tmp_path / "encrypted"),
        "garbage cert": ("mm_tls_cert", tmp_path / "garbage"),
        "garbage client_ca": ("mm_tls_client_ca", tmp_path / "garbage"),
        "absent client_ca": ("mm_tls_client_ca", tmp_path / "absent"),
        "key as client_ca": ("mm_tls_client_ca", pair.key),
    }
    with pytest.raises(StartError, match=line) as caught:
        ServerTls.of(load_settings(None, **dict(files[option] for option in options)))
    assert "\n" not in str(caught.value)


def test_a_client_says_which_file_is_of_no_use(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"MM_REMOTE_TLS_CA=.*absent: No such file"):
        RemoteEngine("127.0.0.1:1", load_settings(None, mm_remote_tls_ca=tmp_path / "absent"))


async def test_a_token_and_tls_go_together(authority: Authority) -> None:
    async with serving(mm_auth_token=TOKEN, **authority.issue("server").as_server()) as server:
        assert await embed(server, mm_remote_tls_ca=authority.cert, mm_auth_token=TOKEN) == 3
        with pytest.raises(errors.UnauthenticatedError):
            await embed(server, mm_remote_tls_ca=authority.cert)


async def test_a_client_that_hangs_in_the_handshake_holds_nobody_up(authority: Authority) -> None:
    async with serving(**authority.issue("server").as_server()) as server:
        for port in (server.settings.start_port, server.settings.start_port + 1):
            await asyncio.open_connection("127.0.0.1", port)
        assert await embed(server, mm_remote_tls_ca=authority.cert) == 3
        assert await get(server, "/health", trusting(authority)) == 200
        await until(lambda: server.state.calls == 0)


async def test_the_command_line_speaks_tls_and_shows_certificate_and_token(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    friend = authority.issue("friend")
    options = {"mm_tls_client_ca": authority.cert, "mm_auth_token": TOKEN}
    async with serving(**authority.issue("server").as_server(**options)) as server:
        own = {"MM_REMOTE_TLS_CA": authority.cert, "MM_TLS_CERT": friend.cert, "MM_TLS_KEY": friend.key}
        for name, value in (own | {"MM_AUTH_TOKEN": TOKEN}).items():
            monkeypatch.setenv(name, str(value))
        assert await asyncio.to_thread(cli, ["embed", "img:3", "--server", server.grpc_address]) == 0
        assert await asyncio.to_thread(cli, ["status", server.grpc_address]) == 0
        assert "fake bf16 on cpu" in capsys.readouterr().out


def test_a_watched_file_is_read_when_it_changed_and_then_only(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("1")
    reads: list[str] = []

    def load() -> int:
        reads.append(file.read_text())
        return int(reads[-1])

    watched = Watched([file], load)
    assert [watched.current(), watched.current(), len(reads)] == [1, 1, 1]
    replacement = tmp_path / "new"
    replacement.write_text("2")
    os.utime(replacement, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    replacement.rename(file)  # same size, same time, another file
    assert [watched.current(), watched.current(), len(reads)] == [2, 2, 2]
