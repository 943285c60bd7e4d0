"""`rtp-mm init-checkpoint`: a random checkpoint, with a progress bar."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from rtp_mm.cli.outputs import writing
from rtp_mm.random_checkpoint import write_checkpoint


def run(folder: Path, family: str, size: str, seed: int, sparse_llm: bool) -> None:
    """Raises `StartError`."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with writing(folder), Progress(*columns, TimeRemainingColumn()) as bars:
        bar = bars.add_task(f"{family} {size}", total=None)
        write_checkpoint(
            folder,
            family,
            size,
            seed=seed,
            sparse_llm=sparse_llm,
            progress=lambda written, total: bars.update(bar, completed=written, total=total),
        )
    print(folder)
