"""Good and bad sources on one web server, and requests made from them, for `chaos.py`."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import skimage.data
from aiohttp import web
from PIL import Image
from web_source import Source

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")
GOOD_IMAGES = 12
SILENCE_MS = 700  # the server gives up on a silent source after this
DRIP_MS = 3000  # and on a source that is never silent, but never done, when the request's own time is over

Status = grpc.StatusCode
REFUSED = {Status.INVALID_ARGUMENT}
BROKEN_SOURCE = {Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.INVALID_ARGUMENT}


@dataclass(frozen=True, slots=True)
class Case:
    """A request and what may come of it: the right answer to `right`, or one of these statuses."""

    name: str
    urls: Sequence[str]
    right: Sequence[int] = ()  # of the good images, in order; empty: there is no right answer
    statuses: frozenset[grpc.StatusCode] = frozenset()
    cancel_after_s: float | None = None
    mm_type: int = 1
    timeout_ms: int = 0  # granted; 0: what the server grants


def good_files(folder: Path) -> list[Path]:
    """Photographs that differ in content and size."""
    astronaut = skimage.data.astronaut()
    paths = []
    for i in range(GOOD_IMAGES):
        path = folder / f"good_{i}.{'jpg' if i % 2 else 'png'}"
        Image.fromarray(astronaut[i * 9 : i * 9 + 60 + 14 * i, i * 7 : i * 7 + 200]).save(path)
        paths.append(path)
    return paths


def encoded(image_format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()[:96, :96]).save(file, image_format)
    return file.getvalue()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, a piece removed, doubled or inserted, the end cut off."""
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(max(1, min(len(mutant), rng.choice((64, len(mutant))))))
        match rng.randrange(5):
            case 0:
                mutant[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                mutant[at : at + rng.randint(1, 64)] = b""
            case 2:
                mutant[at:at] = mutant[at : at + rng.randint(1, 64)]
            case 3:
                mutant[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
            case 4:
                del mutant[rng.randrange(len(mutant) + 1) :]
        mutant = mutant or bytearray(b"\0")
    return bytes(mutant)


class Weather:
    """The sources, good and bad, on one web server, and the cases made from them."""

    def __init__(self, source: Source, files: Sequence[Path], rng: random.Random) -> None:
        self._source, self._files, self._rng = source, files, rng
        self._seeds = {name: encoded(name) for name in FORMATS}
        data = [path.read_bytes() for path in files]
        self._good = [source.answers_with(f"/good/{i}", body=body) for i, body in enumerate(data)]
        self._slow = [source.answers_by(f"/slow/{i}", _slowly(body)) for i, body in enumerate(data)]
        self._data = ["data:image/png;base64," + base64.b64encode(body).decode() for body in data]
        circle = source.redirects("/circle/a", "/circle/b")
        source.redirects("/circle/b", "/circle/a")
        body = data[0]
        self._bad: dict[str, tuple[str, set[grpc.StatusCode]]] = {
            "stall": (source.answers_by("/stall", _stall), BROKEN_SOURCE),
            "stall in the middle": (source.answers_by("/middle", _stall_in_the_middle(body)), BROKEN_SOURCE),
            "drip": (source.answers_by("/drip", _drip(body)), BROKEN_SOURCE),
            "lies long": (source.answers_by("/long", _lies(body, len(body) + 1000)), BROKEN_SOURCE),
            "lies short": (source.answers_by("/short", _lies(body, len(body) // 2)), BROKEN_SOURCE),
            "says huge": (source.answers_by("/huge", _lies(body, 1 << 40)), REFUSED),
            "is endless": (source.answers_by("/endless", _endless), REFUSED),
            "circle": (circle, BROKEN_SOURCE),
            "to metadata": (source.redirects("/metadata", "http://169.254.169.254/latest/meta-data/"), REFUSED),
            "metadata": ("http://169.254.169.254/latest/meta-data/", REFUSED),
            "mapped": ("http://[::ffff:169.254.169.254]/", REFUSED),
            "404": (source.answers_with("/404", status=404), REFUSED),
            "503": (source.answers_with("/503", status=503), {Status.UNAVAILABLE}),
            "nobody there": ("http://127.0.0.1:9/", {Status.UNAVAILABLE}),
            "no such file": ("/nowhere/at/all.jpg", REFUSED),
            "not a file": ("/dev/zero", REFUSED),
            "traversal": ("file:///proc/self/../../etc/passwd", REFUSED),
            "empty": (source.answers_with("/empty", body=b""), REFUSED),
            "html": (source.answers_with("/html", body=b"<html>an error page, with status 200</html>"), REFUSED),
            "scheme": ("gopher://127.0.0.1/", REFUSED),
            "igraph": ("data:,", REFUSED),
            "bomb": ("data:image/png;base64," + base64.b64encode(_bomb()).decode(), REFUSED),
        }

    def case(self) -> Case:
        """The next thing to happen: about half of all requests are good."""
        rng = self._rng
        kind = rng.random()
        right = [rng.randrange(GOOD_IMAGES) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        urls = [rng.choice((self._good, self._slow, self._data, [*map(str, self._files)]))[i] for i in right]
        if kind < 0.5:
            return Case("good", urls, right)
        if kind < 0.62:
            return Case("cancelled", urls, right, frozenset({Status.CANCELLED}), rng.random() * 0.05)
        if kind < 0.8:
            name, (url, statuses) = rng.choice([*self._bad.items()])
            mixed = [*urls, url] if rng.random() < 0.3 else [url]
            return Case(name, mixed, (), frozenset(statuses), timeout_ms=DRIP_MS if name == "drip" else 0)
        if kind < 0.85:
            noise = base64.b64encode(rng.randbytes(rng.randrange(1, 3000))).decode()
            return Case(
                "noise", [f"data:image/jpeg;base64,{noise}"], (), frozenset(REFUSED), mm_type=rng.choice((0, 1))
            )
        name = rng.choice(FORMATS)
        mutant = base64.b64encode(mutated(self._seeds[name], rng)).decode()
        # A mutant may still be an image, so an answer is right, too.
        return Case(f"mutated {name}", [f"data:;base64,{mutant}"], (), frozenset({Status.OK, *REFUSED}))


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _slowly(body: bytes) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(body), 4096):
            await response.write(body[start : start + 4096])
            await asyncio.sleep(0.002)
        return response

    return answer


async def _stall(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    return web.Response()


def _stall_in_the_middle(body: bytes) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        await asyncio.sleep(3600)
        return response

    return answer


def _drip(body: bytes) -> Answer:
    """A byte each third of the allowed silence: never silent, never done."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        for i in range(len(body)):
            await response.write(body[i : i + 1])
            await asyncio.sleep(SILENCE_MS / 3e3)
        return response

    return answer


def _lies(body: bytes, length: int) -> Answer:
    """Says another length than it sends, then closes the connection."""

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + body)
        request.transport.close()
        return web.Response()

    return answer


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(bytes(65536))


def _bomb() -> bytes:
    """A PNG of 65535 x 65535 pixels by its header, in a few bytes."""
    data = bytearray(encoded("PNG"))
    data[16:24] = (65535).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)
