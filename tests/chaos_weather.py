"""Good and bad sources on one web server, and requests made from them, for `chaos.py`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
from aiohttp import web
from chaos_media import Supply, inline
from mutations import mutated
from web_source import Source

from rtp_mm.types import MMPreprocessConfig, MMUrlType, MultimodalInput

SILENCE_MS = 700  # the server gives up on a silent source after this
DRIP_MS = 3000  # and on a source that is never silent, but never done, when the request's own time is over

Status = grpc.StatusCode
REFUSED = frozenset({Status.INVALID_ARGUMENT})
BROKEN_SOURCE = frozenset({Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.INVALID_ARGUMENT})


@dataclass(frozen=True, slots=True)
class Case:
    """A request and what may come of it: the right answer to `right`, or one of these statuses."""

    name: str
    items: Sequence[MultimodalInput]
    right: Sequence[int] = ()  # of the good media, in order; empty: there is no right answer
    statuses: frozenset[grpc.StatusCode] = frozenset()
    cancel_after_s: float | None = None
    vanish_after_s: float | None = None
    is_open: bool = False  # right is what a server makes of it that is left in peace


class Weather:
    """The sources, good and bad, on one web server, and the cases made from them."""

    def __init__(self, source: Source, supply: Supply, folder: Path, rng: random.Random) -> None:
        self._supply, self._rng = supply, rng
        self._mm_type = supply.good[0].mm_type
        self._damage = np.random.default_rng(rng.randrange(1 << 30))
        self._files: dict[str, tuple[bytes, MMUrlType]] = {}
        self._ways = [[good.item] for good in supply.good]  # to send each
        for i, good in enumerate(supply.good):
            if not isinstance(good.content, bytes):
                continue
            self._files[good.name] = good.content, good.mm_type
            path = folder / f"good_{i}"
            path.write_bytes(good.content)
            urls = (
                source.answers_with(f"/good/{i}", body=good.content),
                source.answers_by(f"/slow/{i}", _slowly(good.content)),
                str(path),
            )
            self._ways[i] += [MultimodalInput(url, good.mm_type) for url in urls]
        self.faults = self._sources(source) | {name: ([item], REFUSED) for name, item in supply.refused.items()}
        self.known = self._known()

    def _sources(self, source: Source) -> dict[str, tuple[list[MultimodalInput], frozenset[grpc.StatusCode]]]:
        body, _ = next(iter(self._files.values()))
        circle = source.redirects("/circle/a", "/circle/b")
        source.redirects("/circle/b", "/circle/a")
        urls = {
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
            "503": (source.answers_with("/503", status=503), frozenset({Status.UNAVAILABLE})),
            "nobody there": ("http://127.0.0.1:9/", frozenset({Status.UNAVAILABLE})),
            "no such file": ("/nowhere/at/all.jpg", REFUSED),
            "not a file": ("/dev/zero", REFUSED),
            "traversal": ("file:///proc/self/../../etc/passwd", REFUSED),
            "empty": (source.answers_with("/empty", body=b""), REFUSED),
            "html": (source.answers_with("/html", body=b"<html>an error page, with status 200</html>"), REFUSED),
            "scheme": ("gopher://127.0.0.1/", REFUSED),
        }
        faults = {name: ([MultimodalInput(url, self._mm_type)], may_be) for name, (url, may_be) in urls.items()}
        return faults | {"igraph": ([MultimodalInput("data:,", MMUrlType.IGRAPH)], REFUSED)}

    def cases(self) -> Iterator[Case]:
        """What happens: what is known, then all at random, about half of it good."""
        yield from self.known
        while True:
            yield self._drawn()

    def _known(self) -> list[Case]:
        """Everything once."""
        known = [self._good([i]) for i in range(len(self._supply.good))]
        known += [self._fault(name, []) for name in self.faults]
        known += [case for name in self._files for case in (self._mutated(name), self._truncated(name))]
        known += [self._noise(), self._cancelled(), self._vanished()]
        self._rng.shuffle(known)
        return known

    def _drawn(self) -> Case:
        rng = self._rng
        kind = rng.random()
        if kind < 0.5:
            return self._good(self._some())
        if kind < 0.58:
            return self._cancelled()
        if kind < 0.62:
            return self._vanished()
        if kind < 0.8:
            return self._fault(rng.choice([*self.faults]), self._good(self._some()).items if rng.random() < 0.3 else [])
        if kind < 0.84:
            return self._noise()
        damage = self._truncated if kind < 0.88 else self._mutated
        return damage(rng.choice([*self._files]))

    def _some(self) -> list[int]:
        return [self._rng.randrange(len(self._supply.good)) for _ in range(self._rng.choice((1, 1, 1, 2, 3)))]

    def _good(self, right: list[int]) -> Case:
        name = self._supply.good[right[0]].name if len(right) == 1 else "several"
        return Case(f"good: {name}", [self._rng.choice(self._ways[i]) for i in right], right)

    def _cancelled(self) -> Case:
        return replace(
            self._good(self._some()),
            name="cancelled",
            statuses=frozenset({Status.CANCELLED}),
            cancel_after_s=self._rng.random() * 0.05,
        )

    def _vanished(self) -> Case:
        return replace(self._good(self._some()), name="vanished", vanish_after_s=self._rng.random() * 0.1)

    def _fault(self, name: str, before: Sequence[MultimodalInput]) -> Case:
        items, statuses = self.faults[name]
        if name == "drip":
            items = [replace(item, config=MMPreprocessConfig(mm_timeout_ms=DRIP_MS)) for item in items]
        return Case(name, [*before, *items], statuses=statuses)

    def _noise(self) -> Case:
        return self._open("noise", self._rng.randbytes(self._rng.randrange(1, 3000)), self._mm_type)

    def _mutated(self, name: str) -> Case:
        data, mm_type = self._files[name]
        return self._open(f"mutated: {name}", mutated(data, self._damage), mm_type)

    def _truncated(self, name: str) -> Case:
        data, mm_type = self._files[name]
        return self._open(f"truncated: {name}", data[: self._rng.randrange(len(data))], mm_type)

    def _open(self, name: str, data: bytes, mm_type: MMUrlType) -> Case:
        """A file that may be broken, or may not."""
        item = inline(data, self._rng.choice((mm_type, MMUrlType.DEFAULT)))
        return Case(name, [item], statuses=REFUSED, is_open=True)


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
