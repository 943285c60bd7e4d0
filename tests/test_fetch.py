"""Data URLs, raw tensors, schemes, and what of a URL may be shown."""

from __future__ import annotations

import base64
import binascii
from base64 import b64decode
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import fsspec
import numpy as np
import pytest
import torch
from fetching import REMOTE, fetch
from hypothesis import given
from hypothesis import strategies as st

from rtp_mm.config import load_settings
from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.data_url import DataUrl
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.limits import SizeLimit
from rtp_mm.media.redact import MAX_CHARACTERS, redact
from rtp_mm.media.urls import MAX_URL_CHARACTERS, scheme_of
from rtp_mm.types import LIBRARY_CALLER, MMUrlType, MultimodalInput

BODY = bytes(range(256)) * 5


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{b64(BODY)}",
        f"DATA:;BASE64,{b64(BODY)}",
        f"data:image/png;name=x;charset=utf-8;base64,{quote(b64(BODY), safe='')}",
        f"data:application/octet-stream,{quote(BODY)}",
        f"data:,{quote(BODY, safe='')}",
    ],
    ids=lambda url: url[:40],
)
async def test_a_data_url_is_its_bytes(url: str) -> None:
    blob = await fetch(url)
    assert blob.data == BODY
    assert f"{len(BODY)} bytes" in blob.source  # told without decoding, and exact


@pytest.mark.parametrize("offset", range(6))
@pytest.mark.parametrize("is_base64", [False, True])
async def test_escapes_are_undone_wherever_they_stand(offset: int, is_base64: bool) -> None:
    """A long URL is read in pieces."""
    plain = b64(BODY * 40) if is_base64 else "a" * offset + "b%c" * 20_000
    escaped = plain[:offset] + "".join(f"%{ord(c):02X}" if i % 3 else c for i, c in enumerate(plain[offset:]))
    escaped = escaped.replace("%%", "%25%") if not is_base64 else escaped
    data = (await fetch(f"data:{';base64' if is_base64 else ''},{escaped}")).data
    assert data == (b64decode(unquote_to_bytes(escaped)) if is_base64 else unquote_to_bytes(escaped))


async def test_a_large_data_url_is_its_bytes() -> None:
    assert (await fetch(f"data:;base64,{b64(BODY * 1000)}")).data == BODY * 1000


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("data:image/png;base64", "needs a comma"),
        ("data:" + "a;" * 512 + "base64,AAAA", "needs a comma before its data, within 1024 characters"),
        ("data:," + "%41" * 50_000 + "%4", "two hexadecimal digits"),
        ("data:image/png;base64,AAA", "not valid base64"),
        ("data:image/png;base64,AAAA\nAAAA", "not valid base64"),
        ("data:image/png;base64,AA==AA==", "not valid base64"),
        ("data:image/png;base64,AA-_", "not valid base64"),
        ("data:image/png;base64,AAAA=", "not valid base64"),
        ("data:image/png;base64,AA%C3%BC", "not valid base64"),
        ("data:image/png;base64,AAA%3", "two hexadecimal digits"),
        ("data:,100%", "two hexadecimal digits"),
        ("data:,50%zz", "two hexadecimal digits"),
        ("data:,grün", "ASCII only"),
        ("data:;base64,ÄAAA", "ASCII only"),
        ("data:,", "empty"),
        ("data:;base64,", "empty"),
    ],
)
async def test_a_malformed_data_url_is_refused(url: str, text: str) -> None:
    with pytest.raises(WrongFormatError, match=text):
        await fetch(url)


@given(st.text("ABz09+/=-_ \n", max_size=200) | st.binary(max_size=200).map(b64))
def test_base64_is_read_as_strictly_as_by_the_standard_library(payload: str) -> None:
    """Or more so: it takes padding behind what needs none."""
    try:
        expected = binascii.a2b_base64(payload, strict_mode=True)
    except ValueError:
        expected = None
    padding = len(payload) - len(payload.rstrip("="))
    if len(payload) % 4 and padding:
        expected = None
    url = DataUrl.parse(f"data:;base64,{payload}")
    if expected is not None:
        assert url.decode(SizeLimit(1 << 20, "")) == expected
        return
    with pytest.raises(WrongFormatError, match="not valid base64"):
        url.decode(SizeLimit(1 << 20, ""))


