"""Every option of the server and the library: an environment variable (`START_PORT`) and a flag (`--start_port`).

Where RTP-LLM has the variable, name and meaning are RTP-LLM's. Imports no torch: preprocess workers read this file.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, DirectoryPath, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from rtp_mm.cores import MOST_DECODE_THREADS, available_cores
from rtp_mm.errors import StartError

Port = Annotated[int, Field(ge=1, le=65534)]  # gRPC listens on the next one
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PILLOW_MAX_PIXELS = 178956970  # beyond this Pillow itself takes an image for a bomb
# Readers of Pillow's that know a file by its first bytes, and tell from its header how many pixels they will decode, so
# that a bomb is seen before it costs memory. Never the others: EPS and WMF run programs; BLP, CUR, DCX, ICNS and IPTC
# hold files of other formats, of sizes that they need not tell (IPTC of any, of EPS too); IM, IMT, PCD and SPIDER try
# whatever comes; FITS and MCIDAS hold measurements; BUFR, GRIB, HDF5 and MPEG are for libraries that are not there.
EXTRA_IMAGE_FORMATS = (
    "DDS", "DIB", "FLI", "FTEX", "GBR", "MSP", "PCX", "PIXAR", "PSD", "SGI", "SUN", "XBM", "XPM", "XVTHUMB",
)  # fmt: skip
_FLAG = re.compile(r"(?<=^--)[a-z0-9-]+(?==|$)")
# All that RTP-LLM calls a dtype, bp16 included; it takes them in any case.
_DTYPE_NAMES = (("bf16", "bfloat16", "bp16"), ("fp16", "float16"), ("fp32", "float32"))
ACT_TYPES = {name: names[0] for names in _DTYPE_NAMES for name in names}
_ALIKE = 0.9  # of a name without our prefix, which may be another program's
_TOKENS = ("MM_AUTH_TOKEN", "MM_AUTH_TOKEN_FILE")
SECRETS = {"download_headers", "mm_fetch_proxy", "mm_auth_token"}  # options whose values no message repeats


def _digit(value: Any) -> Any:
    """Text of digits to int, so that a Literal of ints can come from the environment."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _act_type(value: Any) -> Any:
    """One name for each dtype."""
    return ACT_TYPES.get(value.lower(), value) if isinstance(value, str) else value


