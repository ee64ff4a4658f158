"""Training on Ray: what is killed is started anew and ends as if undisturbed; what cannot be mended ends at once."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from ray.train import Checkpoint
from safetensors.torch import load_file

from t2v import storage
from t2v.job import TrainJob
from t2v.tracking import tracking_uri
from t2v.watch import Watch
from t2v.worker import _validate, fit
from tests.t2v.test_gauges import scraped, tagged
from tests.t2v.train_ranks import STEP_SAMPLES, job

LOSSES = {"held_out_images": 0.5, "held_out_videos": 0.25, "held_out_videos_t750": 0.125}


@ray.remote(num_cpus=0)
def note(run_dir: str, prompts: list[str], samples: int) -> dict[str, float]:
    Path(run_dir, f"told-{samples}.json").write_text(json.dumps(prompts))
    return LOSSES


def tell(whole: TrainJob, prompts: list[str], samples: int) -> ray.ObjectRef:
    """What the job does with an exported model: here it is noted."""
    return note.remote(whole.run_dir, prompts, samples)


def new_job(data: Path, run_dir: Path, steps: int = 40) -> TrainJob:
    shutil.copytree(data, run_dir)
    return job_of(run_dir, steps)


def job_of(run_dir: Path, steps: int = 40) -> TrainJob:
    whole = job(str(run_dir), 2)
    cadence = {"samples": steps * STEP_SAMPLES, "checkpoint_every_samples": 4 * STEP_SAMPLES}
    milestones = {"milestone_every_samples": 20 * STEP_SAMPLES, "keep_checkpoints": 2}
    machine = {"gpus_per_worker": 0, "cpus_per_worker": 1}
    return replace(whole, train=replace(whole.train, **cadence, **milestones, **machine))


def kill_a_rank(run_dir: Path, killed: list[int], is_over: threading.Event) -> None:
    """SIGKILL, once there is a checkpoint of both ranks."""
    while not is_over.wait(0.05):
        shares = [len(list(folder.glob("rank-*.json"))) for folder in run_dir.glob("train/checkpoint_2*")]
        if 2 in shares:
            break
    ranks = [each for each in psutil.Process().children(recursive=True) if "RayTrainWorker" in each.name()]
    for process in ranks[:1]:
        killed.append(process.pid)
        process.kill()


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "train/model/unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def runs(ray_session: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    fit(new_job(data, folder / "undisturbed"), tell)
    killed: list[int] = []
    is_over = threading.Event()
    killer = threading.Thread(target=kill_a_rank, args=(folder / "killed", killed, is_over), daemon=True)
    killer.start()
    fit(new_job(data, folder / "killed"), tell)
    is_over.set()
    killer.join()
    assert killed
    return folder


def test_a_killed_rank_costs_nothing_but_time(runs: Path) -> None:
    starts = storage.read_lines(f"{runs}/killed/train/starts.jsonl")
    assert len(starts) == 2 and starts[1]["samples"] > 0
    one, two = exported(runs / "undisturbed"), exported(runs / "killed")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_milestones_are_exported_told_of_and_kept_while_checkpoints_go(runs: Path) -> None:
    half, end = 20 * STEP_SAMPLES, 40 * STEP_SAMPLES
    assert {path.name for path in (runs / "undisturbed").glob("told-*")} == {f"told-{half}.json", f"told-{end}.json"}
    assert len(json.loads((runs / f"undisturbed/told-{end}.json").read_text())) == 5
    assert (runs / f"undisturbed/train/milestones/{half:012}/checkpoint/rank-00001.json").exists()
    assert len(list((runs / "undisturbed/train").glob("checkpoint_2*"))) == 2
    models = {samples: runs / f"undisturbed/train/milestones/{samples:012}/model" for samples in (half, end)}
    seen = {samples: storage.read_json(f"{model}/t2v.json")["info"]["samples"] for samples, model in models.items()}
    assert seen == {half: half, end: end}
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (models[end] / unet).read_bytes() == (runs / "undisturbed/train/model" / unet).read_bytes()
    assert (models[half] / unet).read_bytes() != (models[end] / unet).read_bytes()
    versions = MlflowClient(tracking_uri(str(runs / "undisturbed"))).search_model_versions("name = 'undisturbed'")
    assert {version.tags["samples"]: version.tags["folder"] for version in versions} == {
        str(samples): str(model) for samples, model in models.items()
    }


def test_a_milestones_losses_are_kept_with_its_checkpoint_and_shown_when_their_task_has_ended(runs: Path) -> None:
    whole = job_of(runs / "undisturbed")
    (newest, *_) = storage.read_json(whole.registry)["checkpoint_results"][::-1]
    assert newest["metrics"] == {"samples": 40 * STEP_SAMPLES} | LOSSES
    watch = Watch.remote(60.0)
    checkpoint = Checkpoint(f"{runs}/undisturbed/train/{newest['checkpoint_dir_name']}")
    ray.get(ray.remote(_validate).remote(checkpoint, whole, watch, tell, 40 * STEP_SAMPLES))
    assert scraped(set(map(tagged, LOSSES))) == {tagged(name): loss for name, loss in LOSSES.items()}
    ray.kill(watch)


def test_a_list_of_checkpoints_that_a_kill_left_half_written_is_begun_anew(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = job_of(runs / "undisturbed", steps=44)
    note = Path(whole.registry)
    note.write_text(note.read_text()[:100])
    fit(whole, tell)
    assert "Ray Train's list of checkpoints is begun anew" in capsys.readouterr().out
    assert storage.read_lines(f"{runs}/undisturbed/train/starts.jsonl")[-1]["samples"] == 40 * STEP_SAMPLES
    assert whole.exported_samples == 44 * STEP_SAMPLES


def test_a_corrupt_shard_ends_the_run_by_name_and_is_not_tried_again(runs: Path, data: Path, tmp_path: Path) -> None:
    whole = new_job(data, tmp_path / "run", steps=4)
    shard = tmp_path / "run/data/latents/videos/1.parquet"
    content = bytearray(shard.read_bytes())
    content[200:3000] = bytes(2800)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="videos/1.parquet: row group 0 cannot be read"):
        fit(whole, tell)
    assert len(storage.read_lines(f"{tmp_path}/run/train/starts.jsonl")) == 1
