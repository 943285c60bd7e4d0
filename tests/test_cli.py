"""The command line: what it prints, saves and refuses."""

from __future__ import annotations

import asyncio
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clips import encode, moving
from fake_engine import serving
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from sounds import encode as encode_sound
from sounds import sine, speech

import rtp_mm
from rtp_mm.cli import app, main
from rtp_mm.cli.compare import Comparison, Run, Task, compare, table
from rtp_mm.cli.embed import save_result
from rtp_mm.cli.hugging_face import ANY, HuggingFacePeer
from rtp_mm.cli.look import CAPTION, SCALE, draw, rebuild
from rtp_mm.cli.options import markdown_table
from rtp_mm.cli.outputs import writing
from rtp_mm.cli.spectrogram import AXIS, BAND, CUT_MARK
from rtp_mm.cli.status import quantile
from rtp_mm.errors import StartError
from rtp_mm.models.qwen2_audio import PUBLISHED_RULE
from rtp_mm.preprocess.log_mel import mel_filters
from rtp_mm.types import Blob, MMEmbeddingRes, MMUrlType, Patches, PreprocessOptions

SMALL = PreprocessOptions(max_pixels=60000)


def test_what_ends_a_write_is_one_line() -> None:
    with pytest.raises(StartError, match=r"a\.png cannot be written: .*No space"), writing(Path("a.png")):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz"])
def test_a_save_on_a_full_disk_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.symlink_to("/dev/full")
    with pytest.raises(StartError, match=f"{name} cannot be written: .*No space"), writing(path):
        save_result(path, MMEmbeddingRes([torch.zeros(1 << 16, 1)]))


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in app.registered_commands:
        name = (command.name or command.callback.__name__).replace("_", "-")
        assert name in shown
        assert main([name, "--help"]) == 0


def test_errors_with_a_reason_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for arguments, reason in [
        (["init-checkpoint", str(tmp_path), "--size", "2b"], "there is no qwen2_5_vl 2b"),
        (["embed", "x.jpg", "--checkpoint", str(tmp_path), "--save", "x.txt"], "--save must end in"),
        (["embed", "x.jpg", "--checkpoint", str(tmp_path), "--save", str(tmp_path / "none" / "x.npz")], "be written"),
        (["look", "x.jpg", "--checkpoint", str(tmp_path), "--out", "look.txt"], "--out must end in .png or .jpg"),
        (["look", "x.jpg", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "none" / "x.png")], "be written"),
        (["init-checkpoint", str(file)], "cannot be written: [Errno 17] File exists"),
        (["embed", "x.jpg"], "name a model"),
        (["embed", "x.jpg", "--checkpoint", str(tmp_path / "none")], "is no folder"),
        (["look", "x.jpg", "--checkpoint", str(tmp_path)], ""),
    ]:
        assert main(arguments) == 1
        message = capsys.readouterr().err
        assert reason in message
        assert message.strip().count("\n") == 0


def test_a_bad_image_is_one_line(
    tiny_qwen2_5_vl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], photo_path: Path
) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no image")
    urls = [str(photo_path), str(tmp_path / "no.jpg")]
    assert main(["embed", *urls, "--checkpoint", str(tiny_qwen2_5_vl), "--device", "cpu"]) == 1
    message = capsys.readouterr().err
    assert "item 1" in message
    assert "Traceback" not in message


def test_init_checkpoint_writes_one(tmp_path: Path) -> None:
    arguments = ["init-checkpoint", str(tmp_path), "--family", "qwen2_vl", "--seed", "3", "--sparse-llm"]
    assert main(arguments) == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }
    assert main(arguments) == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("act_type", ["bf16", "fp32"])
