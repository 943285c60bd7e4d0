"""Which class serves which checkpoint, and how a model is loaded."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from rtp_mm.config import Settings
from rtp_mm.errors import StartError
from rtp_mm.models.gpt_init_model_parameters import read_json
from rtp_mm.models.multimodal_mixin import MultimodalMixin

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen2_audio")  # modules beside this one; each registers itself

_classes: dict[str, type[MultimodalMixin]] = {}
_types_by_architecture: dict[str, str] = {}


def register_model(name: str, cls: type[MultimodalMixin], architectures: Sequence[str] = ()) -> None:
    """Makes `cls` serve MODEL_TYPE `name` and checkpoints whose `config.json` names one of `architectures`.

    A class may have several names; a server calls it by the first.
    """
    _classes[name] = cls
    _types_by_architecture.update(dict.fromkeys(architectures, name))


def load_model(settings: Settings) -> MultimodalMixin:
    """The checkpoint's model with its multimodal part on the device, ready to run.

    Blocks while it reads. MM_TORCH_THREADS counts for all of torch in this process. Raises `StartError`.
    """
    folder = settings.checkpoint_folder()
    for family in FAMILIES:
        importlib.import_module(f"rtp_mm.models.{family}")
    if settings.mm_model_module is not None:
        _import_third_party(settings.mm_model_module)

    if settings.mm_torch_threads is not None:
        torch.set_num_threads(settings.mm_torch_threads)
    cls = _class_for(folder, settings.model_type)
    name = next(name for name, known in _classes.items() if known is cls)
    device = choose_device(settings.device)
    config = cls._create_config(str(folder))
    config.ckpt_path = str(folder)
    config.model_type = name
    config.data_type = settings.act_type
    config.settings = settings
    model = cls(config)
    model.config = config  # also where a third party's __init__ does not call ours
    try:
        with thread_on(device):
            model.init_multimodal(config, device)
            model.load_mm_weight(folder, device)
    except StartError as error:
        is_forced = settings.model_type is not None and name in FAMILIES
        own = read_json(folder / "config.json").get("model_type") if is_forced else None
        if own in (None, name):
            raise
        raise StartError(f"MODEL_TYPE={settings.model_type}, but config.json says {own}: {error}") from None
    return model


def choose_device(name: str) -> torch.device:
    """The device called `name`; for "auto" CUDA where there is one. Raises `StartError`."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise StartError(f"DEVICE={name} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise StartError(f"DEVICE={name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartError(f"DEVICE={name}: this torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def thread_on(device: torch.device) -> AbstractContextManager[object]:
    """A CUDA device with a number as the thread's own, while it is entered.

    Triton's kernels, streams and graphs go to the thread's device, wherever their tensors are.
    """
    return torch.cuda.device(device) if device.type == "cuda" and device.index is not None else nullcontext()


def _class_for(folder: Path, model_type: str | None) -> type[MultimodalMixin]:
    if model_type is None:
        config = read_json(folder / "config.json")
        architectures = map(str, config.get("architectures") or ())
        named = [str(config.get("model_type")), *(_types_by_architecture.get(a) for a in architectures)]
        model_type = next((name for name in named if name in _classes), None)
        if model_type is None:
            raise StartError(
                f"no model for {folder}/config.json (model_type {config.get('model_type')!r}, architectures "
                f"{config.get('architectures')}); known: {', '.join(sorted(_classes))}; MM_MODEL_MODULE adds others"
            )
    if model_type not in _classes:
        raise StartError(f"MODEL_TYPE={model_type} is unknown; known: {', '.join(sorted(_classes))}")
    return _classes[model_type]


def _import_third_party(module: str) -> None:
    """A dotted module name, or the path of a file, which registers its model as it is imported."""
    try:
        if not module.endswith(".py"):
            importlib.import_module(module)
            return
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        if spec is None or spec.loader is None:
            raise ImportError(f"{module} is no Python file")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
    except (ImportError, OSError, SyntaxError) as error:
        raise StartError(f"MM_MODEL_MODULE={module}: {error}") from error
