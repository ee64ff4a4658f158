"""What is written as video is seen again, and is the same file each time."""

import io
from pathlib import Path

import av
import numpy as np

from pipelines.video import mp4_bytes, write_mp4


def test_equal_frames_give_equal_files(tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 255, (12, 96, 128, 3), np.uint8)
    write_mp4(str(tmp_path / "a.mp4"), iter(frames), 24, {"crf": "30"})
    buffer = io.BytesIO()
    write_mp4(buffer, list(frames), 24, {"crf": "30"})
    assert (tmp_path / "a.mp4").read_bytes() == buffer.getvalue()
    with av.open(io.BytesIO(buffer.getvalue()), mode="r") as container:
        assert sum(1 for _ in container.decode(video=0)) == 12


def test_small_videos_are_enlarged_to_be_watched() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 4, 4, 3), np.uint8).repeat(12, axis=1).repeat(12, axis=2)
    with av.open(io.BytesIO(mp4_bytes(frames, fps=8, options={"crf": "10"})), mode="r") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert shown.shape == (5, 288, 288, 3)
    assert abs(shown[:, 36::72, 36::72].astype(int) - frames[:, 6::12, 6::12]).max() < 12