def test_embed_saves_what_the_engine_gives(
    tiny_qwen2_5_vl: Path, photo_path: Path, tmp_path: Path, suffix: str, act_type: str
) -> None:
    model = ["--checkpoint", str(tiny_qwen2_5_vl), "--device", "cpu", "--act-type", act_type]
    limits = ["--max-pixels", "40000"]
    saved = tmp_path / f"out{suffix}"
    assert main(["embed", str(photo_path), str(photo_path), *model, *limits, "--save", str(saved)]) == 0

    engine = rtp_mm.create_engine(
        vit_separation=0, checkpoint_path=tiny_qwen2_5_vl, act_type=act_type, device="cpu", mm_embedding_cache_mb=0
    )
    config = rtp_mm.MMPreprocessConfig(max_pixels=40000)
    result = engine.submit([str(photo_path)], preprocess_configs=[config])
    engine.close()
    if suffix == ".npz":
        with np.load(saved) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    else:
        tensors = load_file(saved)
    assert tensors.keys() == {"embedding.0", "embedding.1", "position_ids.0", "position_ids.1"}
    expected = result.embeddings[0].float() if suffix == ".npz" else result.embeddings[0]
    assert result.position_ids is not None
    for item in "01":
        assert torch.equal(tensors[f"embedding.{item}"], expected)
        assert torch.equal(tensors[f"position_ids.{item}"], result.position_ids[0])


def test_embed_asks_a_server_for_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The server has another working directory."""
    asked: dict[str, Any] = {}

    def submit(urls: list[str], **options: Any) -> MMEmbeddingRes:
        asked["urls"] = urls
        return MMEmbeddingRes([torch.zeros(4, 8)] * len(urls), None, None, {"forward": 1.0})

    def create_engine(**options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(submit=submit, close=lambda: asked.update(closed=True))

    monkeypatch.setattr(rtp_mm, "create_engine", create_engine)
    monkeypatch.chdir(tmp_path)
    urls = ["a.jpg", "http://host/b.jpg", "data:,c"]
    assert main(["embed", *urls, "--server", "1.2.3.4:5"]) == 0
    assert asked == {
        "vit_separation": 2,
        "remote_vit_server_ip": "1.2.3.4:5",
        "urls": [str(tmp_path / "a.jpg"), "http://host/b.jpg", "data:,c"],
        "closed": True,
    }


def test_serve_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("rtp_mm.start_server.main", lambda arguments: seen.append(arguments) or 7)
    assert main(["serve", "--start_port", "12345", "--help"]) == 7
    assert seen == [["--start_port", "12345", "--help"]]


def test_float32_agrees_with_hugging_face(tiny_checkpoint: Path, photo_path: Path) -> None:
    comparison = compare(Task(str(photo_path), tiny_checkpoint, SMALL, act_type="fp32", device="cpu"))
    assert comparison.relative_error(comparison.ours) < 1e-5
    assert comparison.token_cosines().min() > 1 - 1e-6
    assert comparison.max_error() < 1e-4


def test_bf16_is_no_further_from_float32_than_hugging_face(tiny_checkpoint: Path, photo_path: Path) -> None:
    task = Task(str(photo_path), tiny_checkpoint, SMALL, device="cpu")
    comparison = compare(task)
    assert 0 < comparison.relative_error(comparison.ours) <= comparison.relative_error(comparison.peer)
    assert table(comparison, task).row_count == 5


def test_every_timed_run_does_all_of_its_work(
    tiny_qwen2_vl: Path, photo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that finds the one before in a cache would be no run."""
    engines: list[Any] = []
    create = rtp_mm.create_engine
    monkeypatch.setattr(rtp_mm, "create_engine", lambda **options: engines.append(create(**options)) or engines[-1])
    compare(Task(str(photo_path), tiny_qwen2_vl, SMALL, repeat=3, act_type="fp32", device="cpu"))
    stats = engines[0].stats()
    assert stats.batches == 1 + 3  # the warm-up
    assert stats.caches["patches"].hits == 0


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory, photos: dict[str, NDArray[np.uint8]]) -> Path:
    """2 s at 24 a second, of which both rules take 4 frames."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    path.write_bytes(encode(moving(photos["coffee"])))
    return path


def test_clips_are_compared_with_hugging_face(tiny_checkpoint: Path, clip_path: Path) -> None:
    exact = compare(Task(str(clip_path), tiny_checkpoint, act_type="fp32", device="cpu"))
    assert exact.relative_error(exact.ours) < 1e-5
    assert exact.token_cosines().min() > 1 - 1e-6
    task = Task(str(clip_path), tiny_checkpoint, device="cpu")
    rounded = compare(task)
    assert 0 < rounded.relative_error(rounded.ours) <= rounded.relative_error(rounded.peer)
    title = table(rounded, task).title
    assert title is not None
    assert title.startswith("4 frames, grid 2 x ")
    assert ", 1 s per grid, " in title


@pytest.mark.parametrize("rule", ["qwen", "hf"])
def test_a_clip_that_hugging_face_gets_is_ours(
    rule: str, tiny_qwen2_5_vl: Path, clip_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixel by pixel, in the same order; three frames make two pairs, the last of one frame twice."""
    monkeypatch.setenv("MM_VIDEO_RULE", rule)
    peer = HuggingFacePeer(tiny_qwen2_5_vl, torch.float32, torch.device("cpu"))
    inputs = peer.preprocess(clip_path.read_bytes(), ANY)
    blob = Blob(clip_path.read_bytes(), b"", "")
    patches = peer.video(blob, MMUrlType.VIDEO, ANY)
    assert inputs["image_grid_thw"].tolist() == [[*patches.grid_thw]]
    mean, std = (torch.tensor(v)[:, None] for v in (peer.processor.image_mean, peer.processor.image_std))
    values = inputs["pixel_values"].view(len(patches.rows), 3, -1)
    assert np.array_equal(((values * std + mean) * 255).round().flatten(1).numpy(), patches.rows)

    three = [Image.new("RGB", (28, 28), (shade, 0, 0)) for shade in (10, 20, 30)]
    inputs = peer.clip(iter(three))
    assert (inputs["frames"], inputs["image_grid_thw"].tolist()) == (3, [[2, 2, 2]])
    red = inputs["pixel_values"].view(2, 4, 3, 2, 196)[:, :, 0] * std[0] + mean[0]
    assert (red * 255).round().mean(dim=(1, 3)).tolist() == [[10, 20], [30, 30]]


