"""What the process does for some seconds, as a trace for chrome://tracing or Perfetto. torch is imported to record."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime
from pathlib import Path

MAX_SECONDS = 60.0


class Profiler:
    """Writes traces to `folder`, one at a time. For one event loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_recording = False
        self._stop = threading.Event()

    async def record(self, seconds: float) -> Path:
        """Records all threads, and the device where there is one; the file comes when it is whole."""
        self.is_recording = True
        try:
            return await asyncio.to_thread(self._record, seconds)
        finally:
            self.is_recording = False

    def traces(self) -> list[Path]:
        return sorted(self.folder.glob("trace-*.json.gz"))

    def close(self) -> None:
        """Ends a recording early."""
        self._stop.set()

    def _record(self, seconds: float) -> Path:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # else only this one
        with profile(activities=activities, experimental_config=every_thread) as recorded:
            self._stop.wait(seconds)
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{seconds:g}s.json.gz"
        partial = self.folder / f"partial-{name}"
        recorded.export_chrome_trace(str(partial))
        return partial.rename(self.folder / f"trace-{name}")
