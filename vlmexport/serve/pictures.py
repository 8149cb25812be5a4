"""The pictures of a request: bytes from data URLs or allowed hosts, measured before they are decoded."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError
from vlmexport.runtime.prompt import DAMAGED, read_image
from vlmexport.serve.fetch import fetch
from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError

if TYPE_CHECKING:
    from PIL.Image import Image

_PARAM = "messages"
# What browsers and cameras make. Others are not needed, and some of their readers decode at once or start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def picture_files(
    urls: Sequence[str], allowed: Collection[str], limits: Limits, take: Callable[[int], None]
) -> tuple[bytes, ...]:
    """The files behind `urls`, whose headers say that they are pictures within the limits; nothing is decoded yet.

    `take` is told the size of each piece that is fetched (what a data URL holds was part of a body). Raises
    `RefusedError`, as `take` does where there is no memory left for more.
    """
    if len(urls) > limits.images:
        raise RefusedError(400, f"{len(urls)} pictures in one request; the limit is {limits.images}", _PARAM)
    files, pixels = [], 0
    for url in urls:
        data = _from_data_url(url, limits) if url[:5].lower() == "data:" else fetch(url, allowed, limits, take)
        pixels += _pixels(data)
        if pixels > limits.pixels:
            raise RefusedError(400, f"the pictures have {pixels} pixels; the limit is {limits.pixels}", _PARAM)
        files.append(data)
    return tuple(files)


def decoded(files: Sequence[bytes]) -> list[Image]:
    """The pictures as upright RGB. Raises `RefusedError` for damaged ones."""
    try:
        return [read_image(io.BytesIO(data), f"picture {n}", FORMATS) for n, data in enumerate(files, start=1)]
    except BadInputError as error:
        raise RefusedError(400, str(error), _PARAM) from error


def _from_data_url(url: str, limits: Limits) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RefusedError(400, "a data URL of a picture looks like data:image/png;base64,…", _PARAM)
    if len(body) * 3 // 4 > limits.image_bytes + 2:
        raise RefusedError(413, f"a picture has more than {limits.image_bytes} bytes", _PARAM)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(400, f"a data URL is not valid base64: {error}", _PARAM) from error


def _pixels(data: bytes) -> int:
    """Width times height, by the file's header alone."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                return picture.width * picture.height
    except Image.DecompressionBombError as error:
        raise RefusedError(400, "a picture has too many pixels", _PARAM) from error
    except DAMAGED as error:
        known = ", ".join(FORMATS)
        raise RefusedError(400, f"what was sent as a picture is none that can be read ({known})", _PARAM) from error
