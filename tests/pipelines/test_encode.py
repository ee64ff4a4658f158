import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import pyarrow as pa
import pytest

from pipelines.config import DataConfig, EncodeConfig, StreamConfig
from pipelines.encode import ShardEncoder, _in_order
from pipelines.prepare import ShardFetcher, plan_streams, prepare
from t2v import storage
from t2v.shards import encoder_id

SEED, SHARDS = 3, 4


@pytest.fixture(scope="module")
def given(corpus, tiny_model, tmp_path_factory):
    """(settings of an encoder, the tasks of pictures that are there already)."""
    vae, data_dir = f"{tiny_model}/vae", str(tmp_path_factory.mktemp("data"))
    pictures = tmp_path_factory.mktemp("pictures")
    for path in sorted((corpus.folder / "images").glob("*.jpg"))[: 6 * SHARDS]:
        shutil.copy(path, pictures)
    data = DataConfig(
        size=32,
        images=StreamConfig(str(pictures), "generic", shard_rows=6),
        encode=EncodeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=2, batch_frames=4),
    )
    (plan,) = plan_streams(data_dir, data, encoder_id(vae), SEED)
    tasks = plan.tasks(data_dir, done=False).to_pylist()
    return {"data": data, "vae_path": vae, "encoder": encoder_id(vae), "seed": SEED}, data_dir, tasks


def files(folder):
    paths = [*folder.glob("latents/images/*"), *folder.glob("ledger/images/*")]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def test_shards_that_are_made_side_by_side_are_those_made_one_after_another(given, tmp_path):
    settings, data_dir, tasks = given
    assert len(tasks) == SHARDS
    fetcher = ShardFetcher(data_dir, settings["data"])
    batches = [fetcher(pa.Table.from_pylist([task])) for task in tasks]
    alone = ShardEncoder(data_dir=str(tmp_path / "alone"), **settings)
    together = ShardEncoder(data_dir=str(tmp_path / "together"), **settings)
    one_by_one = [alone(batch).to_pylist() for batch in batches]
    begun = Barrier(SHARDS)

    def at_once(batch):
        begun.wait(timeout=60)
        return together(batch).to_pylist()

    with ThreadPoolExecutor(SHARDS) as pool:
        assert list(pool.map(at_once, batches)) == one_by_one
    for encoder in (alone, together):
        encoder.media.selection._decoders.close()
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    assert len(files(tmp_path / "alone")) == 2 * SHARDS


def test_ray_gives_a_worker_two_shards_at_once(given, ray_session, monkeypatch, tmp_path):
    settings, _, tasks = given
    monkeypatch.setattr(EncodeConfig, "shards_at_once", 2)  # as on a GPU
    funnel = prepare(str(tmp_path), settings["data"], settings["vae_path"], SEED)
    assert funnel["images"] == {"ok": sum(task["rows"] for task in tasks)}
    done = sorted(tmp_path.glob("data/done/images/*.json"))
    assert [path.stem for path in done] == [task["name"] for task in tasks]
    spans = [(one["ended"] - one["seconds"]["encode"], one["ended"]) for one in map(storage.read_json, map(str, done))]
    spans.sort()
    assert any(begun < ended for (_, ended), (begun, _) in pairwise(spans))


def test_rows_are_decoded_ahead_while_a_batch_is_encoded():
    """As many as `ahead` tells, and no more."""
    begun = []
    with ThreadPoolExecutor(2) as pool:
        rows = _in_order(pool, lambda row: begun.append(row) or row, range(100), ahead=10)
        assert next(rows) == 0
        time.sleep(0.2)  # what an encoder takes over a batch
        assert sorted(begun) == list(range(11))
        assert list(rows) == list(range(1, 100))


def test_only_where_there_is_a_gpu_does_a_worker_have_two_shards_at_once():
    assert [EncodeConfig(gpus_per_worker=gpus).shards_at_once for gpus in (0, 0.5, 1)] == [1, 2, 2]
