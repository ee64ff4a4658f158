import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest

from pipelines import vaes
from pipelines.config import DataConfig, EncodeConfig, FetchConfig, StreamConfig
from pipelines.prepare import prepare
from pipelines.vaes import LocalVae, RemoteVae, VaePool, vae_pool
from t2v import storage
from t2v.shards import encoder_id

TOGETHER = EncodeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=0.5, batch_frames=4)
APART = replace(TOGETHER, vae_workers=2)


def vae_processes():
    mine = psutil.Process().children(recursive=True)
    alive = [process for process in mine if process.status() != psutil.STATUS_ZOMBIE]
    return [process for process in alive if "LocalVae" in " ".join(process.cmdline())]


def kill_each(run_dir):
    """Kills the VAE actors, one after another, once a shard is there; which ones."""
    while not list(run_dir.glob("data/done/images/*")):
        time.sleep(0.02)
    killed = vae_processes()
    for process in killed:
        process.kill()
        time.sleep(1)
    return killed


def made(run_dir):
    latents = {path.relative_to(run_dir): path.read_bytes() for path in run_dir.glob("data/latents*/images/*")}
    summaries = [storage.read_json(str(path)) for path in sorted(run_dir.glob("data/done/images/*"))]
    return latents, [{key: one[key] for key in ("rows", "status", "digest", "info", "also")} for one in summaries]


def test_killed_vae_actors_change_no_byte(ray_session, corpus, tiny_model, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for copy in range(4):
        for path in sorted((corpus.folder / "images").glob("*.jpg")):
            shutil.copy(path, pictures / f"{copy}{path.name}")
    images = StreamConfig(str(pictures), "generic", shard_rows=20)
    data = DataConfig(size=32, also_sizes=[16], images=images, fetch=FetchConfig(cpus_per_task=0.25), encode=TOGETHER)
    together, apart = tmp_path / "together", tmp_path / "apart"
    prepare(str(together), data, f"{tiny_model}/vae", 0)
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_each, apart)
        prepare(str(apart), replace(data, encode=APART), f"{tiny_model}/vae", 0)
    assert len(killed.result()) == 2
    assert made(apart) == made(together)
    assert {path.parts[1] for path in made(together)[0]} == {"latents", "latents_16"}
    assert not psutil.wait_procs(vae_processes(), timeout=20)[1]


def test_an_actor_that_stays_away_is_asked_once(ray_session, tiny_model, monkeypatch):
    import ray

    monkeypatch.setattr(vaes, "PATIENCE_S", 2.0)
    path = f"{tiny_model}/vae"
    given = (path, encoder_id(path), [32], 4)
    kind = ray.remote(LocalVae)
    away, there = kind.options(num_cpus=99).remote(*given), kind.options(num_cpus=1).remote(*given)
    remote = RemoteVae(VaePool([away, there], ray.get(there.facts.remote())))
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    expected = LocalVae(*given).encode(frames)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(remote.encode, [frames] * 12))
    assert list(remote._calls.values()).count(remote._actors.index(away)) == 1
    for mean, logvar in answers:
        assert mean.dtype == np.float16 and mean.shape == (6, 4, 4, 4)
        np.testing.assert_array_equal((mean, logvar), expected)
    for actor in (away, there):
        ray.kill(actor)


def test_a_cluster_without_room_is_one_error(ray_session, corpus, tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(vaes, "START_S", 0.5)
    path = f"{tiny_model}/vae"
    images = StreamConfig(str(corpus.folder / "images"), "generic")
    data = DataConfig(size=32, images=images, encode=EncodeConfig(gpus_per_worker=0.6, vae_workers=3))
    with pytest.raises(ValueError, match=r"data\.encode\.vae_workers: 0 of 3 have started .* of 0\.6 GPUs"):
        prepare(str(tmp_path), data, path, 0)
    assert "waiting for 3 GPUs, the cluster has 0: 3 VAEs (data.encode.vae_workers), one" in capfd.readouterr().out
    with vae_pool(TOGETHER, path, "", [32]) as none:
        assert none is None


def test_needs_are_those_of_all_actors():
    def needed(gpus, actors):
        return EncodeConfig(gpus_per_worker=gpus, vae_workers=actors).gpus_needed

    assert [needed(1, 4), needed(0.5, 5), needed(0.6, 3), needed(1 / 3, 7), needed(2, 2)] == [4, 3, 3, 3, 4]
    assert [needed(1, 0), needed(0.25, 0), needed(0, 3)] == [1, 1, 0]
