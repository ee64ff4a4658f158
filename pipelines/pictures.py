"""Encoded pictures -> clips of one frame: the middle square, upright, on white."""

import io
import math

import cv2
import numpy as np
from PIL import Image, ImageOps

from pipelines.media import MediaError, check_pixels, decoding, square

# Those for grey are the bits that tell the scale alone.
_REDUCED = {
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    1: 0,
}
_PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_FRAMES = (0xC0, 0xC1, 0xC2)  # markers before a JPEG's size (ITU-T T.81, table B.1): baseline, extended, progressive
_TABLES = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # and those of all that may stand before: its length is told


def read_image(data: bytes, size: int, max_pixels: int = 100_000_000) -> np.ndarray:
    """A picture as a clip of one frame, uint8 [1, size, size, 3]: its middle square, upright, on white.

    MediaError: not_media, corrupt, too_many_pixels (by the header, before anything is decoded).
    """
    least = size * 3 // 2  # JPEGs are decoded at a half, a quarter or an eighth where that still gives so many pixels
    with decoding():
        pixels = _plain_jpeg(data, least, max_pixels)
        return square(_by_pillow(data, least, max_pixels) if pixels is None else pixels, size)[None]


def _by_pillow(data: bytes, least: int, max_pixels: int) -> np.ndarray:
    """The upright pixels [y, x, 3] of a picture of any kind."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=_PICTURES)
    check_pixels(image.width, image.height, max_pixels)
    image.draft("RGB", (least, least))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # or Pillow would make white of all but the darkest
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise MediaError("corrupt", f"pixels of 32 bits (mode {image.mode}), of which none is known to be white")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _plain_jpeg(data: bytes, least: int, max_pixels: int) -> np.ndarray | None:
    """The same of a JPEG of the common kind, for which OpenCV takes a fourth less time than Pillow.

    Both have libjpeg make them, and give the same. None for others, for those beyond Pillow's own bound, and where it
    does not end as it should: Pillow tells a truncated file, OpenCV makes it grey.
    """
    found = _plain_size(data)
    if found is None or math.prod(found) > (Image.MAX_IMAGE_PIXELS or 0) or not data.endswith(b"\xff\xd9"):
        return None
    check_pixels(*found, max_pixels)
    reduced = next((scale for scale in _REDUCED if min(found) >= scale * least), 1)
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | _REDUCED[reduced])


def _plain_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG of 8 bits, grey or of three colours; Pillow, asked for them, takes 0.1 ms."""
    if not data.startswith(b"\xff\xd8"):
        return None
    place = 2
    while place + 9 < len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _FRAMES:
            is_plain = data[place + 4] == 8 and data[place + 9] in (1, 3)
            height, width = (int.from_bytes(data[at : at + 2]) for at in (place + 5, place + 7))
            return (width, height) if is_plain else None
        if marker not in _TABLES:
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None
