"""Steps of `gpu_session` that build and check: kernels against their twins, an image's bits in any company."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

from benchmarks.gpu_common import (
    FAILED,
    ROOT,
    UNFINISHED,
    VARIANTS,
    Figures,
    Options,
    Unavailable,
    attempt,
    checkpoint,
    is_gpu,
    load_part,
    need_cuda,
    random_image,
)

LIMIT_S = 240  # of a command
USUAL_S = 90  # that the longest of them needs, about: one that is stopped before it says nothing
# Every file with tests that need a GPU, and what their names have in common.
GPU_TESTS = (
    *("tests/test_ops_positions.py", "tests/test_ops_patch_embed.py", "tests/test_ops_resize_patchify.py"),
    *("tests/test_ops_triton.py", "tests/test_packing.py", "tests/test_slab.py"),
    *("tests/test_tower.py", "tests/test_audio_tower.py", "tests/test_forward.py"),
)
GPU_TEST_NAMES = "cuda or gpu"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_PLACES = (None, "/usr/local/cuda/bin")  # the first: PATH
# Without the project's own options, some of which need plugins that a lent machine does not have.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-o", "addopts=")


def build(options: Options) -> Figures:
    """The extension with its CUDA operators, for this machine's torch."""
    need_cuda(options)
    started = time.perf_counter()
    run(options, sys.executable, "setup.py", "build_ext", "--inplace", RTP_MM_CUDA="1", RTP_MM_CUDA_ARCHS="90a-real")
    yield "seconds", time.perf_counter() - started


def tests(options: Options) -> Figures:
    """Every CUDA and Triton kernel against its twin, towers against Hugging Face, copies and launches, on a GPU."""
    need_cuda(options)

    def end(file: str) -> Any:
        return end_of(options, *PYTEST, "-k", GPU_TEST_NAMES, file, RTP_MM_REQUIRE="cuda,triton")

    with ThreadPoolExecutor(len(GPU_TESTS)) as pool:  # side by side: most of their time they compile
        ends = {pool.submit(end, file): file for file in GPU_TESTS}
        for done in as_completed(ends):
            yield ends[done], done.result()


def sanitizer(options: Options) -> Figures:
    """compute-sanitizer over every kernel."""
    need_cuda(options)
    places = (shutil.which("compute-sanitizer", path=place) for place in SANITIZER_PLACES)
    if (program := next(filter(None, places), None)) is None:
        raise Unavailable("no compute-sanitizer")
    for tool in SANITIZERS:
        outcome = end_of(
            options,
            *(program, "--tool", tool, "--error-exitcode", "1"),
            *(sys.executable, "tests/kernels_once.py"),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # else an access past a tensor stays inside torch's own block
        )
        yield tool, outcome


def invariance(options: Options) -> Figures:
    """Images alone, and in random company at every edge of a graph's bucket: how many changed a bit."""
    for variant in ("ours", "ours, no graphs"):
        yield variant, attempt(partial(changes, variant, options))


def changes(variant: str, options: Options) -> dict[str, Any]:
    """One variant's images; a changed one is a failure."""
    import random

    import torch

    from rtp_mm.vit import graphs
    from rtp_mm.vit.graphs import SIZES

    graphs.SIGHTS = 1  # by graphs from the first batch on
    edges = SIZES if is_gpu(options) else SIZES[:1]
    part = load_part(checkpoint(options), options, VARIANTS[variant])
    shuffled = random.Random(0)
    images = [random_image(h, w) for h, w in ((2, 2), (2, 4), (2, 6), (10, 2), (14, 2), (8, 8), (12, 18))]
    alone = [part.mm_process(image)[0].clone() for image in images]
    changed = tried = 0
    for edge in edges:
        for patches in (edge - 4, edge, edge + 4):
            rest = patches - 8  # beside the images of 4 and 12 patches: a filler that makes up the edge
            batch, expected = [images[0], images[2]], [alone[0], alone[2]]
            if rest > 8:
                batch.append(random_image(2, (rest - 8) // 2))
            order = shuffled.sample(range(len(batch)), len(batch))
            together = part.mm_process_batch([batch[i] for i in order], [], [])
            for place, i in enumerate(order):
                if i < len(expected):
                    tried += 1
                    changed += not torch.equal(together[place][0], expected[i])
    for _ in range(50 if is_gpu(options) else 1):
        order = shuffled.sample(range(len(images)), shuffled.randint(2, len(images)))
        together = part.mm_process_batch([images[i] for i in order], [], [])
        tried += len(order)
        changed += sum(not torch.equal(e, alone[i]) for i, (e, _) in zip(order, together, strict=True))
    found = {"tried": tried, "changed": changed}
    return found | {FAILED: f"{changed} of {tried} images changed a bit"} if changed else found


class CommandError(Exception):
    """A command failed, or took too long; keeps how it ended and the end of what it said."""

    def __init__(self, command: Sequence[str], ended: str, output: str, *, is_cut_off: bool) -> None:
        """is_cut_off: the step's end left it less than a command usually needs, which says nothing of it."""
        self.ended, self.output, self.is_cut_off = ended, output[-3000:], is_cut_off
        super().__init__(f"{' '.join(command)}: {ended}\n{self.output}")


def run(options: Options, *command: str, **environment: str) -> str:
    """The output of a command that imports this checkout, installed or not, and its tests; or raises `CommandError`.

    One that takes too long is killed with all that it started, before the step itself would be.
    """
    left = options.until - time.time()
    limit, is_cut_off = max(1.0, min(LIMIT_S, left)), False
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            ended = f"status {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            ended, is_cut_off = f"not done after {limit:.0f} s", left < USUAL_S
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise CommandError(command, ended, text, is_cut_off=is_cut_off)
    return text


def last_line(output: str) -> str:
    return ["no output", *output.strip().splitlines()][-1]


def end_of(options: Options, *command: str, **environment: str) -> str | dict[str, str]:
    """The last line of a command's output, or how it failed: the commands after it still run."""
    try:
        return last_line(run(options, *command, **environment))
    except CommandError as error:
        if error.is_cut_off:
            return {UNFINISHED: f"no time left, {error.ended}"}
        return {FAILED: f"{error.ended}: {last_line(error.output)}", "output": error.output}
