"""Who may speak to the server, and how: TLS, client certificates, the bearer token, and what counts as local."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health

from rtp_mm.config import Settings
from rtp_mm.errors import StartError, UnauthenticatedError
from rtp_mm.logs import log_event

T = TypeVar("T")
_log = logging.getLogger(__name__)
_access = logging.getLogger("rtp_mm.access")
AUTHORIZATION = "authorization"


class Watched(Generic[T]):
    """What `load` makes of files, made anew when one of them changes; for any thread.

    A new version that does not load is logged and the old one stays: a certificate is replaced before its key.
    Raises `StartError` where the first one does not load.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], T]) -> None:
        self._paths, self._load = paths, load
        self._lock = threading.Lock()
        self._seen = _identities(paths)
        self._value = load()

    def current(self) -> T:
        with self._lock:
            if (now := _identities(self._paths)) != self._seen:
                self._seen = now
                try:
                    self._value = self._load()
                    log_event(_log, "read again", files=", ".join(map(str, self._paths)))
                except (StartError, OSError) as error:
                    log_event(_log, "kept what was read before", logging.WARNING, error=error)
            return self._value


def _identities(paths: Sequence[Path]) -> list[tuple[int, ...] | None]:
    """Changes with every file that is written or replaced."""
    identities: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            stat = path.stat()
            identities.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        except OSError:
            identities.append(None)
    return identities


# --- TLS


