"""Area means of the middle square, against the exact ones."""

import cv2
import numpy as np
import pytest

from pipelines.square import square


@pytest.mark.parametrize(("side", "size"), [(336, 256), (480, 256), (1080, 256), (512, 256), (64, 48), (257, 256)])
def test_each_pixel_is_the_mean_over_its_area(side, size):
    image = np.random.default_rng(0).integers(0, 256, (side, side + 50, 3), np.uint8)
    edges = np.linspace(0, side, size + 1)
    pixels = np.arange(side)
    weights = np.clip(pixels + 1, edges[:-1, None], edges[1:, None]) - np.clip(
        pixels, edges[:-1, None], edges[1:, None]
    )
    middle = image[:, 25 : 25 + side].astype(float)
    mean = np.einsum("iy,yxc,jx->ijc", weights, middle, weights, optimize=True) * (size / side) ** 2
    found = square(image, size)
    assert np.abs(found - mean).max() < 0.501
    scaled = cv2.resize(image[:, 25 : 25 + side], (size, size), interpolation=cv2.INTER_AREA)
    assert (found != scaled).mean() < 1e-4  # clips stay what they were, else prepare's _VERSIONS count up
