import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorTrc

from pipelines.media import read_clip

SIDE, CELL = 96, 16
TRANSFERS = {"arib-std-b67": ColorTrc.ARIB_STD_B67, "smpte2084": ColorTrc.SMPTE2084, "bt709": ColorTrc.BT709}


def patches():
    """YUV of 10 bits [y, x, 3] in cells: two rows of greys from black to white, and rows of colours of medium light."""
    levels = np.linspace(64, 940, 12).astype(np.uint16).reshape(2, 6)
    cells = np.full((6, 6, 3), 512, np.uint16)
    cells[:2, :, 0] = levels
    cells[2:, :, 0] = 500
    cells[2:, :, 1:] = np.random.default_rng(0).integers(400, 625, (4, 6, 2))
    return cells.repeat(CELL, 0).repeat(CELL, 1)


def movie(transfer, seconds=7, fps=5):
    """A still of the patches as HEVC of 10 bits with BT.2020's primaries, as cameras of phones write HLG."""
    told = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc:crf=2"
    file, image = io.BytesIO(), patches()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx265", rate=fps, options={"x265-params": told, "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc = ColorPrimaries.BT2020, TRANSFERS[transfer]
        context.colorspace, context.color_range = 9, 1
        for index in range(seconds * fps):
            frame = av.VideoFrame(SIDE, SIDE, "yuv420p10le")
            for part, plane in enumerate(frame.planes):
                step = 1 if part == 0 else 2
                wide = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                wide[:, : plane.width] = image[::step, ::step, part]
                plane.update(wide.tobytes())
            frame.pts, frame.time_base = index, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def by_ffmpeg(data, *filters):
    """The first frame as FFmpeg's filters give it, the whole of it at once, in the middle of each cell."""
    with av.open(io.BytesIO(data)) as container:
        graph = Graph()
        nodes = [graph.add(name, settings) for name, settings in (*filters, ("format", "rgb24"), ("buffersink", None))]
        graph.link_nodes(graph.add_buffer(template=container.streams.video[0]), *nodes).configure()
        graph.push(next(container.decode(video=0)))
        return middles(graph.pull().to_ndarray())


def middles(image):
    return image[CELL // 2 :: CELL, CELL // 2 :: CELL].astype(int)


@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
def test_hdr_is_tone_mapped(transfer):
    data = movie(transfer)
    clip = read_clip(data, 16, 3.0, SIDE)
    assert (clip.frames.shape, clip.frames.dtype) == ((16, SIDE, SIDE, 3), np.uint8)
    found = middles(clip.frames[7])
    tone = ("scale", "out_transfer=bt709:out_primaries=bt709:intent=perceptual")
    assert np.abs(found - by_ffmpeg(data, ("format", "rgb48le"), tone)).max() <= 3
    assert np.abs(found - by_ffmpeg(data)).mean() > 5  # levels as they stand
    greys = found[:2].reshape(12, 3)
    assert np.ptp(greys, axis=1).max() <= 3
    assert (np.diff(greys[:, 1]) > 0).all()  # the brightest are told apart still
    np.testing.assert_array_equal(read_clip(data, 16, 3.0, SIDE).frames, clip.frames)


def test_ten_bits_alone_are_no_hdr():
    data = movie("bt709")
    found = middles(read_clip(data, 16, 3.0, SIDE).frames[7])
    assert np.abs(found - by_ffmpeg(data)).max() <= 2
