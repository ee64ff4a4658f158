"""HDR frames (PQ and HLG, ITU-R BT.2100) -> SDR like all others, by the tone mapping of FFmpeg's scaler."""

from fractions import Fraction
from functools import lru_cache
from threading import Lock

import numpy as np
from av import VideoFormat, VideoFrame
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorTrc

FORMAT = "rgb48le"  # of what is toned
_TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
# What "perceptual" does is in libswscale/cms.c: lightness by BT.2390's curve, colours that BT.709 lacks drawn in.
_TONED = "out_transfer=bt709:out_primaries=bt709:intent=perceptual"
_one_at_a_time = Lock()  # for graphs are not safe among threads


def is_hdr(frame: VideoFrame) -> bool:
    """Whether its transfer is PQ's or HLG's."""
    return frame.color_trc in _TRANSFERS


def toned(image: np.ndarray, source: VideoFrame) -> np.ndarray:
    """RGB uint16 [y, x, 3] of a frame that is HDR -> uint8 of BT.709.

    The first call for a size and a transfer takes FFmpeg seconds, which it spends on a table of all colours.
    """
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format=FORMAT)
    frame.color_trc = source.color_trc
    known = source.color_primaries != ColorPrimaries.UNSPECIFIED
    frame.color_primaries = source.color_primaries if known else ColorPrimaries.BT2020
    with _one_at_a_time:
        graph = _graph(frame.width, frame.height, frame.color_trc, frame.color_primaries)
        try:
            graph.push(frame)
            return graph.pull().to_ndarray()
        except Exception:
            _graph.cache_clear()  # or what is left in it came out as the next frame
            raise


@lru_cache(maxsize=8)
def _graph(width: int, height: int, *_: int) -> Graph:
    """One for each kind of frame, because its table is made anew where the kind changes."""
    graph = Graph()
    graph.link_nodes(
        graph.add_buffer(width=width, height=height, format=VideoFormat(FORMAT), time_base=Fraction(1, 1)),
        graph.add("scale", _TONED),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ).configure()
    return graph
