"""Steps of `gpu_session` that build and check: kernels against their twins, an image's bits in any company."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

from benchmarks.gpu_common import (
    ROOT,
    VARIANTS,
    Figures,
    Options,
    Unavailable,
    checkpoint,
    is_gpu,
    load_part,
    need_cuda,
    random_image,
)

LIMIT_S = 480  # of a command, less than a lease's longest call
KERNEL_TESTS = ("tests/test_ops_positions.py", "tests/test_ops_patch_embed.py", "tests/test_ops_resize_patchify.py")
TRITON_TESTS = ("tests/triton_kernels.py", "tests/triton_linear.py")
SANITIZERS = ("memcheck", "racecheck", "initcheck")


def build(options: Options) -> Figures:
    """The extension with its CUDA operators, for this machine's torch."""
    need_cuda(options)
    started = time.perf_counter()
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")
    run(*pip, RTP_MM_CUDA="1", RTP_MM_CUDA_ARCHS="90a-real")
    return {"seconds": time.perf_counter() - started}


def tests(options: Options) -> Figures:
    """Every CUDA and Triton kernel against its twin, the towers against Hugging Face, and graphs, on the GPU."""
    need_cuda(options)
    found = {}
    files = (*KERNEL_TESTS, "tests/test_ops_triton.py", "tests/test_tower.py")
    for file in files:
        command = (sys.executable, "-m", "pytest", "-q", "-k", "cuda or gpu or capability or spills", file)
        found[file] = end_of(*command, RTP_MM_REQUIRE="cuda,triton")
    return found


def sanitizer(options: Options) -> Figures:
    """compute-sanitizer over the kernels' tests."""
    need_cuda(options)
    if shutil.which("compute-sanitizer") is None:
        raise Unavailable("no compute-sanitizer")
    found = {}
    pytest = (sys.executable, "-m", "pytest", "-q", "-x", "-k", "cuda", *KERNEL_TESTS)
    targets: dict[str, tuple[str, ...]] = {"operators": pytest}
    targets |= {script: (sys.executable, script) for script in TRITON_TESTS}
    for target, command in targets.items():
        for tool in SANITIZERS:
            found[f"{target}, {tool}"] = end_of(
                *("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"),
                *command,
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # else an access past a tensor stays inside torch's own block
                PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
            )
    return found


def invariance(options: Options) -> Figures:
    """Images alone, and in random company at every edge of a graph's bucket: how many changed a bit."""
    import random

    import torch

    from rtp_mm.vit.graphs import SIZES

    edges = SIZES if is_gpu(options) else SIZES[:2]
    found = {}
    folder = checkpoint(options)
    for variant in ("ours", "ours, no graphs"):
        part = load_part(folder, options, VARIANTS[variant])
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
        for _ in range(50 if is_gpu(options) else 3):
            order = shuffled.sample(range(len(images)), shuffled.randint(2, len(images)))
            together = part.mm_process_batch([images[i] for i in order], [], [])
            tried += len(order)
            changed += sum(not torch.equal(e, alone[i]) for i, (e, _) in zip(order, together, strict=True))
        found[variant] = {"tried": tried, "changed": changed}
    return found


def run(*command: str, **environment: str) -> str:
    """The output of a command; raises with the end of it where the command failed or took too long."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command)}: not done after {LIMIT_S} s\n{str(error.stdout)[-2000:]}") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def end_of(*command: str, **environment: str) -> str:
    """The last line of a command's output, or how it failed: the commands after it still run."""
    try:
        return run(*command, **environment).strip().splitlines()[-1]
    except RuntimeError as error:
        return f"FAILED: {error}"
