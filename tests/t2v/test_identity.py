"""A run goes on as what it was begun as, or says what is another now."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from t2v import storage
from t2v.identity import keep_identity
from t2v.job import TrainJob
from tests.t2v.train_ranks import job

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(params=["sd21.ckpt", "sd21"])
def begun(request: pytest.FixtureRequest, tmp_path: Path) -> TrainJob:
    """A run that was begun with weights in a file or in a diffusers folder."""
    start = tmp_path / request.param
    if not start.suffix:
        (start / "unet").mkdir(parents=True)
        (start / "unet/config.json").write_text("{}")
    weights_of(start).write_bytes(b"weights")
    whole = job(str(tmp_path / "run"), 2)
    whole = replace(whole, model=replace(whole.model, start=str(start)))
    keep_identity(whole)
    return whole


def weights_of(start: Path) -> Path:
    return start if start.suffix else start / UNET


def add_checkpoint(whole: TrainJob) -> None:
    storage.write_json(f"{whole.run_dir}/train/checkpoint_1/rank-00000.json", {})


def test_other_weights_under_the_same_path_are_told_before_and_after_a_checkpoint(begun: TrainJob) -> None:
    weights = weights_of(Path(str(begun.model.start)))
    was = storage.read_json(f"{begun.run_dir}/train/identity.json")["start"]
    for _ in range(2):
        weights.write_bytes(b"weighty")
        with pytest.raises(ValueError, match=rf"begun with another start \(was {was}\); choose another run_dir"):
            keep_identity(begun)
        weights.write_bytes(b"weights")
        keep_identity(begun)
        add_checkpoint(begun)


def test_weights_are_read_again_only_where_their_files_have_changed(begun: TrainJob) -> None:
    weights = weights_of(Path(str(begun.model.start)))
    note = f"{begun.run_dir}/train/start.json"
    read = storage.read_json(note)
    assert read["digest"] == storage.read_json(f"{begun.run_dir}/train/identity.json")["start"]
    storage.write_json(note, read | {"digest": "as remembered"})
    with pytest.raises(ValueError, match="another start"):  # of which only the note tells
        keep_identity(begun)
    os.utime(weights, (0, 0))
    keep_identity(begun)
    assert storage.read_json(note)["digest"] == read["digest"]


def test_the_same_weights_may_lie_elsewhere_and_once_they_are_read_no_more_nowhere(begun: TrainJob) -> None:
    start = Path(str(begun.model.start))
    moved = replace(begun, model=replace(begun.model, start=str(start.rename(start.with_stem("moved")))))
    keep_identity(moved)
    with pytest.raises(FileNotFoundError, match=f"model.start: there is no file or folder {start}"):
        keep_identity(begun)
    without = replace(begun, model=replace(begun.model, start=None))
    with pytest.raises(ValueError, match="another start"):
        keep_identity(without)
    add_checkpoint(begun)
    for whole in (begun, without):
        keep_identity(whole)
    with pytest.raises(FileNotFoundError, match="model.start"):
        keep_identity(replace(begun, train=replace(begun.train, trained="temporal")))


def test_a_run_from_before_starts_were_told_apart_goes_on(begun: TrainJob) -> None:
    path = f"{begun.run_dir}/train/identity.json"
    storage.write_json(path, {key: value for key, value in storage.read_json(path).items() if key != "start"})
    keep_identity(begun)
    with pytest.raises(ValueError, match=r"begun with another seed \(was 0\)"):
        keep_identity(replace(begun, seed=1))
