"""The peers that `compare` measures against: here Hugging Face's PIL processor and its own vision tower.

This file and `hugging_face_audio.py` alone import transformers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor

from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.models.gpt_init_model_parameters import read_json
from rtp_mm.models.qwen2_audio import FAMILY as AUDIO_FAMILY
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.media import MediaPreprocessor, file_kind
from rtp_mm.preprocess.video import open_clip
from rtp_mm.types import MMUrlType, PreprocessOptions

try:
    from transformers import AutoConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error
except ImportError as error:
    raise StartError(
        f"the comparison needs Hugging Face's transformers 5: pip install 'rtp_mm[hf]' ({error})"
    ) from error

TOWERS: dict[str, Any] = {
    "qwen2_vl": Qwen2VisionTransformerPretrainedModel,
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
}
WARM_UP_SIDE = 56  # pixels
ANY = PreprocessOptions()  # nothing is asked for


class Peer(Protocol):
    """Hugging Face's answer to one file of `mm_type`. `warm_up_file` is a small one, `describe` what the tower gets."""

    mm_type: ClassVar[MMUrlType]

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None: ...

    @staticmethod
    def warm_up_file() -> bytes: ...

    def preprocess(self, data: bytes, options: PreprocessOptions = ANY) -> Any: ...

    def describe(self, inputs: Any) -> str: ...

    def forward(self, inputs: Any) -> Tensor: ...


def exact_convolutions() -> Any:
    """A context in which a float32 convolution on a GPU is one: by default cuDNN rounds its operands to TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def peer_for(folder: Path) -> type[Peer]:
    """For a checkpoint's family. Raises `StartError` where there is none."""
    family = read_json(folder / "config.json").get("model_type")
    if family in TOWERS:
        return HuggingFacePeer
    if family == AUDIO_FAMILY:
        from rtp_mm.cli.hugging_face_audio import HuggingFaceAudioPeer

        return HuggingFaceAudioPeer
    raise StartError(f"no comparison for {family}; there is one for {', '.join([*TOWERS, AUDIO_FAMILY])}")


class HuggingFacePeer:
    """Processor and tower of a checkpoint; of its weights, the tower's alone are read."""

    mm_type: ClassVar = MMUrlType.DEFAULT  # an image or a video

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Raises `StartError` where the family is unknown or a tensor of the tower is missing."""
        set_verbosity_error()  # type: ignore[no-untyped-call]  # it would list the language model as unexpected
        disable_progress_bar()  # type: ignore[no-untyped-call]
        family = AutoConfig.from_pretrained(folder).model_type
        if family not in TOWERS:
            raise StartError(f"no comparison for {family}; there is one for {', '.join(TOWERS)}")
        self.processor: Any = Qwen2VLImageProcessorPil.from_pretrained(folder)
        config = ImageProcessorConfig.from_checkpoint(folder, PUBLISHED_PROCESSOR)
        self.video = MediaPreprocessor.from_checkpoint(folder, config, load_settings(checkpoint_path=folder)).video
        self.tower, report = TOWERS[family].from_pretrained(
            folder, key_mapping={r"^(model\.)?visual\.": ""}, dtype=dtype, output_loading_info=True
        )
        if report["missing_keys"]:
            raise StartError(f"{folder} lacks {', '.join(sorted(report['missing_keys']))}")
        self.tower = self.tower.eval().to(device)

    @staticmethod
    def warm_up_file() -> bytes:
        """A black square."""
        file = io.BytesIO()
        Image.new("RGB", (WARM_UP_SIDE, WARM_UP_SIDE)).save(file, "PNG")
        return file.getvalue()

    def preprocess(self, data: bytes, options: PreprocessOptions = ANY) -> Any:
        """A file to `pixel_values` and `image_grid_thw`; a limit of `None` is the checkpoint's own. Raises `MMError`
        for a video that cannot be read.
        """
        if file_kind(data, self.mm_type) is MMUrlType.VIDEO:
            return self.clip(self._frames(data, options))
        own = self.processor.size
        size = {
            "shortest_edge": options.min_pixels or own["shortest_edge"],  # in pixels of area, in spite of their names
            "longest_edge": options.max_pixels or own["longest_edge"],
        }
        return self.processor(images=Image.open(io.BytesIO(data)), return_tensors="pt", size=size)

    def _frames(self, data: bytes, options: PreprocessOptions) -> Iterator[Image.Image]:
        """Those that ours chooses, in its size by Pillow: Hugging Face's own video processor resizes by torchvision."""
        with open_clip(data, self.video.limits) as clip:
            chosen = self.video.rule.choose_frames(clip.frames, clip.fps, options)
            plan = self.video.plan(clip.height, clip.width, len(chosen), options)
            for frame in clip.read(chosen):
                yield Image.fromarray(frame).resize((plan.width, plan.height), Image.Resampling.BICUBIC)

    def clip(self, frames: Iterator[Image.Image]) -> Any:
        """Frames of one size to the tower's inputs, and their number as `frames`; the last is repeated where it leaves
        a temporal patch unfilled. The processor takes stills and doubles them; one half of each is used.
        """
        step = self.processor.temporal_patch_size
        halves = []
        for frame in frames:
            still = self.processor(images=frame, return_tensors="pt", do_resize=False)
            _, h, w = still["image_grid_thw"][0].tolist()
            halves.append(still["pixel_values"].view(h * w, 3, step, -1)[:, :, 0])
        count = len(halves)
        halves += halves[-1:] * (-count % step)
        pixels = torch.stack(halves).unflatten(0, (-1, step))  # [t, T, h * w, C, P * P]
        grid = torch.tensor([[len(pixels), h, w]])
        return {
            "pixel_values": pixels.permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(1),
            "image_grid_thw": grid,
            "frames": count,
        }

    def describe(self, inputs: Any) -> str:
        """Frames, of a clip, and the grid in patches."""
        grid = " x ".join(map(str, inputs["image_grid_thw"][0].tolist()))
        return f"{inputs['frames']} frames, grid {grid}" if "frames" in inputs else f"grid {grid}"

    @torch.inference_mode()
    def forward(self, inputs: Any) -> Tensor:
        """[tokens, out_hidden] on the host."""
        device = self.tower.device
        values, grid = inputs["pixel_values"].to(device), inputs["image_grid_thw"].to(device)
        with exact_convolutions():
            embedding: Tensor = self.tower(values, grid_thw=grid).pooler_output
        return embedding.cpu()
