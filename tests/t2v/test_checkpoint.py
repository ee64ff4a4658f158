"""Which checkpoint training goes on from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2v import storage
from t2v.checkpoint import KINDS, CheckpointError, Piece, furthest_first, read_pieces, read_state, write_share
from tests.t2v.latents import add_shards, make_job


def write(folder: Path, samples: int, ranks: int = 1, of: int | None = None) -> None:
    """A checkpoint of a weight of four elements, by `ranks` ranks of `of`."""
    for rank in range(ranks):
        flats = {kind: [torch.arange(4.0) + place] for place, kind in enumerate(KINDS)}
        state = {"samples": samples, "ranks": of or ranks}
        write_share(str(folder), rank, flats, [Piece("weight", 0, 4)], state)


def test_the_furthest_is_gone_on_from_whatever_clocks_say_and_milestones_copies_last(tmp_path: Path) -> None:
    names = {"checkpoint_2026-10-25_02-10": 300, "checkpoint_2026-10-25_02-30": 200, "checkpoint_2026-10-25_02-50": 200}
    for name, samples in names.items():
        write(tmp_path / name, samples)
    for samples in (150, 250):
        write(tmp_path / f"milestones/{samples:012}/checkpoint", samples)
    write(tmp_path / "checkpoint_2026-10-25_02-59", 400, ranks=1, of=2)
    told: list[str] = []
    found = furthest_first(str(tmp_path), told.append)
    assert [samples for samples, _ in found] == [300, 200, 200, 250, 150]
    assert [folder.rsplit("_")[-1] for samples, folder in found if samples == 200] == ["02-50", "02-30"]
    (problem,) = told
    assert "02-59: the checkpoint is half-written, 1 of 2 ranks have finished it" in problem


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b'{"state": {"ranks": 1}}', b'{"parts": []}', b'{"parts": [], "state": 3}']
)
def test_what_is_damaged_is_told_and_no_crash(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path, 100)
    (tmp_path / "rank-00000.json").write_bytes(damage)
    for read in (read_state, lambda folder: list(read_pieces(folder, [Piece("weight", 0, 4)]))):
        with pytest.raises(CheckpointError, match="what a rank says of its share is damaged"):
            read(str(tmp_path))


def test_a_run_of_which_a_milestone_alone_is_left_is_not_begun_anew(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    add_shards(tmp_path, 0, 2)
    job = replace(job, model=replace(job.model, start="/gone"))
    assert job.is_fresh and job.reads_start
    write(tmp_path / "train/milestones/000000000250/checkpoint", 250)
    assert not job.is_fresh and not job.reads_start
    storage.remove_folder(f"{tmp_path}/train/milestones/000000000250/checkpoint")
    assert job.is_fresh
