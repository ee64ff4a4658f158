"""The middle square of a picture, at the size that is wanted."""

import math

import cv2
import numpy as np


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The middle square of [y, x, 3], scaled to [size, size, 3], each pixel the mean over its area."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = image[top : top + side, left : left + side]
    # Intel's code takes half to a fifth of the time. It rounds halves its own way, so it is for what has none.
    cv2.ipp.setUseIPP_NotExact(side > size and side // math.gcd(side, size) % 2 == 1)
    scaled = cv2.resize(middle, (size, size), interpolation=cv2.INTER_AREA if side >= size else cv2.INTER_CUBIC)
    cv2.ipp.setUseIPP_NotExact(False)  # it is this thread's, whatever else is done in it
    return scaled