@pytest.mark.parametrize("encode", [lambda data: ";base64," + b64(data), lambda data: "," + quote(data, safe="")])
async def test_a_data_url_is_sized_before_it_is_decoded(encode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await fetch("data:" + encode(b"x" * 1023 + b"\0"), mm_image_max_file_size_kb=1)).nbytes == 1024
    for decoder in ("b64decode", "unquote_to_bytes"):
        monkeypatch.delattr(f"rtp_mm.media.data_url.{decoder}")
    with pytest.raises(WrongFormatError, match="1025 bytes or more, over the limit of 1024"):
        await fetch("data:" + encode(b"x" * 1024 + b"\0"), mm_image_max_file_size_kb=1)


@pytest.mark.parametrize("url", ["s3://bucket/key", "ftp://h/x", "javascript://x", "gs://b/k", "HTTPX://h"])
async def test_another_scheme_is_refused_by_name(url: str) -> None:
    scheme = url.partition(":")[0].lower()
    with pytest.raises(NotSupportedError, match=f"scheme '{scheme}'; allowed are http, https, file, data, plain paths"):
        await fetch(url)


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("http://h/x", "http"),
        ("HTTPS://h/x", "https"),
        ("s3://b/k", "s3"),
        ("Data:,x", "data"),
        ("FILE:x", "file"),
        ("file:///x", "file"),
        ("http:/h/x", ""),
        ("s3:b", ""),
        ("x/http://h", ""),
        (" data:,x", ""),
        ("/x", ""),
        ("", ""),
        ("a" * 64 + "://x", "a" * 64),
        ("a" * 65 + "://x", ""),  # so of megabytes no more is looked at
    ],
    ids=lambda text: text[:20],
)
def test_a_scheme_is_told_by_the_start_of_a_url(url: str, scheme: str) -> None:
    assert scheme_of(url) == scheme


@pytest.mark.parametrize("way", ["base64", "percent", "file", "memory"])
async def test_a_video_of_type_default_has_the_limit_of_videos(way: str, tmp_path: Path) -> None:
    clip, image = b"\x1a\x45\xdf\xa3" + bytes(3000), b"GIF89a" + bytes(2000)

    def url(data: bytes) -> str:
        match way:
            case "base64":
                return "data:;base64," + b64(data)
            case "percent":
                return "data:," + quote(data, safe="")
            case "memory":
                fsspec.filesystem("memory").pipe("/x", data)
                return "memory://x"
        (tmp_path / "x").write_bytes(data)
        return str(tmp_path / "x")

    options = {"mm_image_max_file_size_kb": 1, "mm_allowed_schemes": "memory", "mm_allowed_local_media_path": tmp_path}
    assert (await fetch(url(clip), MMUrlType.DEFAULT, **options)).data == clip
    with pytest.raises(WrongFormatError, match="MM_IMAGE_MAX_FILE_SIZE_KB"):
        await fetch(url(image), MMUrlType.DEFAULT, **options)
    with pytest.raises(WrongFormatError, match="MM_VIDEO_MAX_FILE_SIZE_KB"):
        await fetch(url(clip), MMUrlType.DEFAULT, mm_video_max_file_size_kb=2, **options)


@pytest.mark.parametrize("start", ["http://h/", "s3://b/", "file:///", "/"])
async def test_a_url_has_a_limit_that_data_urls_have_not(start: str) -> None:
    longest = start + "a" * (MAX_URL_CHARACTERS - len(start))
    fetcher = Fetcher(load_settings(mm_allowed_schemes="s3"))
    if start in ("http://h/", "s3://b/"):  # no path is as long
        for url in (longest[:-1], longest):
            fetcher.check_access(MultimodalInput(url), LIBRARY_CALLER)
    with pytest.raises(WrongFormatError, match="a URL of 16385 characters, over the limit of 16384"):
        fetcher.check_access(MultimodalInput(longest + "a"), LIBRARY_CALLER)
    assert len((await fetch("data:," + "a" * MAX_URL_CHARACTERS)).data) == MAX_URL_CHARACTERS