@dataclass(frozen=True, slots=True)
class Certificates:
    """The server's chain and key, and whose clients' certificates it takes, as PEM and as a context made of them."""

    chain: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class ServerTls:
    """TLS of both ports. Files that change count from the next connection on."""

    @classmethod
    def of(cls, settings: Settings) -> ServerTls | None:
        """`None` where no certificate is named. Raises `StartError` for files that are none, or do not fit."""
        cert, key, client_ca = settings.mm_tls_cert, settings.mm_tls_key, settings.mm_tls_client_ca
        if cert is None and key is None and client_ca is None:
            return None
        if cert is None or key is None:
            raise StartError("TLS takes both MM_TLS_CERT and MM_TLS_KEY")
        paths = [path for path in (cert, key, client_ca) if path is not None]
        return cls(Watched(paths, lambda: _server_certificates(cert, key, client_ca)))

    def __init__(self, certificates: Watched[Certificates]) -> None:
        self._certificates = certificates
        self._given_to_grpc = certificates.current()
        self.is_mutual = self._given_to_grpc.client_ca is not None

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """With `is_mutual`, only clients with a certificate of the CA get through the handshake."""
        initial = _grpc_configuration(self._given_to_grpc)
        return grpc.dynamic_ssl_server_credentials(initial, self._changed, require_client_authentication=self.is_mutual)

    def http_context(self) -> ssl.SSLContext:
        """Asks clients for a certificate but lets those without through: `/health` is for probes that have none."""
        context = self._certificates.current().context

        def use_current(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._certificates.current().context

        context.sni_callback = use_current
        return context

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks before every handshake, on threads of its own; `None`: what it has is right."""
        current = self._certificates.current()
        if current is self._given_to_grpc:
            return None
        self._given_to_grpc = current
        return _grpc_configuration(current)


def _grpc_configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    pair = (certificates.key, certificates.chain)
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=certificates.client_ca)


def _server_certificates(cert: Path, key: Path, client_ca: Path | None) -> Certificates:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0  # TLS 1.3; a resumed session would outlive the certificates it began with
    _load_pair(context, cert, key)
    if client_ca is not None:
        _load_ca(context, client_ca, "MM_TLS_CLIENT_CA")
        context.verify_mode = ssl.CERT_OPTIONAL
    return Certificates(cert.read_bytes(), key.read_bytes(), client_ca.read_bytes() if client_ca else None, context)


def client_context(settings: Settings) -> ssl.SSLContext | None:
    """For HTTPS to a server with TLS; `None` where `MM_REMOTE_TLS_CA` names no CA. Raises `StartError`."""
    ca, cert, key = settings.mm_remote_tls_ca, settings.mm_tls_cert, settings.mm_tls_key
    if ca is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load_ca(context, ca, "MM_REMOTE_TLS_CA")
    if cert is not None and key is not None:
        _load_pair(context, cert, key)
    return context


def client_credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    """The same for a gRPC channel."""
    ca, cert, key = settings.mm_remote_tls_ca, settings.mm_tls_cert, settings.mm_tls_key
    if ca is None:
        return None
    client_context(settings)  # sees that the files are what they should be; gRPC would not say
    own = (key.read_bytes(), cert.read_bytes()) if cert and key else ()
    return grpc.ssl_channel_credentials(ca.read_bytes(), *own)


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    def refuse() -> NoReturn:  # else OpenSSL would ask on the terminal
        raise StartError(f"MM_TLS_KEY={key} is encrypted: it must be readable without a password")

    for name, path in (("MM_TLS_CERT", cert), ("MM_TLS_KEY", key)):
        _check_readable(name, path)
    try:
        context.load_cert_chain(cert, key, password=refuse)
    except ssl.SSLError as error:
        why = (error.reason or "no PEM").replace("_", " ").lower()
        raise StartError(f"MM_TLS_CERT={cert}, MM_TLS_KEY={key}: no certificate and its key ({why})") from None


def _load_ca(context: ssl.SSLContext, ca: Path, name: str) -> None:
    _check_readable(name, ca)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError:
        raise StartError(f"{name}={ca} holds no certificates in PEM form") from None


def _check_readable(name: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise StartError(f"{name}={path}: {error.strerror}") from None


# --- the token


def bearer_token(settings: Settings) -> Callable[[], str] | None:
    """Gives the token that stands in the settings or, now, in its file. `None` where there is none.

    Raises `StartError` for a token that no header can carry; never shows one.
    """
    given, file = settings.mm_auth_token, settings.mm_auth_token_file
    if given is not None and file is not None:
        raise StartError("MM_AUTH_TOKEN and MM_AUTH_TOKEN_FILE: one of the two")
    if given is not None:
        token = _checked_token(given.get_secret_value(), "MM_AUTH_TOKEN")
        return lambda: token
    if file is not None:
        return Watched([file], lambda: _token_in(file)).current
    return None


def _token_in(file: Path) -> str:
    name = f"MM_AUTH_TOKEN_FILE={file}"
    try:
        return _checked_token(file.read_text("ascii").strip(), name)
    except OSError as error:
        raise StartError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _no_token(name) from None


def _checked_token(token: str, name: str) -> str:
    if not token or not all("!" <= character <= "~" for character in token):
        raise _no_token(name)
    return token


def _no_token(name: str) -> StartError:
    return StartError(f"{name}: a token is one or more visible ASCII characters, without spaces")


class Guard:
    """Whether an `Authorization` header carries the token; everything passes where there is no token."""

    def __init__(self, token: Callable[[], str] | None) -> None:
        self._token = token

    @property
    def is_on(self) -> bool:
        return self._token is not None

    def admits(self, authorization: str | bytes | None) -> bool:
        if self._token is None:
            return True
        header = authorization if isinstance(authorization, str) else ""  # bytes: gRPC found no ASCII in it
        scheme, _, given = header.partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(errors="replace"), self._token().encode())
        return is_right and scheme.lower() == "bearer"


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Refuses calls without the token before a byte of their request is read; all but health checks need it."""

    def __init__(self, guard: Guard, on_refused: Callable[[], None], *, is_logged: bool = True) -> None:
        self._guard, self._on_refused, self._is_logged = guard, on_refused, is_logged

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        is_open = details.method.startswith(f"/{health.SERVICE_NAME}/")
        if is_open or self._guard.admits(dict(details.invocation_metadata).get(AUTHORIZATION)):
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(self._refuse)  # a unary one would wait for the whole request

    async def _refuse(self, _requests: Any, context: Any) -> None:
        self._on_refused()
        if self._is_logged:
            log_event(_access, "refused", peer=context.peer(), status=UnauthenticatedError.status)
        error = UnauthenticatedError("metadata authorization must be Bearer and the server's token")
        await context.abort(grpc.StatusCode[error.status], error.wire_message)


def authorization(token: Callable[[], str] | None) -> tuple[tuple[str, str], ...]:
    """The metadata that shows a client's token."""
    return ((AUTHORIZATION, f"Bearer {token()}"),) if token else ()


# --- local callers


def is_loopback(host: str) -> bool:
    """Whether an address is a loopback address, IPv4-mapped ones too; what cannot be read is not."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)
