"""`rtp-mm`: serve, embed, status, compare, look, init-checkpoint, proto, options.

This file knows the commands and their flags; what they do is imported when one runs, so that `--help` is instant.
"""

from __future__ import annotations

import errno
import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rtp_mm import __version__
from rtp_mm.errors import MMError, StartError

app = typer.Typer(
    help="URL in, embeddings out: the multimodal part of an LLM, deployed on its own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Media(StrEnum):
    default = "default"
    image = "image"
    video = "video"
    audio = "audio"


class Wire(StrEnum):
    items = "items"
    concat = "concat"


class Family(StrEnum):
    qwen2_vl = "qwen2_vl"
    qwen2_5_vl = "qwen2_5_vl"
    qwen2_audio = "qwen2_audio"


class Size(StrEnum):
    tiny = "tiny"
    b2 = "2b"
    b3 = "3b"
    b7 = "7b"


def _dtype(name: str) -> str:
    """ACT_TYPE as a server reads it."""
    from rtp_mm.config import ACT_TYPES

    if (dtype := ACT_TYPES.get(name.lower())) is None:
        raise typer.BadParameter(f"must be bf16, fp16, fp32, or a long name (bfloat16, ...), got {name!r}")
    return dtype


Url = Annotated[str, typer.Argument(help="http(s), file or data URL, or a path")]
Checkpoint = Annotated[
    Path, typer.Option(envvar="CHECKPOINT_PATH", help="folder of the model in Hugging Face format", show_default=False)
]
Dtype = Annotated[
    str,
    typer.Option(
        "--act-type",
        "--dtype",
        envvar="ACT_TYPE",
        callback=_dtype,
        metavar="[bf16|fp16|fp32]",
        help="dtype of the tower",
    ),
]
Device = Annotated[str, typer.Option(envvar="DEVICE", help="auto, cpu, cuda or cuda:N")]
MinPixels = Annotated[
    int | None, typer.Option(min=1, help="fewest pixels of an image or frame, resized", show_default=False)
]
MaxPixels = Annotated[
    int | None, typer.Option(min=1, help="most pixels of an image or frame, resized", show_default=False)
]
Fps = Annotated[int | None, typer.Option("--fps", min=1, help="frames taken of a second of video", show_default=False)]
MinFrames = Annotated[int | None, typer.Option(min=1, help="fewest frames taken of a video", show_default=False)]
MaxFrames = Annotated[int | None, typer.Option(min=1, help="most frames taken of a video", show_default=False)]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line (`None`: the process's own). Errors with a reason are one red line and status 1."""
    try:
        return _run(arguments)
    except (MMError, StartError) as error:
        reason = str(error)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        reason = "torch is not installed"
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        reason = f"the output cannot be written: {error.strerror}"
        sys.stdout = io.StringIO()  # what is left of it would fail again as the interpreter ends
    Console(stderr=True, soft_wrap=True).print(reason, style="red", markup=False, highlight=False)
    return 1


def _run(arguments: list[str] | None) -> int:
    try:
        app(arguments)
    except SystemExit as exit_:
        if exit_.code:
            return exit_.code if isinstance(exit_.code, int) else 1
    if sys.stdout is not None:
        sys.stdout.flush()  # here, where a full disk can still be told
    return 0


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Start the server; all flags are those of `python -m rtp_mm.start_server` (try `serve --help`)."""
    from rtp_mm.start_server import main as start

    raise typer.Exit(start(context.args))


@app.command()
def embed(
    context: typer.Context,
    urls: Annotated[list[str], typer.Argument(help="http(s), file or data URLs, or paths")],
    checkpoint: Annotated[
        Path | None, typer.Option(envvar="CHECKPOINT_PATH", help="run this model here", show_default=False)
    ] = None,
    server: Annotated[str | None, typer.Option(help="ip:port (gRPC) of a server to ask", show_default=False)] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="embedding.N and position_ids.N of the N-th URL: .safetensors, or .npz (bf16 as float32 there)",
            show_default=False,
        ),
    ] = None,
    media: Annotated[Media, typer.Option("--type", help="default: told from the bytes")] = Media.default,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    fps: Fps = None,
    min_frames: MinFrames = None,
    max_frames: MaxFrames = None,
    act_type: Dtype = "bf16",
    device: Device = "auto",
) -> None:
    """Print, or save, the embeddings and position ids of images, videos and sounds, by a checkpoint or a server."""
    from rtp_mm.cli.embed import run
    from rtp_mm.types import MMUrlType, PreprocessOptions

    if server is not None and (source := context.get_parameter_source("checkpoint")) and source.name == "ENVIRONMENT":
        checkpoint = None
    mm_type = MMUrlType[media.name.upper()]
    options = PreprocessOptions(
        min_pixels=min_pixels, max_pixels=max_pixels, fps=fps, min_frames=min_frames, max_frames=max_frames
    )
    run(urls, checkpoint, server, save, mm_type, options, act_type, device)


@app.command()
def status(server: Annotated[str, typer.Argument(help="ip[:port] (gRPC) of a server")]) -> None:
    """Show what a running server is doing. MM_REMOTE_TLS_CA and MM_AUTH_TOKEN count, as for embed --server."""
    from rtp_mm.cli.status import run

    run(server)


@app.command()
def compare(
    url: Url,
    checkpoint: Checkpoint,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    fps: Fps = None,
    min_frames: MinFrames = None,
    max_frames: MaxFrames = None,
    repeat: Annotated[int, typer.Option(min=1, help="timed runs of each; the median counts")] = 1,
    act_type: Dtype = "bf16",
    device: Device = "auto",
) -> None:
    """Ours against Hugging Face on the same checkpoint and image, video or sound: agreement, error, times.

    Of a video both get the same frames, which Pillow resizes for Hugging Face.
    """
    from rtp_mm.cli.compare import Task, run
    from rtp_mm.types import PreprocessOptions

    options = PreprocessOptions(
        min_pixels=min_pixels, max_pixels=max_pixels, fps=fps, min_frames=min_frames, max_frames=max_frames
    )
    run(Task(url, checkpoint, options, repeat, act_type, device))


@app.command()
def look(
    url: Url,
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="picture to write")] = Path("look.png"),
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    fps: Fps = None,
    min_frames: MinFrames = None,
    max_frames: MaxFrames = None,
) -> None:
    """Save what the tower sees: an image rebuilt from its patch rows, with patches, tokens and windows drawn in; of a
    video the chosen frames with their times; of a sound its log-mel spectrogram.
    """
    from rtp_mm.cli.look import run
    from rtp_mm.types import PreprocessOptions

    options = PreprocessOptions(
        min_pixels=min_pixels, max_pixels=max_pixels, fps=fps, min_frames=min_frames, max_frames=max_frames
    )
    run(url, checkpoint, out, options)


@app.command()
def init_checkpoint(
    folder: Annotated[Path, typer.Argument(help="where to write it; must not hold one")],
    family: Annotated[Family, typer.Option()] = Family.qwen2_5_vl,
    size: Annotated[
        Size,
        typer.Option(help="tiny, or published: 2b, 7b of Qwen2-VL; 3b, 7b of Qwen2.5-VL; 7b of Qwen2-Audio"),
    ] = Size.tiny,
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights")] = 0,
    sparse_llm: Annotated[
        bool, typer.Option("--sparse-llm", help="index the language model too, as holes that take no disk")
    ] = False,
) -> None:
    """Write a checkpoint of a published shape with random weights of the vision or audio tower."""
    from rtp_mm.cli.init_checkpoint import run

    run(folder, family.value, size.value, seed, sparse_llm)


@app.command()
def proto(
    wire: Annotated[Wire, typer.Option(help="form of the reply, as MM_WIRE: one output per input, or one for all")] = (
        Wire.items
    ),
) -> None:
    """Print the service's schema, a .proto file for clients in any language."""
    from rtp_mm.server.proto import proto_source

    print(proto_source("concat" if wire is Wire.concat else "items"), end="")


@app.command()
def options(
    markdown: Annotated[bool, typer.Option("--markdown", help="as the table of docs/OPTIONS.md")] = False,
) -> None:
    """List every option of server and library with its default and meaning."""
    from rtp_mm.cli.options import run

    run(markdown)