async def test_an_igraph_is_refused_and_a_tensor_needs_no_url() -> None:
    with pytest.raises(NotSupportedError, match="IGRAPH"):
        await fetch("http://127.0.0.1/x", MMUrlType.IGRAPH)
    assert (await fetch("s3://ignored", MMUrlType.TENSOR, np.zeros(5, np.float32))).nbytes == 20


async def test_a_tensor_beside_a_url_is_ignored() -> None:
    with_garbage = await fetch("data:,abc", MMUrlType.IMAGE, object())
    without = await fetch("data:,abc", MMUrlType.IMAGE)
    assert with_garbage == without


PIXELS = np.arange(2 * 3 * 4 * 3, dtype=np.int32).reshape(2, 3, 4, 3)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
async def test_pixels_become_uint8_frames(kind: Any, dtype: Any) -> None:
    clip = await fetch("", MMUrlType.TENSOR, kind(PIXELS.astype(dtype)))
    still = await fetch("", MMUrlType.TENSOR, kind(PIXELS[0].astype(dtype)))
    assert isinstance(clip.data, np.ndarray)
    assert isinstance(still.data, np.ndarray)
    assert clip.data.dtype == still.data.dtype == np.uint8
    np.testing.assert_array_equal(clip.data, PIXELS)
    np.testing.assert_array_equal(still.data, PIXELS[:1])
    assert clip.source == "tensor uint8 [2, 3, 4, 3]"


async def test_samples_stay_and_strides_do_not_matter() -> None:
    samples = np.linspace(-1, 1, 100, dtype=np.float32)
    blob = await fetch("", MMUrlType.TENSOR, samples[::-2])
    np.testing.assert_array_equal(blob.data, samples[::-2])
    assert blob.content_hash == (await fetch("", MMUrlType.TENSOR, samples[::-2].copy())).content_hash
    turned = await fetch("", MMUrlType.TENSOR, PIXELS.transpose(0, 2, 1, 3))
    np.testing.assert_array_equal(turned.data, PIXELS.transpose(0, 2, 1, 3))


async def test_the_hash_is_of_values_and_shape_not_of_the_dtype_they_came_in() -> None:
    tensors = [PIXELS, PIXELS.astype(np.uint8), PIXELS.reshape(2, 4, 3, 3), PIXELS + 1, PIXELS[0]]
    hashes = [(await fetch("", MMUrlType.TENSOR, tensor)).content_hash for tensor in tensors]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
    assert all(len(digest) == 32 for digest in hashes)


async def test_the_callers_tensor_may_change_afterwards() -> None:
    pixels = PIXELS.astype(np.uint8)
    blob = await fetch("", MMUrlType.TENSOR, pixels)
    pixels[:] = 0
    np.testing.assert_array_equal(blob.data, PIXELS)
    assert isinstance(blob.data, np.ndarray)
    assert not blob.data.flags.writeable


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (None, "needs a tensor"),
        (PIXELS + 200, r"0\.\.255, got 200\.\.271"),
        (PIXELS - 1, r"0\.\.255, got -1\.\.70"),
        (PIXELS.astype(np.int64), r"got int64 \[2, 3, 4, 3\]"),
        (PIXELS.astype(np.float32), r"got float32 \[2, 3, 4, 3\]"),
        (PIXELS[..., :2], r"got int32 \[2, 3, 4, 2\]"),
        (PIXELS[0, 0], r"got int32 \[4, 3\]"),
        (PIXELS[:, :0], r"got int32 \[2, 0, 4, 3\]"),
        (np.zeros(0, np.float32), "got float32"),
        (np.array([1, np.nan], np.float32), "finite"),
        (np.zeros((2, 5), np.float32), "got float32"),
        (torch.zeros(5, dtype=torch.bfloat16), "cannot be read"),
        (torch.zeros(5, requires_grad=True), "cannot be read"),
        (torch.zeros(5, device="meta"), "cannot be read"),
        ("text", "got <U4"),
        ([[1], [1, 2]], "cannot be read"),
    ],
)
async def test_any_other_tensor_is_refused(tensor: Any, text: str) -> None:
    with pytest.raises(WrongFormatError, match=text):
        await fetch("", MMUrlType.TENSOR, tensor)


