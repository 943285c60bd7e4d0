"""What it takes to read media: images and sounds of every format, and frames of videos, ours and peers in turns.

python -m benchmarks.bench_media images     files to RGB pixels, by format and decoder
python -m benchmarks.bench_media sounds     files to log-mel frames, by format
python -m benchmarks.bench_media videos     64 frames of 1080p clips to patch rows (minutes: it encodes the clips)
"""

from __future__ import annotations

import argparse

from benchmarks import media_images, media_sounds, media_videos

KINDS = {"images": media_images.run, "sounds": media_sounds.run, "videos": media_videos.run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=KINDS, default=[*KINDS])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for kind in options.kinds:
        KINDS[kind](options.rounds)


if __name__ == "__main__":
    main()