@pytest.fixture(scope="module")
def sound_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.3 s of stereo at 44.1 kHz, which both sides mix and resample."""
    path = tmp_path_factory.mktemp("sounds") / "speech.wav"
    path.write_bytes(encode_sound(np.stack([speech(57330), speech(57330, 1)]), 44100))
    return path


def test_sounds_are_compared_with_hugging_face(tiny_qwen2_audio: Path, sound_path: Path) -> None:
    exact = compare(Task(str(sound_path), tiny_qwen2_audio, act_type="fp32", device="cpu"))
    assert exact.relative_error(exact.ours) < 1e-5
    assert exact.token_cosines().min() > 1 - 1e-6
    rounded = compare(Task(str(sound_path), tiny_qwen2_audio, device="cpu"))
    assert 0 < rounded.relative_error(rounded.ours) <= rounded.relative_error(rounded.peer)


def test_options_of_pixels_are_refused_for_sounds(
    tiny_qwen2_audio: Path, tiny_qwen2_5_vl: Path, sound_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, out = [str(sound_path)], ["--out", str(tmp_path / "look.png")]
    heard = ["--checkpoint", str(tiny_qwen2_audio)]
    for option in ("--min-pixels", "--max-pixels"):
        for command in (
            ["compare", *sound, *heard],
            ["embed", *sound, *heard],
            ["embed", *sound, "--type", "audio", "--server", "1.2.3.4:5"],
            ["embed", *sound, "--type", "audio", "--checkpoint", str(tiny_qwen2_5_vl)],
            ["look", *sound, *heard, *out],
        ):
            assert main([*command, option, "50000"]) == 1
            assert "--min-pixels and --max-pixels apply to images and to frames of videos" in capsys.readouterr().err
    assert main(["look", *sound, *heard, *out]) == 0
    assert main(["look", *sound, *heard, *out, "--max-pixels", "0"]) == 2, "no area"


def test_a_comparison_of_the_wrong_kind_is_one_line(
    tiny_qwen2_audio: Path,
    tiny_qwen2_5_vl: Path,
    photo_path: Path,
    sound_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for file, checkpoint, reason in [
        (photo_path, tiny_qwen2_audio, "broken sound"),
        (sound_path, tiny_qwen2_5_vl, "this model takes images and videos, not audio"),
        (sound_path, tmp_path, "no comparison for llama; there is one for qwen2_vl, qwen2_5_vl, qwen2_audio"),
        (sound_path, tmp_path / "none", "config.json is missing"),
    ]:
        assert main(["compare", str(file), "--checkpoint", str(checkpoint), "--device", "cpu"]) == 1
        message = capsys.readouterr().err
        assert reason in message
        assert message.strip().count("\n") == 0


def test_comparison_finds_one_wrong_token() -> None:
    right = torch.eye(4)
    wrong = right.clone()
    wrong[2] = -wrong[2]
    comparison = Comparison(Run(wrong, 1, 1), Run(right, 1, 1), right)
    assert comparison.token_cosines().tolist() == [1, 1, -1, 1]
    assert comparison.max_error() == 2
    assert comparison.relative_error(comparison.ours) == 1
    assert comparison.relative_error(comparison.peer) == 0


def test_look_shows_the_resized_photograph(
    tiny_qwen2_5_vl: Path, photo: bytes, photo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "look.png"
    assert main(["look", str(photo_path), "--checkpoint", str(tiny_qwen2_5_vl), "--out", str(out)]) == 0
    assert "448 x 308 pixels, 32 x 22 patches, 176 tokens" in capsys.readouterr().out
    seen = np.asarray(Image.open(out))[1::SCALE, 1::SCALE]  # beside the thin lines
    resized = np.asarray(Image.open(io.BytesIO(photo)).convert("RGB").resize((448, 308), Image.Resampling.BICUBIC))
    off_windows = np.ix_(np.arange(308) % 112 > 1, np.arange(448) % 112 > 1)
    assert np.array_equal(seen[off_windows], resized[off_windows])


def test_rebuild_undoes_the_patch_order(photos: dict[str, NDArray[np.uint8]]) -> None:
    """Rows in (block row, block column, row, column) order, columns in (channel, y, x); raster order would differ."""
    image = photos["coffee"][:112, :168]
    p, m = 14, 2
    cells = image.reshape(4, m, p, 6, m, p, 3)
    rows = np.ascontiguousarray(cells.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(8 * 12, 3 * p * p)
    raster = np.ascontiguousarray(cells.transpose(0, 1, 3, 4, 6, 2, 5)).reshape(8 * 12, 3 * p * p)
    assert np.array_equal(rebuild(Patches(rows, (1, 8, 12)), p, m)[0], image)
    assert not np.array_equal(rebuild(Patches(raster, (1, 8, 12)), p, m)[0], image)


def test_look_shows_a_clips_frames_with_their_times(
    tiny_qwen2_5_vl: Path, photos: dict[str, NDArray[np.uint8]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, out = tmp_path / "clip.avi", tmp_path / "look.png"
    frames = moving(photos["coffee"])
    clip.write_bytes(encode(frames, "mjpeg", "avi", {}))
    assert main(["look", str(clip), "--checkpoint", str(tiny_qwen2_5_vl), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "frames of" in said
    sheet = np.asarray(Image.open(out).convert("L")).astype(int)
    count = int(said.split(": ")[1].split()[0])
    columns = math.isqrt(count - 1) + 1
    width, height = sheet.shape[1] // columns, sheet.shape[0] // -(-count // columns)
    first = sheet[: height - CAPTION, :width]
    expected = np.asarray(Image.fromarray(frames[0]).convert("L").resize((width, height - CAPTION))).astype(int)
    wrong = np.asarray(Image.fromarray(frames[-1]).convert("L").resize((width, height - CAPTION))).astype(int)
    assert np.abs(first - expected).mean() < 5 < np.abs(first - wrong).mean()
    assert sheet[height - CAPTION : height, :width].max() > 200, "a caption"


def test_look_shows_a_sounds_spectrogram(
    tiny_qwen2_audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tone of 440 Hz is a bright line in the band that holds it."""
    sound, out = tmp_path / "tone.wav", tmp_path / "look.png"
    sound.write_bytes(encode_sound(sine(2.0), 16000))
    assert main(["look", str(sound), "--checkpoint", str(tiny_qwen2_audio), "--out", str(out)]) == 0
    assert "2.00 s, 200 frames of 128 mel bands, 50 tokens" in capsys.readouterr().out
    seen = np.asarray(Image.open(out)).astype(int)
    assert seen.shape == (BAND * 128 + AXIS, 200, 3)
    loudest = 127 - seen[: BAND * 128, 100].sum(axis=-1).argmax() // BAND
    edges = mel_filters(PUBLISHED_RULE)[:, loudest].nonzero()[0][[0, -1]] * 40  # Hz of the FFT's bins
    assert edges[0] <= 440 <= edges[1]