def _parsed(value: Any) -> Any:
    """JSON, as headers come from the environment and from flags."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError('must be a JSON object, as {"Authorization": "Bearer ..."}')
    return parsed


def _as_headers(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not name or any(character in name + value for character in "\r\n\0"):
            raise ValueError(f"{name!r} is empty or spans lines")
    return headers


def _split(value: Any) -> Any:
    """Comma-separated text to its parts, as a list comes from the environment and from flags."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _as_host(pattern: str) -> str:
    """An address, a name or `*.name`, as URLs are compared with it."""
    try:
        return str(ip_address(pattern))
    except ValueError:
        if not re.fullmatch(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", pattern, re.IGNORECASE):
            raise ValueError(f"{pattern!r} is no host name (ASCII, no port), address or *.name") from None
        return pattern.lower()


def _as_scheme(scheme: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme, re.IGNORECASE):
        raise ValueError(f"{scheme!r} is no URL scheme")
    if scheme.lower() in {"http", "https", "file", "local", "data"}:
        raise ValueError(f"{scheme!r} has options of its own")
    return scheme.lower()


def _as_extra_format(name: str) -> str:
    if name.upper() not in EXTRA_IMAGE_FORMATS:
        raise ValueError(f"{name!r} is none that can be added: {', '.join(EXTRA_IMAGE_FORMATS)}")
    return name.upper()


def _as_proxy(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_proxy = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_proxy = False
    if not is_proxy or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("must be http://[user:password@]host[:port]")
    return url


class Settings(BaseSettings):
    """All options, validated. Flags win over environment variables, these over the defaults."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,  # an empty path would mean the working directory
        cli_prog_name="rtp_mm.start_server",
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    # What to serve, and where.
    checkpoint_path: Path | None = Field(None, description="folder of the model in Hugging Face format")
    model_type: str | None = Field(
        None,
        description="model family: qwen2_vl, qwen2_5_vl, qwen2_audio (RTP-LLM's qwen_v2_audio is the same) or one of "
        "MM_MODEL_MODULE; default: what the checkpoint's config.json says",
    )
    mm_model_module: str | None = Field(
        None, description="Python module or .py file that registers a third party's model"
    )
    act_type: Annotated[Literal["bf16", "fp16", "fp32"], BeforeValidator(_act_type)] = Field(
        "bf16", description="dtype of the tower and of the embeddings: bf16, fp16, fp32, or a long name (bfloat16, ...)"
    )
    device: str = Field("auto", description="auto (cuda where there is one), cpu, cuda or cuda:N")
    start_port: Port = Field(8088, description="HTTP port; gRPC listens on the next one")
    mm_bind_address: str = Field("0.0.0.0", description="address both ports listen on")
    vit_separation: Annotated[Literal[0, 1, 2], BeforeValidator(_digit)] = Field(
        1, description="0: library in process, 1: server, 2: library, remote tower"
    )
    remote_vit_server_ip: str | None = Field(
        None, description="VIT_SEPARATION=2: ip[:port] of the server, port 8089 if left out"
    )
    mm_wire: Literal["auto", "items", "concat"] = Field(
        "auto", description="form of the reply; auto: concat for callers that send mm_timeout_ms, else items"
    )

    # Fetch.
    download_headers: Annotated[dict[str, str], NoDecode, BeforeValidator(_parsed), AfterValidator(_as_headers)] = (
        Field(default_factory=dict, description="JSON object of HTTP headers for downloads")
    )
    mm_image_max_file_size_kb: Positive = Field(65536, description="largest image file, KiB")
    mm_video_max_file_size_kb: Positive = Field(1048576, description="largest video or sound file, KiB")
    mm_fetch_timeout_ms: Positive = Field(30000, description="connect, and longest silence of a source, ms")
    mm_max_redirects: NonNegative = Field(5, description="redirects followed per download")
    mm_fetch_retries: Annotated[int, Field(ge=0, le=10)] = Field(
        2, description="further tries of a download that met a refused or broken connection, 408, 429 or 5xx"
    )
    mm_bytes_cache_mb: NonNegative = Field(256, description="downloads kept, MiB of host memory; 0: none")
    mm_bytes_cache_ttl_s: NonNegative = Field(
        60, description="how long a download stays fresh whose source sends no Cache-Control or Expires, seconds"
    )
    mm_allow_private_network: bool = Field(False, description="1: downloads may reach addresses that are not public")
    mm_allowed_media_domains: Annotated[
        tuple[Annotated[str, AfterValidator(_as_host)], ...] | None, NoDecode, BeforeValidator(_split)
    ] = Field(
        None,
        description="hosts that downloads may reach, and no others: names, addresses, *.suffix, separated by commas",
    )
    mm_allowed_schemes: Annotated[
        tuple[Annotated[str, AfterValidator(_as_scheme)], ...], NoDecode, BeforeValidator(_split)
    ] = Field((), description="further URL schemes, read by fsspec: s3, gs, ... separated by commas")
    mm_fetch_proxy: Annotated[str, AfterValidator(_as_proxy)] | None = Field(
        None, description="http://[user:password@]host[:port] that downloads go through; the environment's is ignored"
    )
    mm_local_media: bool = Field(True, description="0: no local files for anybody")
    mm_allowed_local_media_path: DirectoryPath | None = Field(
        None, description="folder that every caller may name files in; without it only local callers may, anywhere"
    )

    # Decode and preprocess.
    mm_decode_backend: Literal["auto", "cpu", "gpu"] = Field(
        "auto",
        description="gpu: DALI decodes what it can on the tower's GPU; auto: videos there, where DALI is installed, "
        "and images on the CPU, with Pillow's bytes; cpu: neither",
    )
    mm_max_pixels: Annotated[int, Field(gt=0, le=PILLOW_MAX_PIXELS)] = Field(
        PILLOW_MAX_PIXELS, description="largest decoded image, pixels"
    )
    mm_allow_truncated_images: bool = Field(False, description="1: a truncated image is decoded as far as it goes")
    mm_extra_image_formats: Annotated[
        tuple[Annotated[str, AfterValidator(_as_extra_format)], ...], NoDecode, BeforeValidator(_split)
    ] = Field((), description=f"further image formats, separated by commas: {', '.join(EXTRA_IMAGE_FORMATS)}")
    mm_exif_transpose: bool = Field(False, description="1: turn images as their EXIF orientation says")
    mm_video_rule: Literal["qwen", "hf"] = Field(
        "qwen", description="whose rule chooses a video's frames and their size: qwen-vl-utils' or transformers'"
    )
    mm_max_frames: Positive = Field(768, description="most frames taken of one video")
    mm_max_video_seconds: Positive = Field(7200, description="longest video, seconds")
    mm_max_animation_pixels: Positive = Field(
        1 << 32,  # Pillow takes less than a minute, where frames have hardly a byte each
        description="all frames of an animation (GIF, WebP, APNG, AVIF) together, pixels; 2071 frames of 1080p fit",
    )
    mm_pos_t: Literal["index", "scaled"] = Field(
        "index",
        description="t of a video's position ids; index: the number of the temporal patch; scaled: its time, in units "
        "of 1 / tokens_per_second",
    )
    mm_max_audio_seconds: Positive = Field(
        600, description="longest sound that a third party's model is given, seconds; our own cut it where they end"
    )
    mm_resize_order: Literal["auto", "pillow-12.1", "pillow-12.2", "pillow-13.0"] = Field(
        "auto", description="whose rule decides the first pass of a resize; auto: the installed Pillow's"
    )
    mm_preprocess_max_workers: Positive = Field(
        default_factory=available_cores,
        description="preprocess workers; default: one per core, at most the container's CPU quota",
    )
    mm_decode_threads: Positive = Field(
        MOST_DECODE_THREADS,
        description="most threads that decode one video, AVIF or HEIC image; items decoded at once share the cores, at "
        "least one thread each",
    )
    mm_torch_threads: Positive | None = Field(
        None,
        description="CPU threads of the tower; default: one per core; of a server at most its container's CPU quota",
    )
    use_local_preprocess: bool = Field(
        False, description="1: preprocess in threads of this process instead of worker processes"
    )
    mm_worker_memory_mb: Annotated[int, Field(ge=64)] = Field(
        2048, description="data that one preprocess worker may hold, MiB; an item that needs more fails"
    )
    mm_slab_mb: Positive = Field(
        2048, description="patch rows between preprocess workers and the device, MiB; memory is taken as it is used"
    )

    # Engine.
    mm_timeout_ms: Positive = Field(120000, description="longest time for one request, ms")
    mm_max_queue_size: Positive = Field(1024, description="requests in the server at once; more are refused at once")
    mm_max_queue_patches: Positive | None = Field(
        None, description="patches in the server at once; more are refused at once; default: 32 full batches"
    )
    mm_max_bytes_in_flight_mb: Positive = Field(
        4096, description="MiB held for requests in progress (messages, files, patches, answers); more are refused"
    )
    mm_max_message_mb: int = Field(
        1024,
        ge=1,
        le=1024,
        description="largest request message, MiB: held while it arrives, outside all other limits; for URLs 16 is "
        "plenty",
    )
    mm_max_patches_per_item: Positive | None = Field(
        None,
        description="patches of one image or video (of 64 frames of 1080p: 92160); default: 65536 on a CPU; on CUDA "
        "460800, or what its memory holds",
    )
    vit_max_batch_patches: Positive | None = Field(
        None,
        description="patches in one forward, of which a CPU runs two side by side; a larger image goes alone; default: "
        "4096 on a CPU, 32768 on CUDA or what the device's free memory holds",
    )
    mm_attention: Literal["auto", "fastest", "flash", "torch", "packed", "sdpa"] = Field(
        "auto", description="attention backend of the tower; auto: the first that can run, fastest: measured at start"
    )
    mm_batch_invariant: bool = Field(
        True, description="0: on CUDA, GEMMs whose bits may depend on what else is in the batch"
    )
    mm_compute_type: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="what a tower with ACT_TYPE=bf16 multiplies on a CPU; auto: bf16 where that is faster (AMX, AMD's "
        "AVX-512 BF16), else fp32, which is more exact",
    )
    mm_quantization: Literal["none", "fp8", "int8"] = Field(
        "none",
        description="fp8: linear layers in e4m3 on GPUs that can, less exact; int8: most of them on CPUs with AVX-512 "
        "VNNI or ARM's i8mm, 1.5 to 2 times as fast as float32, with 0.85 of the error of Hugging Face's bf16 (random "
        "weights)",
    )
    mm_cuda_graphs: Literal["auto", "0", "1"] = Field(
        "auto",
        description="1: replay small batches on CUDA as graphs; auto: in a server whose attention backend allows it",
    )
    mm_cuda_graphs_mb: Positive = Field(1024, description="device memory for CUDA graphs, MiB")
    mm_torch_compile: bool = Field(
        False,
        description="the tower's blocks by torch.compile, which needs a C++ compiler and, for the first forwards, many "
        "seconds; our own kernels leave it little to fuse",
    )
    mm_embedding_cache_mb: NonNegative = Field(1024, description="embedding cache, MiB of host memory; 0: none")
    mm_patch_cache_mb: NonNegative = Field(64, description="cache of prepared patches, MiB of host memory; 0: none")

    # Security.
    mm_tls_cert: Path | None = Field(
        None, description="certificate chain, PEM: TLS on both ports; a client's own with MM_REMOTE_TLS_CA"
    )
    mm_tls_key: Path | None = Field(None, description="its key, PEM, not encrypted")
    mm_tls_client_ca: Path | None = Field(
        None, description="CA, PEM, whose certificates clients must show (mutual TLS)"
    )
    mm_auth_token: SecretStr | None = Field(
        None,
        description="bearer token that callers must show, or that a client shows; set it in the environment: ps shows "
        "flags",
    )
    mm_auth_token_file: Path | None = Field(None, description="file that holds the token, read again when it changes")
    mm_remote_tls_ca: Path | None = Field(
        None, description="VIT_SEPARATION=2: CA of the server, PEM; without it the connection is not encrypted"
    )

    # Operation.
    mm_otel: bool | None = Field(
        None, description="1: OpenTelemetry spans; default: where OTEL_EXPORTER_OTLP_(TRACES_)ENDPOINT is set"
    )
    mm_profile_dir: DirectoryPath | None = Field(
        None, description="folder for traces of POST /debug/profile; unset: off"
    )
    mm_max_connection_age_ms: Positive = Field(
        600000,
        description="a gRPC connection is closed after this long, ms, once its calls have ended, and a client opens "
        "another; what its calls leave unread is dropped MM_TIMEOUT_MS and a minute later",
    )
    mm_drain_timeout_ms: NonNegative = Field(30000, description="SIGTERM: time for running calls to finish, ms")
    disable_access_log: bool = Field(False, description="1: no log line per request")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="lowest level logged")

    def checkpoint_folder(self) -> Path:
        """CHECKPOINT_PATH with `~` expanded. Raises `StartError` where it is unset, or no folder."""
        if self.checkpoint_path is None:
            raise StartError("CHECKPOINT_PATH is not set: the folder of a model in Hugging Face format")
        folder = self.checkpoint_path.expanduser()
        if not folder.is_dir():
            raise StartError(f"CHECKPOINT_PATH={self.checkpoint_path} is no folder{_how_to_have(self.checkpoint_path)}")
        return folder


def _how_to_have(path: Path) -> str:
    is_on_a_hub = not path.is_absolute() and len(path.parts) == 2
    return f"; models are not downloaded: hf download {path} --local-dir FOLDER" if is_on_a_hub else ""


def load_settings(arguments: list[str] | None = None, **overrides: Any) -> Settings:
    """Settings from flags (`None`: none; `--start-port` is `--start_port`), the environment and `overrides`; `--help`
    prints and exits.

    Raises `StartError`, one line that names each wrong option, its value and what it should be.
    """
    if unknown := [name for name in overrides if name not in Settings.model_fields]:
        raise StartError("; ".join(f"{name} is no option{_instead(name)}" for name in unknown))
    for name in _TOKENS:
        if os.environ.get(name) == "":
            raise StartError(f"{name} is set and empty: unset it, if callers need no token")
    flags = [_FLAG.sub(lambda flag: flag[0].replace("-", "_"), argument) for argument in arguments or []]
    cli: dict[str, Any] = {"_cli_parse_args": flags, "_cli_exit_on_error": False}
    try:
        return Settings(**cli, **overrides)
    except ValidationError as error:
        raise StartError("; ".join(_describe(e) for e in error.errors())) from None
    except SettingsError as error:
        raise StartError(f"{error} (--help lists the options)") from None


def unknown_variables(names: Iterable[str]) -> list[str]:
    """Of environment variables those that look like options and are none, each with what may be meant."""
    unknown = sorted(name for name in names if name.lower() not in Settings.model_fields)
    meant = ((name, _instead(name, 0.8 if name.upper().startswith("MM_") else _ALIKE)) for name in unknown)
    return [f"{name} is no option{instead}" for name, instead in meant if instead or name.upper().startswith("MM_")]


def _instead(name: str, cutoff: float = 0.8) -> str:
    close = difflib.get_close_matches(name.lower(), Settings.model_fields, 1, cutoff=cutoff)
    return f", {close[0].upper() if name.isupper() else close[0]} is" if close else ""


def _describe(error: Any) -> str:
    name, *_ = map(str, error["loc"])
    value = "" if name in SECRETS else f"={error['input']!r}"
    is_of_bool = error["type"].startswith("bool")
    reason = "Must be 0 or 1, or true or false" if is_of_bool else error["msg"].removeprefix("Value error, ")
    return f"{name.upper()}{value}: {reason[0].lower()}{reason[1:]}"
