"""Encoded pictures -> clips of one frame: the middle square, upright, on white."""

import io
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageOps

from pipelines.media import Clip, MediaError, check_pixels, decoding
from pipelines.square import square

# Those for grey are the bits that tell the scale alone.
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def read_image(data: bytes, size: int, max_pixels: int = 100_000_000, also_sizes: Sequence[int] = ()) -> Clip:
    """A picture as a clip of one frame: its middle square, upright, on white.

    MediaError: not_media, corrupt, too_many_pixels (by the header, before anything is decoded).
    """
    decoded: dict[int, np.ndarray] = {}  # by a JPEG's scale, so that a size is the same whatever others are wanted
    frames = []
    with decoding():
        for side in (size, *also_sizes):
            image: Image.Image = Image.open(io.BytesIO(data), formats=_PICTURES)
            check_pixels(image.width, image.height, max_pixels)
            width = image.width
            image.draft("RGB", (side * 3 // 2, side * 3 // 2))  # JPEG at a half or a quarter, where that still suffices
            scale = round(width / image.width)
            if scale not in decoded:
                plain = _plain_jpeg(image, data, scale)
                decoded[scale] = _on_white(image) if plain is None else plain
            frames.append(square(decoded[scale], side)[None])
    return Clip(frames[0], 0.0, 0.0, tuple(frames[1:]))


def _on_white(image: Image.Image) -> np.ndarray:
    """The upright pixels [y, x, 3] of any picture."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # or Pillow would make white of all but the darkest
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise MediaError("corrupt", f"pixels of 32 bits (mode {image.mode}), of which none is known to be white")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _plain_jpeg(image: Image.Image, data: bytes, scale: int) -> np.ndarray | None:
    """The upright pixels [y, x, 3] of a JPEG of the common kind, for which OpenCV takes a fourth less time than Pillow.

    Both have libjpeg make them of 1/`scale` of its size, and give the same. None for others, and where it does not end
    as it should: Pillow tells a truncated file, OpenCV makes it grey.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not data.endswith(b"\xff\xd9"):
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | _REDUCED[scale])