def test_look_marks_where_a_sound_was_cut(tiny_qwen2_audio: Path, tmp_path: Path, capsys: Any) -> None:
    pictures = []
    for seconds in (30, 31):
        sound, out = tmp_path / "noise.wav", tmp_path / "look.png"
        sound.write_bytes(encode_sound(speech(16000 * seconds), 16000))
        assert main(["look", str(sound), "--checkpoint", str(tiny_qwen2_audio), "--out", str(out)]) == 0
        assert ("cut at 30 s" in capsys.readouterr().out) == (seconds > 30)
        pictures.append(np.asarray(Image.open(out)))
    whole, cut = pictures
    assert whole.shape == cut.shape
    assert tuple(cut[10, -1]) == CUT_MARK != tuple(whole[10, -1])


def test_draw_marks_windows_only_where_there_are_any() -> None:
    black = np.zeros((224, 224, 3), np.uint8)
    with_windows = np.asarray(draw(black, 14, 2, 112))
    without = np.asarray(draw(black, 14, 2, None))
    assert tuple(with_windows[5, 112 * SCALE]) == (255, 210, 0)
    assert tuple(without[5, 112 * SCALE]) != (255, 210, 0)
    assert without[5, 28 * SCALE].sum() > without[5, 14 * SCALE].sum() > without[5, 7 * SCALE].sum() == 0


