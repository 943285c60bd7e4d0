"""The event loop that an engine lives on, and the ways to it from other loops and threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from rtp_mm.errors import DrainingError

T = TypeVar("T")


def closed() -> DrainingError:
    return DrainingError("the engine is closed")


class Home:
    """Runs work on `loop`, a running event loop, or, without one, on a thread with a loop of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._gate = threading.Lock()  # between closing and handing work to the loop
        self._thread: _LoopThread | None = None
        if loop is None:
            self._thread = _LoopThread()
            loop = self._thread.loop
        self.loop = loop
        self.is_closed = False

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on the loop."""
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """For any event loop. Raises `DrainingError` once closed."""
        if self.is_here and not self.is_closed:
            return await work
        return await asyncio.wrap_future(self._hand_over(work))

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """For any thread but the loop's own, which would wait for itself. Raises `DrainingError` once closed."""
        if self.is_here:
            work.close()
            raise RuntimeError("a synchronous call on the engine's own event loop would wait for itself; await embed()")
        return self._hand_over(work).result()

    def close(self, shut_down: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs `shut_down()` as the last work and ends the thread; idempotent."""
        if self.is_here:
            raise RuntimeError(
                "a synchronous close on the engine's own event loop would wait for itself; await aclose()"
            )
        if (last := self._close_gate(shut_down)) is not None:
            last.result()
            if self._thread is not None:
                self._thread.stop()

    async def aclose(self, shut_down: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """The same for any event loop."""
        if not self.is_here:
            await asyncio.to_thread(self.close, shut_down)
        elif (last := self._close_gate(shut_down)) is not None:
            await asyncio.wrap_future(last)

    def close_at_exit(self, close: Callable[[], None]) -> None:
        """`close` is called where the interpreter ends with this loop's own thread still running."""
        if self._thread is not None:
            self._thread.at_exit = close

    def _close_gate(self, shut_down: Callable[[], Coroutine[Any, Any, None]]) -> concurrent.futures.Future[None] | None:
        """From here on nothing is handed to the loop, so the shutdown is the last. `None` where it began before."""
        with self._gate:
            if self.is_closed:
                return None
            self.is_closed = True
            return asyncio.run_coroutine_threadsafe(shut_down(), self.loop)

    def _hand_over(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._gate:
            if self.is_closed:
                work.close()
                raise closed()
            return asyncio.run_coroutine_threadsafe(work, self.loop)


class _LoopThread:
    """An event loop that runs on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.at_exit: Callable[[], None] = self.stop
        # Not `atexit`, which comes after the end of all executors: closing an engine takes some.
        threading._register_atexit(partial(_end, weakref.ref(self)))  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._run, name="rtp_mm-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False in a process that was forked from this one, too."""
        return self._thread.is_alive()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.get_loop().run_forever()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


def _end(reference: weakref.ref[_LoopThread]) -> None:
    if (thread := reference()) is not None and thread.is_alive:
        thread.at_exit()
