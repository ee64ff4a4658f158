"""What a decoder may do on a file of a stranger; these functions run in a decoder process, which imports them here."""

import ctypes
import os

import numpy as np

from pipelines.media import Clip, decoding


def counts(body: bytes, *numbers: int) -> np.ndarray:
    """No misbehaviour: the process that decodes, the length of the body, the arguments."""
    return np.frombuffer(np.array([os.getpid(), len(body), *numbers], "<u4").tobytes(), np.uint8)


def crashes(body: bytes) -> np.ndarray:
    ctypes.string_at(0)
    raise AssertionError("a segmentation fault ends the process")


def leaves(body: bytes) -> np.ndarray:
    os._exit(3)


def raises(body: bytes) -> np.ndarray:
    raise KeyError("no MediaError")


def hangs(body: bytes) -> np.ndarray:
    while True:
        pass


def hangs_in_c(body: bytes) -> np.ndarray:
    ctypes.PyDLL(None).pause()  # which holds the interpreter's lock
    raise AssertionError("no signal comes")


def fills_memory(body: bytes) -> np.ndarray:
    with decoding():
        return np.ones(8 << 30, np.uint8)


def answers_floats(body: bytes) -> Clip:
    return Clip(np.zeros((2, 3), np.float64), 1.0, 2.0)