def test_options_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options"]) == 0
    assert "START_PORT" in capsys.readouterr().out
    assert main(["options", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown_table()


async def test_status_shows_figures_of_a_running_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("MM_AUTH_TOKEN", "sekrit")
    async with serving(mm_auth_token="sekrit") as server:
        assert await asyncio.to_thread(main, ["embed", "img:3", "--server", server.grpc_address]) == 0
        assert await asyncio.to_thread(main, ["status", server.grpc_address]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        monkeypatch.setenv("MM_AUTH_TOKEN", "wrong")
        assert await asyncio.to_thread(main, ["status", server.grpc_address]) == 1
        refused = capsys.readouterr().err
    for figure in ("fake bf16 on cpu", "1 OK", "room for 7 more", "0.0 of 0.0 MiB", "0 of 0 busy"):
        assert figure in shown, figure
    assert "must be Bearer" in refused
    assert "sekrit" not in shown + refused


def test_quantiles_are_between_bounds() -> None:
    buckets = [({"le": "0.001"}, 1.0), ({"le": "0.25"}, 6.0), ({"le": "1.0"}, 9.0), ({"le": "+Inf"}, 10.0)]
    assert quantile(buckets, 0.1) == "0 to 1 ms"
    assert quantile(buckets, 0.5) == "1 ms to 250 ms"
    assert quantile(buckets, 0.9) == "250 ms to 1 s"
    assert quantile(buckets, 0.99) == "1 s to more"
    assert quantile([], 0.5) == quantile([({"le": "+Inf"}, 0.0)], 0.5) == "no calls"
