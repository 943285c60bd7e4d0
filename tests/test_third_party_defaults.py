"""What the interfaces per modality do for a third party's model: its own kind of item, as asked for, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import FRAMES, decode_all, moving
from clips import encode as encode_clip
from numpy.typing import NDArray
from PIL import Image
from sounds import encode as encode_sound
from sounds import speech
from torch import Tensor

from rtp_mm.config import load_settings
from rtp_mm.engine.interface import Engine
from rtp_mm.errors import BadItemsError, MMError, NotSupportedError, WrongFormatError
from rtp_mm.library import load_engine
from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
from rtp_mm.models.multimodal_common import (
    AudioEmbeddingInterface,
    ImageEmbeddingInterface,
    MultiModalEmbeddingInterface,
    VideoEmbeddingInterface,
)
from rtp_mm.models.multimodal_mixin import MultimodalMixin
from rtp_mm.models.registry import register_model
from rtp_mm.types import MMPreprocessConfig, MMUrlType

Pixels = NDArray[np.uint8]
DEFAULT, IMAGE, VIDEO, AUDIO, TENSOR = list(MMUrlType)[:5]
CORNER = [0.25, 0.5, 0.5, 1.0]


class EveryPixel(ImageEmbeddingInterface):
    """Answers with the pixels it was given, one a token."""

    def image_embedding(self, images: list[Image.Image]) -> list[Tensor]:
        return [torch.from_numpy(np.array(image)).float() for image in images]


class EveryPixelModel(MultimodalMixin):
    def _init_multimodal(self, config: GptInitModelParameters) -> None:
        self.mm_part = EveryPixel(config)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    register_model("every_pixel", EveryPixelModel)
    folder = tmp_path_factory.mktemp("every_pixel")
    (folder / "config.json").write_text("{}")
    options = {"act_type": "fp32", "device": "cpu", "mm_max_pixels": 1 << 20}
    engine = load_engine(load_settings(checkpoint_path=folder, model_type="every_pixel", **options)).engine
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def photo(photos: dict[str, Pixels]) -> Pixels:
    return photos["chelsea"][:120, :160]


@pytest.fixture
def url(photo: Pixels, tmp_path: Path) -> str:
    Image.fromarray(photo).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture(scope="module")
def clip(photo: Pixels) -> bytes:
    return encode_clip(moving(photo))


@pytest.fixture(scope="module")
def sound() -> bytes:
    return encode_sound(speech(8000), 16000)


@contextmanager
def refused(error: type[MMError], text: str) -> Iterator[None]:
    """A request for one item is, because of that."""
    with pytest.raises(BadItemsError, match=text) as caught:
        yield
    assert type(caught.value.verdict) is error


def flat(pixels: Pixels | Image.Image) -> Tensor:
    return torch.from_numpy(np.array(pixels)).float().reshape(-1, 3)


def test_an_image_model_gets_a_tensor_of_one_frame_as_an_image(engine: Engine, photo: Pixels) -> None:
    tensors = [torch.from_numpy(pixels.astype(np.int32)) for pixels in (photo, photo[None])]
    for embedding in engine.submit(["", ""], [TENSOR] * 2, tensors).embeddings:
        assert torch.equal(embedding, flat(photo))


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (np.zeros((2, 8, 8, 3), np.int32), r"takes single images, the tensor is a clip \[2, 8, 8, 3\]"),
        (np.zeros(800, np.float32), r"takes single images, the tensor is sound \[800\]"),
    ],
)
def test_an_image_model_refuses_other_tensors_by_name(engine: Engine, tensor: NDArray[Any], text: str) -> None:
    with refused(NotSupportedError, text):
        engine.submit([""], [TENSOR], [tensor])


def test_an_image_model_refuses_other_items_by_name(engine: Engine, url: str, clip: bytes, tmp_path: Path) -> None:
    """By what the request says, and by what the bytes tell."""
    (tmp_path / "clip.mp4").write_bytes(clip)
    film = str(tmp_path / "clip.mp4")
    for path, mm_type, kind in ((url, AUDIO, "audio"), (url, VIDEO, "video"), (film, DEFAULT, "video")):
        with refused(NotSupportedError, f"takes items of type image, not {kind}"):
            engine.submit([path], [mm_type])
    assert torch.equal(engine.submit([url], [IMAGE]).embeddings[0], engine.submit([url], [DEFAULT]).embeddings[0])


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (MMPreprocessConfig(crop_positions=CORNER), None),
        (MMPreprocessConfig(width=33, height=21), (33, 21)),
        (MMPreprocessConfig(width=33, height=21, crop_positions=CORNER), (33, 21)),
        (MMPreprocessConfig(width=33), None),  # they count only together
        (MMPreprocessConfig(max_pixels=4800), (80, 60)),
        (MMPreprocessConfig(min_pixels=4 * 160 * 120), (320, 240)),
        (MMPreprocessConfig(), None),
    ],
)
def test_an_image_model_gets_the_part_and_the_size_that_are_asked_for(
    config: MMPreprocessConfig, size: tuple[int, int] | None, engine: Engine, photo: Pixels, url: str
) -> None:
    """Cut, then resized by Pillow; of a file and of a tensor."""
    image = Image.fromarray(photo[60:, 40:80] if config.crop_positions else photo)
    expected = image if size is None else image.resize(size, Image.Resampling.BICUBIC)
    result = engine.submit([url, ""], [IMAGE, TENSOR], [None, photo.astype(np.int32)], [config] * 2)
    for embedding in result.embeddings:
        assert torch.equal(embedding, flat(expected))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (MMPreprocessConfig(width=4096, height=4096), "MM_MAX_PIXELS"),
        (MMPreprocessConfig(min_pixels=1 << 24), "MM_MAX_PIXELS"),
        (MMPreprocessConfig(min_pixels=200, max_pixels=100), "min_pixels 200 is over max_pixels 100"),
    ],
)
def test_a_size_beyond_the_limits_is_refused(config: MMPreprocessConfig, text: str, engine: Engine, url: str) -> None:
    with refused(WrongFormatError, text):
        engine.submit([url], preprocess_configs=[config])


def test_a_tensor_beyond_the_limit_is_refused(engine: Engine) -> None:
    with refused(WrongFormatError, "MM_MAX_PIXELS"):
        engine.submit([""], [TENSOR], [np.zeros((1024, 1025, 3), np.uint8)])


def test_a_video_model_gets_the_part_that_is_asked_for(clip: bytes, photo: Pixels) -> None:
    config = MMPreprocessConfig(max_frames=2, crop_positions=CORNER)
    frames = VideoEmbeddingInterface()._mm_preprocess(BytesIO(clip), mm_type=VIDEO, configs=config)
    for frame, index in zip(frames, (0, FRAMES - 1), strict=True):
        whole = decode_all(clip)[index]
        height, width, _ = whole.shape
        assert np.array_equal(frame, whole[height // 2 :, width // 4 : width // 2])
    tensor = torch.from_numpy(np.stack([photo, photo]))
    for frame in VideoEmbeddingInterface()._mm_preprocess(tensor, mm_type=TENSOR, configs=config):
        assert np.array_equal(frame, photo[60:, 40:80])


def test_a_video_model_gets_no_more_frames_than_the_limit(photo: Pixels) -> None:
    part = VideoEmbeddingInterface()
    part.settings = load_settings(None, mm_max_frames=3)
    for frames, is_refused in ((2, False), (3, False), (4, True)):
        tensor = torch.from_numpy(np.stack([photo] * frames))
        if is_refused:
            with pytest.raises(WrongFormatError, match=r"4 frames, over the limit of 3 \(MM_MAX_FRAMES\)"):
                part._mm_preprocess(tensor, mm_type=TENSOR)
        else:
            assert len(part._mm_preprocess(tensor, mm_type=TENSOR)) == frames


@pytest.mark.parametrize("sizes", [{"width": 8, "height": 8}, {"min_pixels": 64}, {"max_pixels": 64}])
def test_a_video_model_refuses_sizes_by_name(sizes: dict[str, int], clip: bytes) -> None:
    with pytest.raises(WrongFormatError, match=f"sizes a video's frames itself: no {', '.join(sizes)}$"):
        VideoEmbeddingInterface()._mm_preprocess(BytesIO(clip), mm_type=VIDEO, configs=MMPreprocessConfig(**sizes))
    assert VideoEmbeddingInterface()._mm_preprocess(BytesIO(clip), mm_type=VIDEO, configs=MMPreprocessConfig(width=8))


def test_a_sound_model_gets_samples_and_the_sound_of_a_video(sound: bytes) -> None:
    samples = torch.from_numpy(speech(800))
    model = AudioEmbeddingInterface()
    assert model._mm_preprocess(samples, mm_type=TENSOR) is samples
    film = encode_sound(speech(8000), 16000, "matroska", "pcm_f32le", video=True)
    for file, mm_type in ((sound, AUDIO), (sound, DEFAULT), (film, VIDEO), (film, DEFAULT)):
        waveform, rate = model._mm_preprocess(BytesIO(file), mm_type=mm_type)
        assert (len(waveform), rate) == (1, 16000)


FRAME, SAMPLES = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(800)


@pytest.mark.parametrize(
    ("interface", "data", "mm_type", "text"),
    [
        (VideoEmbeddingInterface, SAMPLES, TENSOR, r"takes videos, the tensor is sound \[800\]"),
        (VideoEmbeddingInterface, "clip", IMAGE, "items of type video, not image"),
        (VideoEmbeddingInterface, "sound", DEFAULT, "items of type video, not audio"),
        (AudioEmbeddingInterface, FRAME, TENSOR, r"takes sound, the tensor is pixels \[1, 8, 8, 3\]"),
        (AudioEmbeddingInterface, "sound", IMAGE, "items of type audio, not image"),
        (AudioEmbeddingInterface, "photo", DEFAULT, "items of type audio, not image"),
    ],
)
def test_what_a_model_does_not_take_is_refused_by_name(
    interface: type[MultiModalEmbeddingInterface],
    data: Tensor | str,
    mm_type: MMUrlType,
    text: str,
    clip: bytes,
    sound: bytes,
    url: str,
) -> None:
    files = {"clip": clip, "sound": sound, "photo": Path(url).read_bytes()}
    with pytest.raises(NotSupportedError, match=text):
        interface()._mm_preprocess(BytesIO(files[data]) if isinstance(data, str) else data, mm_type=mm_type)