async def test_library_callers_get_what_remote_ones_get() -> None:
    async with Fetcher(load_settings()) as fetcher:
        item = MultimodalInput("data:,abc")
        assert await fetcher.fetch(item, LIBRARY_CALLER) == await fetcher.fetch(item, REMOTE)
        await fetcher.close()
        await fetcher.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://h/cat.jpg", "http://h/cat.jpg"),
        ("https://user:secret@h:8443/a/b.png?X-Sig=secret#secret", "https://h:8443/a/b.png?..."),
        ("https://secret@h#secret", "https://h?..."),
        ("https://user:sec@ret@h/x", "https://h/x"),
        ("http://user:sec/ret@h/x", "http://user:?..."),
        ("http://user:secret@[::1]:80/x", "http://[::1]:80/x"),
        ("http://user:secret@[::1", "http://?..."),
        ("https://medium.com/@user/x.png", "https://medium.com/@user/x.png"),
        ("s3://key:secret@bucket/k?secret", "s3://bucket/k?..."),
        ("file:///a/b.jpg", "file:///a/b.jpg"),
        ("/a/b c.jpg", "/a/b c.jpg"),
        ("", ""),
        ("data:image/jpeg;base64," + b64(b"\0" * 70568), "data:image/jpeg, 70568 bytes base64"),
        (" https://u:pw@host/x?sig=s ", "https://host/x?..."),
        ("//u:pw@host/x?sig=s", "...@host/x?..."),
        ("https:/u:pw@host", "...@host"),
        ("blob:https://u:pw@host/x", "...@host/x"),
        ("data:,secret", "data:text/plain, 6 bytes"),
        ("data:;x=" + "y" * 2000 + ",secret", "data: URL without a comma, 2015 characters"),
        ("data:," + "z" * 3_000_000, "data:text/plain, 3000000 bytes"),
        ("data:image/jpeg;base64," + b64(b"\0" * 3_000_001), "data:image/jpeg, 3000001 bytes base64"),
        ("data:secret", "data: URL without a comma, 11 characters"),
        ("HTTP://u:pw@h/" + "a" * MAX_URL_CHARACTERS, "http, 16398 characters"),
        ("a" * 10**7, "path, 10000000 characters"),
        ("http://h/\r\nX: y\x1b[31m\u202e", r"http://h/\r\nX: y\x1b[31m\u202e"),
        ("\ud800", r"\ud800"),
    ],
    ids=lambda text: repr(text[:30]),
)
def test_a_redacted_url_shows_where_but_no_secret(url: str, shown: str) -> None:
    assert redact(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        *("http://h/" + "a" * n + "/cat.jpg" for n in (10**4, 10**6)),
        *("/" + "\0" * n for n in (10**4, 10**6)),
        *("http://" + "a@" * n for n in (5000, 10**6)),
        "data:" + "a" * 10**6 + ",x",
    ],
    ids=lambda url: f"{url[:10]!r} {len(url)}",
)
def test_a_redacted_url_is_short(url: str) -> None:
    assert len(redact(url)) <= MAX_CHARACTERS


def test_a_long_path_keeps_both_ends() -> None:
    shown = redact("https://cdn.example.com/" + "x" * 500 + "/cat.jpg")
    assert shown.startswith("https://cdn.example.com/xxx")
    assert shown.endswith("xxx/cat.jpg")
