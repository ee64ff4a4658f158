"""The middle square of a picture, at the size that is wanted."""

import math

import cv2
import numpy as np


def square(image: np.ndarray, size: int, pixel_aspect: float = 1.0) -> np.ndarray:
    """The middle square of [y, x, 3], scaled to [size, size, 3], each pixel the mean over its area.

    `pixel_aspect` is the width of a pixel over its height: what counts is the square that is seen.
    """
    height, width = image.shape[:2]
    side = min(height, width * pixel_aspect)  # in heights of pixels
    tall, wide = round(side), round(side / pixel_aspect)
    top, left = (height - tall) // 2, (width - wide) // 2
    middle = image[top : top + tall, left : left + wide]
    # Intel's code takes half to a fifth of the time. It rounds halves its own way, so it is for what has none.
    cv2.ipp.setUseIPP_NotExact(tall == wide > size and tall // math.gcd(tall, size) % 2 == 1)
    shrinks = min(tall, wide) >= size
    scaled = cv2.resize(middle, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    cv2.ipp.setUseIPP_NotExact(False)  # it is this thread's, whatever else is done in it
    return scaled
