"""The library's front door: one call gives an engine, in this process or in another."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from typing import Any

from rtp_mm import compat
from rtp_mm.config import Settings, load_settings
from rtp_mm.engine.interface import Engine
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.errors import StartError
from rtp_mm.server.state import Loaded
from rtp_mm.vit.read_ahead import read_ahead


def create_engine(**options: Any) -> Engine:
    """An engine for the options given, else for the environment; options as in `rtp_mm.config.Settings`.

    vit_separation=0 (default): loads `checkpoint_path` in this process; blocks for seconds.
    vit_separation=2: the server at `remote_vit_server_ip`, `ip[:port]`.
    Raises `StartError` for options that name no engine.
    """
    settings = load_settings(None, **options)
    is_asked = "vit_separation" in settings.model_fields_set  # the field's own default is the server's
    if is_asked and settings.vit_separation == 1:
        raise StartError("vit_separation=1 is the server: run python -m rtp_mm.start_server")
    if is_asked and settings.vit_separation == 2:
        return _remote_engine(settings)
    if settings.mm_cuda_graphs == "auto":  # a capture fails where another engine waits for the device meanwhile
        settings = settings.model_copy(update={"mm_cuda_graphs": "0"})
    return load_engine(settings).engine


def load_engine(settings: Settings, loop: asyncio.AbstractEventLoop | None = None) -> Loaded:
    """The checkpoint's model and the engine around it, on `loop`, a server's, or a loop of its own. Blocks; raises
    `StartError`.
    """
    # While torch is imported, which takes a second or two of one core:
    threading.Thread(target=read_ahead, args=(settings.checkpoint_folder(),), name="read-ahead", daemon=True).start()
    with ExitStack() as undo:
        pool = None
        if settings.mm_model_module is None and not settings.use_local_preprocess:
            undo.callback((pool := WorkerPool.of(settings)).close)
        loaded = _load(settings, loop, pool)
        undo.pop_all()
    return loaded


def _load(settings: Settings, loop: asyncio.AbstractEventLoop | None, pool: WorkerPool | None) -> Loaded:
    from rtp_mm.engine.process_engine import MMProcessEngine
    from rtp_mm.models.registry import choose_device, load_model
    from rtp_mm.server.wire import seal

    if settings.mm_model_module is not None:
        compat.install()  # a third party's model is written against RTP-LLM's import paths
    model = load_model(settings)
    return Loaded(
        MMProcessEngine(model, settings, loop, seal if loop is not None else None, pool),
        model=model.config.model_type,
        dtype=model.config.data_type,
        device=str(choose_device(settings.device)),
        quantization=model.mm_part.quantization,
        products=model.mm_part.products,
    )


def _remote_engine(settings: Settings) -> Engine:
    from rtp_mm.server.client import RemoteEngine

    if not settings.remote_vit_server_ip:
        raise StartError("REMOTE_VIT_SERVER_IP is not set: ip[:port] of the server")
    return RemoteEngine(settings.remote_vit_server_ip, settings)
