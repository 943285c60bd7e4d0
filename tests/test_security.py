"""TLS, client certificates and the token: who gets in, who does not, and that nobody hears a secret."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fake_engine import Serving, serving
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from test_servicer import EMBED, refusal, request, until

from rtp_mm import errors
from rtp_mm.cli import main as cli
from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.logs import KeyValueFormatter
from rtp_mm.server.client import RemoteEngine
from rtp_mm.server.proto import MultimodalRpcServiceStub, StatusVersionPB
from rtp_mm.server.security import Guard, ServerTls, Watched, bearer_token, is_loopback
from rtp_mm.types import MultimodalInput

TOKEN = "correct-horse.battery~staple"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    cert: Path
    key: Path

    def as_server(self, **more: Any) -> dict[str, Any]:
        return {"mm_tls_cert": self.cert, "mm_tls_key": self.key, **more}


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._certificate(self._name, self._key.public_key(), is_ca=True)
        self.cert = folder / f"{name}.pem"
        self.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str) -> Pair:
        """Written over what was there under this name, as a renewal is."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        certificate = self._certificate(subject, key.public_key(), is_ca=False)
        pair.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(as_pem(key))
        return pair

    def _certificate(self, subject: x509.Name, key: Any, *, is_ca: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )


def as_pem(key: Any, password: bytes | None = None) -> bytes:
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """An authority that nobody here trusts."""
    return Authority(tmp_path, "stranger")


async def embed(server: Serving, **options: Any) -> int:
    """Rows that a `RemoteEngine` with these options gets."""
    engine = RemoteEngine(server.grpc_address, load_settings(None, **options))
    try:
        return len((await engine.embed([MultimodalInput("img:3")], timeout_s=20)).embeddings[0])
    finally:
        engine.close()


async def get(server: Serving, path: str, context: ssl.SSLContext | None = None, **headers: str) -> int:
    """The status that HTTP answers; a failed handshake raises."""
    scheme = "https" if context else "http"
    url = f"{scheme}://127.0.0.1:{server.settings.start_port}{path}"
    async with aiohttp.ClientSession() as http, http.get(url, ssl=context or True, headers=headers) as response:
        return response.status


def trusting(authority: Authority, own: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.cert)
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    return context


# --- TLS


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


# --- the token


async def test_with_a_token_calls_need_it_and_health_does_not() -> None:
    async with serving(mm_auth_token=TOKEN) as server:
        error = await refusal(server.grpc_address, request("img:1"))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert error.details().startswith("[MM_NOT_SUPPORTED_ERROR] metadata authorization must be Bearer")
        with pytest.raises(errors.UnauthenticatedError):
            await embed(server)
        assert not server.engine.asked
        assert await embed(server, mm_auth_token=TOKEN) == 3
        for path in ("/health", "/ready", "/live"):
            assert await get(server, path) == 200
        for path in ("/", "/metrics", "/debug/profile", "/nowhere"):
            assert await get(server, path) == 401
        assert await get(server, "/metrics", Authorization=f"Bearer {TOKEN}") == 200
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await MultimodalRpcServiceStub(channel).GetWorkerStatus(StatusVersionPB())
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await listed.read()


async def test_the_status_methods_of_a_client_show_the_token() -> None:
    async with serving(mm_auth_token=TOKEN) as server:
        engine = RemoteEngine(server.grpc_address, load_settings(None, mm_auth_token=TOKEN))
        assert (await asyncio.to_thread(engine.worker_status)).is_alive
        assert (await asyncio.to_thread(engine.cache_status)).version == 9
        engine.close()


async def test_a_refused_call_is_refused_before_its_request_is_read() -> None:
    """A megabyte that a unary handler would wait for; the caller sends the half of it and hears the refusal."""

    async def half_a_request() -> Any:
        yield bytes(1 << 20)
        await asyncio.Event().wait()

    async with serving(mm_auth_token=TOKEN) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(channel.stream_unary(EMBED)(half_a_request()), 20)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_refusals_are_counted_and_no_token_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(mm_auth_token=TOKEN) as server:
        wrong = (("authorization", "Bearer wrong-guess"),)
        await refusal(server.grpc_address, request("img:1"), metadata=wrong)
        await get(server, "/metrics", Authorization="Bearer wrong-guess")
        url, headers = f"{server.http_url}/metrics", {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as response:
            text = await response.text()
        assert 'rtp_mm_unauthenticated_total{protocol="grpc"} 1.0' in text
        assert 'rtp_mm_unauthenticated_total{protocol="http"} 1.0' in text
        assert await embed(server, mm_auth_token=TOKEN) == 3
    lines = [KeyValueFormatter().format(record) for record in caplog.records]
    assert any(" refused peer=ipv4:127.0.0.1:" in line and "status=UNAUTHENTICATED" in line for line in lines)
    assert not any(TOKEN in line or "wrong-guess" in line for line in lines)
    assert TOKEN not in repr(server.settings)


async def test_a_new_token_in_the_file_counts_at_once(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    async with serving(mm_auth_token_file=file) as server:
        assert await embed(server, mm_auth_token_file=file) == 3
        file.write_text("the-next-one")
        assert await embed(server, mm_auth_token="the-next-one") == 3
        with pytest.raises(errors.UnauthenticatedError):
            await embed(server, mm_auth_token=TOKEN)
        file.unlink()
        assert await embed(server, mm_auth_token="the-next-one") == 3


@pytest.mark.parametrize(
    ("header", "is_admitted"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer  {TOKEN} ", True),
        (f"Bearer {TOKEN}x", False),
        (f"Bearer {TOKEN[:-1]}", False),
        (f"Basic {TOKEN}", False),
        (TOKEN, False),
        ("Bearer ", False),
        ("Bearer", False),
        ("Bearer \udcff", False),
        (b"Bearer \xff", False),
        ("", False),
        (None, False),
    ],
)
def test_only_the_token_itself_is_admitted(header: Any, is_admitted: bool) -> None:
    assert Guard(lambda: TOKEN).admits(header) is is_admitted
    assert Guard(None).admits(header)


@pytest.mark.parametrize("token", ["", " ", "two words", "line\nline", "schl\u00fcssel", "\u732b"])
def test_a_token_that_no_header_carries_ends_the_start_and_is_not_repeated(token: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f" {token}\n", "utf-8")
    with pytest.raises(StartError, match=r"MM_AUTH_TOKEN_FILE=.*visible ASCII") as caught:
        bearer_token(load_settings(None, mm_auth_token_file=file))
    assert not token.strip() or token not in str(caught.value)
    if token:
        with pytest.raises(StartError, match=r"MM_AUTH_TOKEN: .*visible ASCII"):
            bearer_token(load_settings(None, mm_auth_token=token))


def test_one_token_is_enough(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="one of the two") as caught:
        bearer_token(load_settings(None, mm_auth_token=TOKEN, mm_auth_token_file=tmp_path / "x"))
    assert TOKEN not in str(caught.value)
    with pytest.raises(StartError, match="No such file"):
        bearer_token(load_settings(None, mm_auth_token_file=tmp_path / "x"))


async def test_a_token_and_tls_go_together(authority: Authority) -> None:
    async with serving(mm_auth_token=TOKEN, **authority.issue("server").as_server()) as server:
        assert await embed(server, mm_remote_tls_ca=authority.cert, mm_auth_token=TOKEN) == 3
        with pytest.raises(errors.UnauthenticatedError):
            await embed(server, mm_remote_tls_ca=authority.cert)


# --- what is watched


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


@pytest.mark.parametrize(("host", "expected"), [("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False)])
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


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
