"""A web server of photographs that are all distinct: `/640x480/17.jpg` is the same picture for every number, as another
file (the number stands in a JPEG comment), so that no cache keyed by content knows it. `?max_age=60` lets it be cached.

    python -m benchmarks.photo_source --port 9000
"""

from __future__ import annotations

import argparse
import io
from functools import cache

import skimage.data
from aiohttp import web
from PIL import Image

JPEG_QUALITY = 90


@cache
def photograph(width: int, height: int) -> bytes:
    """JPEG bytes."""
    file = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).resize((width, height)).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def numbered(jpeg: bytes, number: int) -> bytes:
    """The same pixels in another file: a comment segment after the start-of-image marker."""
    comment = str(number).encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


async def answer(request: web.Request) -> web.Response:
    width, height = map(int, request.match_info["size"].split("x"))
    jpeg = numbered(photograph(width, height), int(request.match_info["number"]))
    max_age = request.query.get("max_age")
    headers = {"Cache-Control": f"max-age={max_age}"} if max_age else {}
    return web.Response(body=jpeg, content_type="image/jpeg", headers=headers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    app = web.Application()
    app.router.add_get("/{size}/{number}.jpg", answer)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
