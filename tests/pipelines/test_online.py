"""How the encoders of online training share a cluster, and what they refuse."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from pipelines.config import ClipFilters, DataConfig, EncodeConfig, FetchConfig, StreamConfig
from pipelines.online import Encoding, Pool, open_online, share
from t2v.config import MixConfig
from t2v.job import TrainJob
from tests.t2v.train_ranks import job as tiny_job


@pytest.fixture
def job() -> TrainJob:
    """Ranks of one GPU's nine tenths and 8 CPUs; one slot in four is of images."""
    whole = tiny_job("", 4)
    mix = MixConfig(slots=4, image_every=4, frames_per_slot=4)
    return replace(whole, train=replace(whole.train, gpus_per_worker=0.9, cpus_per_worker=8, mix=mix))


@pytest.mark.parametrize(
    ("cpus", "gpus", "images", "videos"),
    [
        (128, 4, Pool(2, 1), Pool(6, 3)),  # all that is asked for
        (128, 3.8, Pool(2, 1), Pool(6, 1)),  # two encoders find a tenth of a GPU
        (50, 4, Pool(2, 1), Pool(6, 2)),  # 18 CPUs beside the ranks: three encoders of 4 and eight downloads of 0.5
        (41, 4, Pool(1, 1), Pool(1, 1)),
        (40, 0, Pool(1, 1), Pool(1, 1)),  # too few: what is left is waited for
    ],
)
def test_streams_share_the_encoders_as_they_do_a_step_and_as_there_is_room(
    job: TrainJob, cpus: float, gpus: float, images: Pool, videos: Pool
) -> None:
    data = DataConfig(encode=EncodeConfig(workers=4, gpus_per_worker=0.1), fetch=FetchConfig(workers=8))
    assert share(job, data, 4, {"CPU": cpus, "GPU": gpus}) == {"images": images, "videos": videos}


def broken_pictures(folder: Path) -> DataConfig:
    for stream in ("images", "videos"):
        (folder / stream).mkdir()
        for number in range(6):
            (folder / stream / f"{number}.jpg").write_bytes(b"no picture")
    inputs = {name: StreamConfig(str(folder / name), "generic", shard_rows=3) for name in ("images", "videos")}
    encode = EncodeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=0.5)
    return DataConfig(size=32, encode=encode, fetch=FetchConfig(cpus_per_task=0.2), **inputs)


def test_a_manifest_of_which_no_row_can_be_used_ends_the_run_and_leaves_its_ledger(
    ray_session: None, tiny_model: str, tmp_path: Path
) -> None:
    data = broken_pictures(tmp_path)
    online, sources = open_online(str(tmp_path / "run"), data, f"{tiny_model}/vae", 3)
    assert {stream: (one.rows, one.shards) for stream, one in sources.items()} == {"images": (6, 2), "videos": (6, 2)}
    fewer = replace(data, encode=replace(data.encode, batch_frames=32))
    halved = open_online(str(tmp_path / "run"), fewer, f"{tiny_model}/vae", 3)[1]["images"].encoder_bytes
    assert 0 < halved < sources["images"].encoder_bytes == sources["videos"].encoder_bytes
    assert sources["videos"].info.shape == (4, 16, 4, 4) and sources["images"].needs == {"CPU": 0.7, "GPU": 0}
    encoding = Encoding.remote(online, "images", 1, Pool(1, 1))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="images: none of 2 raw shards has a usable row; see .*ledger_online/images"):
        for _ in range(6):
            ray.get(encoding.next.remote(), timeout=120)
    ray.kill(encoding)
    ledger = pq.read_table(tmp_path / "run/data/ledger_online/images").to_pylist()
    assert {row["status"] for row in ledger} == {"not_media"} and len({row["row_id"] for row in ledger}) == 6
    changed = open_online(str(tmp_path / "run"), replace(data, size=64), f"{tiny_model}/vae", 3)[1]
    assert changed["images"].info.data_hash != sources["images"].info.data_hash


def test_what_needs_all_latents_or_a_manifest_is_refused(tiny_model: str, tmp_path: Path) -> None:
    data, vae = broken_pictures(tmp_path), f"{tiny_model}/vae"
    with pytest.raises(ValueError, match=r"duplicates_across needs all latents"):
        filters = ClipFilters(duplicate_bits=4, duplicates_across=True)
        open_online(str(tmp_path), replace(data, filters=filters), vae, 3)
    with pytest.raises(ValueError, match=r"data\.encode\.vae_workers: VAEs apart are for"):
        open_online(str(tmp_path), replace(data, encode=replace(data.encode, vae_workers=2)), vae, 3)
    with pytest.raises(ValueError, match=r"data\.also_sizes: further sizes are for"):
        open_online(str(tmp_path), replace(data, also_sizes=[64]), vae, 3)
    with pytest.raises(ValueError, match=r"data\.images\.manifest is not set"):
        open_online(str(tmp_path), replace(data, images=StreamConfig()), vae, 3)
    with pytest.raises(FileNotFoundError, match=r"model\.vae"):
        open_online(str(tmp_path), data, str(tmp_path / "none"), 3)
