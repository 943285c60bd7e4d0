"""Qwen2-Audio against Hugging Face: samples to log-mel frames, frames to embeddings, and the error of either. Frames
are made on one core, as by a preprocess worker.

python -m benchmarks.bench_audio CHECKPOINT [--act-type fp32] [--rounds 5]
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as preprocess workers have it; numpy reads it when it is imported

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import interleave
from benchmarks.report import write_result
from rtp_mm._core import bf16_instructions
from rtp_mm.cli.hugging_face_audio import HuggingFaceAudioPeer
from rtp_mm.config import load_settings
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.registry import load_model
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

SECONDS = (1, 5, 30)


def noise(seconds: float) -> np.ndarray:
    """[S] float32 at 16 kHz: pink-like noise in bursts."""
    generator = np.random.default_rng(round(1000 * seconds))
    white = generator.standard_normal(round(16000 * seconds))
    bursts = np.clip(np.sin(np.arange(len(white)) / 2000), 0, 1)
    return (0.1 * np.convolve(white, np.ones(8) / 8, "same") * bursts).astype(np.float32)


def relative_l2(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def measure(checkpoint: Path, act_type: str, rounds: int) -> list[dict[str, Any]]:
    part: Any = load_model(load_settings(checkpoint_path=checkpoint, act_type=act_type, device="cpu")).mm_part
    device = torch.device("cpu")
    peer = HuggingFaceAudioPeer(checkpoint, ACT_DTYPES[act_type], device)
    exact = peer if act_type == "fp32" else HuggingFaceAudioPeer(checkpoint, torch.float32, device)
    rows = []
    for seconds in SECONDS:
        samples = noise(seconds)
        blob = Blob(samples, b"", "")

        def prepare(blob: Blob = blob) -> Any:
            return part.preprocessor(blob, MMUrlType.TENSOR, PreprocessOptions())

        prepared, features = prepare(), peer.features(samples)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the peer's; ours has none of torch's
        frames = interleave({"ours": prepare, "peer": lambda s=samples: peer.features(s)}, rounds)
        torch.set_num_threads(threads)
        tower = interleave(
            {"ours": lambda p=prepared: part.mm_process(p), "peer": lambda f=features: peer.forward(f)}, rounds
        )
        reference = exact.embed(samples)
        errors = {"ours": part.mm_process(prepared), "peer": peer.forward(features)}
        rows.append(
            {
                "seconds": seconds,
                "frames_ms": {name: asdict(timing) for name, timing in frames.items()},
                "tower_ms": {name: asdict(timing) for name, timing in tower.items()},
                "error_against_float32": {name: relative_l2(value, reference) for name, value in errors.items()},
            }
        )
        ratio = {k: t["peer"].median / t["ours"].median for k, t in (("frames", frames), ("tower", tower))}
        print(f"{seconds:3} s: frames {ratio['frames']:.1f}x, tower {ratio['tower']:.1f}x Hugging Face")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--act-type", choices=ACT_DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = measure(arguments.checkpoint, arguments.act_type, arguments.rounds)
    name = f"audio_{arguments.checkpoint.name}_{arguments.act_type}"
    if arguments.act_type == "bf16" and (instructions := bf16_instructions()):
        name += f"_{instructions}"
    write_result(name, {"checkpoint": arguments.checkpoint.name, "act_type": arguments.act_type, "sounds": rows})


if __name__ == "__main__":
    main()
