"""The two commands that made the miniature's VAE, at a size that takes seconds."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pipelines.nano_frames import draw_shapes, frames
from pipelines.nano_vae import train
from t2v.frozen import load_vae


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = str(tmp_path / "clip.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 112, "yuv420p"
        for level in range(0, 210, 10):
            picture = np.full((112, 160, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def test_material_and_training(clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    material, out = str(tmp_path / "material.npz"), str(tmp_path / "vae")
    frames({clip: 5}, {clip: 3}, material, shape_frames=32)
    arrays = np.load(material)
    assert {name: array.shape for name, array in arrays.items()} == {
        "shapes": (32, 64, 64, 3),
        "shapes_held_out": (2, 64, 64, 3),
        "real": (5, 96, 96, 3),
        "real_held_out": (3, 64, 64, 3),
    }
    # From the first to the last frame of the clip, in equal steps.
    assert np.abs(arrays["real"].mean((1, 2, 3)) - [0, 50, 100, 150, 200]).max() < 6

    train(material, out, seconds=1, batch=4, device="cpu")
    assert "dB held out" in capsys.readouterr().out
    vae = load_vae(out)
    mean, logvar = vae.encode(torch.from_numpy(arrays["shapes"]))
    assert mean.shape == (32, 4, 8, 8)
    assert vae.scale * (mean.var() + logvar.exp().mean()).sqrt() == pytest.approx(1, abs=0.05)


def test_shapes_differ_by_seed_alone() -> None:
    first = draw_shapes(12, seed=5)
    assert np.array_equal(first, draw_shapes(12, seed=5))
    assert not np.array_equal(first, draw_shapes(12, seed=6))
