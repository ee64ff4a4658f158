"""Pictures of every kind to the middle square: sizes, orientations, depths, transparency, and what is broken."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.media import MediaError
from pipelines.pictures import read_image
from tests.pipelines.test_media import WHOLE

BLUE, GREEN, RED = (0, 0, 255), (0, 255, 0), (255, 0, 0)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_the_middle_square_of_a_picture():
    image = Image.new("RGB", (300, 100), RED)
    image.paste(GREEN, (100, 0, 200, 100))
    frames = read_image(saved(image, "PNG"), 64).frames
    assert (frames.shape, frames.dtype) == ((1, 64, 64, 3), np.uint8)
    assert (frames == GREEN).all()


@pytest.mark.parametrize("size", [48, 100, 1000])
def test_large_and_small_jpegs(size):
    image = Image.linear_gradient("L").resize((800, 600)).convert("RGB")
    frames = read_image(saved(image, "JPEG", quality=95), size).frames
    expected = image.crop((100, 0, 700, 600)).resize((size, size), Image.Resampling.BOX)
    assert np.abs(frames[0].astype(int) - np.asarray(expected)).mean() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_size_is_the_same_whatever_other_sizes_are_wanted(kind):
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    data = saved(Image.fromarray(noise), kind)
    several = read_image(data, 128, also_sizes=[512, 64, 256])
    for frames, size in zip((several.frames, *several.also), (128, 512, 64, 256), strict=True):
        np.testing.assert_array_equal(frames, read_image(data, size).frames)
        assert frames.shape == (1, size, size, 3)


@pytest.mark.parametrize("side", [90, 300, 601, 2000])
def test_both_decoders_of_jpegs_give_the_same_pixels_at_every_scale(side):
    noise = np.random.default_rng(0).integers(0, 256, (side, side + 7, 3), np.uint8)
    data = saved(Image.fromarray(cv2.GaussianBlur(noise, (5, 5), 0)), "JPEG", quality=90)
    by_pillow = data + b"\0"  # does not end as it should, which is Pillow's to look at
    np.testing.assert_array_equal(read_image(data, 64).frames, read_image(by_pillow, 64).frames)


def test_a_picture_is_turned_upright():
    image = Image.new("RGB", (64, 64), RED)
    image.paste(BLUE, (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees, so that up becomes right
    frames = read_image(saved(image, "JPEG", exif=exif, quality=95), 64).frames
    assert frames[0, 32, 56, 2] > 200
    assert frames[0, 32, 8, 0] > 200


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation):
    upright = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    upright.paste(RED, (16, 0, 48, 32))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that undo those of showing
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(
        read_image(saved(stored, "PNG", exif=exif), 64).frames, read_image(saved(upright, "PNG"), 64).frames
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_shown_as_eight(kind):
    grey = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    frames = read_image(saved(Image.fromarray(grey + 77), kind), 16).frames
    np.testing.assert_array_equal(frames[0], np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_pixels_without_a_known_white_are_refused():
    for mode in ("I", "F"):
        with pytest.raises(MediaError, match="32 bits"):
            read_image(saved(Image.new(mode, (64, 64), 9), "TIFF"), 64)


def test_what_is_transparent_is_white():
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([255, 0, 0])
    for data in (saved(clear, "PNG"), saved(clear, "WEBP"), saved(palette, "PNG", transparency=0)):
        assert (read_image(data, 32).frames == 255).all()
    half = saved(Image.new("RGBA", (64, 64), (255, 0, 0, 128)), "PNG")
    assert np.abs(read_image(half, 32).frames[0, 0, 0].astype(int) - [255, 127, 127]).max() <= 1


def test_pixels_are_counted_before_they_are_decoded():
    data = bytearray(saved(Image.new("RGB", (64, 64)), "JPEG"))
    frame_header = data.index(b"\xff\xc0")
    data[frame_header + 5 : frame_header + 9] = (60_000).to_bytes(2) * 2
    for image, limit in ((bytes(data), 10**8), (bytes(data), 10**10), (saved(Image.new("L", (64, 65)), "PNG"), 4096)):
        with pytest.raises(MediaError) as refused:
            read_image(image, 64, max_pixels=limit)
        assert refused.value.status == "too_many_pixels"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (saved(Image.effect_noise((64, 64), 50), "JPEG")[:800], "corrupt"),
        (saved(Image.effect_noise((64, 64), 50), "PNG")[:800], "corrupt"),
        (b"<!doctype html>", "not_media"),
        (WHOLE, "not_media"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_media"),  # would start Ghostscript
    ],
)
def test_broken_pictures(data, status):
    with pytest.raises(MediaError) as refused:
        read_image(data, 64)
    assert refused.value.status == status
