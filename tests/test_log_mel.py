"""Log-mel frames: Whisper's to float32's rounding, nearer to the exact ones than Hugging Face's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sounds import encode, sine, speech
from transformers import WhisperFeatureExtractor

from rtp_mm.errors import NotSupportedError, StartError, WrongFormatError
from rtp_mm.models.qwen2_audio import PUBLISHED_RULE as RULE
from rtp_mm.preprocess.audio import AudioPreprocessor
from rtp_mm.preprocess.audio_config import mel_rule
from rtp_mm.preprocess.log_mel import LOUDEST, log_mel, mel_filters
from rtp_mm.types import Blob, LogMel, MMUrlType, PreprocessOptions

# Around one step, two, whole seconds, the end of 30 s with its mirrored edge.
LENGTHS = [321, 16001, 479801, 480000]
PEER = WhisperFeatureExtractor(feature_size=128)


def prepare(samples: NDArray[np.float32]) -> LogMel:
    return AudioPreprocessor(RULE)(Blob(samples, b"", "tensor"), MMUrlType.TENSOR, PreprocessOptions())


def test_filters_equal_transformers() -> None:
    np.testing.assert_allclose(mel_filters(RULE), PEER.mel_filters, atol=1e-8)


@pytest.mark.parametrize("length", LENGTHS)
def test_frames_equal_the_exact_ones_and_hugging_faces(length: int) -> None:
    samples = speech(length)
    theirs = PEER(samples, sampling_rate=16000, return_tensors="np", return_attention_mask=True)
    silence_behind = np.pad(samples.astype(np.float64), (0, RULE.max_samples - length))
    exact = PEER._np_extract_fbank_features([silence_behind], "cpu")[0].T
    frames = int(theirs["attention_mask"].sum())
    assert RULE.frames(length) == frames
    rows = prepare(samples).rows
    assert len(rows) == 2 * ((frames - 1) // 2 + 1) + 2
    assert not rows[0].any()
    ours = rows[1 : 1 + RULE.max_frames]
    assert np.abs(ours - exact[: len(ours)]).max() <= 3e-7
    assert np.abs(ours - theirs["input_features"][0].T[: len(ours)]).max() <= 2e-4
    assert not rows[1 + RULE.max_frames :].any()  # what the convolution pads with


def test_the_silence_behind_a_sound_is_part_of_what_the_last_step_sees() -> None:
    """Zeros there, as a tower without padding would see, are something else."""
    samples = speech(16000 - 160)
    rows = prepare(samples).rows
    exact = log_mel(samples, RULE, 102)
    assert np.array_equal(rows[-1], exact[len(rows) - 2])
    assert np.abs(rows[-1]).max() > 0.1


@pytest.mark.parametrize("value", [0.0, 1e-3])
def test_silence_is_finite(value: float) -> None:
    assert np.isfinite(prepare(np.full(16000, value, np.float32)).rows).all()


def test_samples_whose_power_is_no_float32_are_refused() -> None:
    """A full square wave at the limit is not: no frame is infinite or no number."""
    square = np.where(np.arange(16000) % 40 < 20, LOUDEST, -LOUDEST)
    assert np.isfinite(prepare(square).rows).all()
    assert np.isfinite(prepare(np.full(16000, LOUDEST)).rows).all()
    with pytest.raises(WrongFormatError, match=r"a sample of 2e\+16, over the limit of 1e\+16"):
        prepare(2 * square)


def test_a_longer_sound_is_cut_where_hugging_face_cuts() -> None:
    samples = speech(RULE.max_samples + 1)
    cut, whole = prepare(samples), prepare(samples[:-1])
    assert np.array_equal(cut.rows, whole.rows)
    assert (cut.cut_s, whole.cut_s) == (30.0, None)


def test_a_file_gives_what_its_samples_give() -> None:
    samples = sine(1.5)
    data = encode(samples, 16000, codec="pcm_f32le")
    for mm_type in (MMUrlType.AUDIO, MMUrlType.DEFAULT):
        prepared = AudioPreprocessor(RULE)(Blob(data, b"", "file"), mm_type, PreprocessOptions())
        assert np.array_equal(prepared.rows, prepare(samples).rows)


def test_what_is_too_short_for_a_token_is_refused() -> None:
    assert prepare(np.ones(321, np.float32)).steps == 2
    with pytest.raises(WrongFormatError, match="320 samples at 16000 Hz are too short; at least 321"):
        prepare(np.ones(320, np.float32))


def test_pixels_and_images_are_refused() -> None:
    preprocess, options = AudioPreprocessor(RULE), PreprocessOptions()
    with pytest.raises(NotSupportedError, match=r"sound only, the tensor is pixels \[1, 4, 4, 3\]"):
        preprocess(Blob(np.zeros((1, 4, 4, 3), np.uint8), b"", ""), MMUrlType.TENSOR, options)
    with pytest.raises(NotSupportedError, match="sound only, not images"):
        preprocess(Blob(b"\x89PNG\r\n\x1a\n", b"", ""), MMUrlType.DEFAULT, options)


def test_the_checkpoints_rule_is_read_and_what_we_do_not_do_refused(tmp_path: Path) -> None:
    assert mel_rule(tmp_path, RULE) == RULE
    file = tmp_path / "preprocessor_config.json"
    file.write_text('{"feature_size": 80, "chunk_length": 20}')
    assert mel_rule(tmp_path, RULE).bins == 80
    for text in ('{"dither": 0.1}', '{"sampling_rate": 8000}', '{"hop_length": 0}', '{"padding_side": "left"}', "[]"):
        file.write_text(text)
        with pytest.raises(StartError, match=r"preprocessor_config\.json"):
            mel_rule(tmp_path, RULE)
    (tmp_path / "processor_config.json").write_text('{"feature_extractor": {"chunk_length": 10}}')
    assert mel_rule(tmp_path, RULE).seconds == 10
