"""What a run must not change when it is resumed: written down as it begins, and compared ever after."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from t2v import storage
from t2v.job import TrainJob
from t2v.weights import named, network_files, weights_id


def keep_identity(job: TrainJob) -> None:
    """Writes down what makes a run that run, or compares it with what was written down.

    ValueError that names what is another now.
    """
    path = storage.join(job.folder, "identity.json")
    begun = storage.read_json(path) if storage.exists(path) else {}
    identity = {
        "seed": job.seed,
        "size": job.size,
        "frames": job.frames,
        "unet": asdict(job.model.unet),
        "text": asdict(job.model.text),
        "mix": asdict(job.train.mix),
        "shuffle_rows": job.train.shuffle_rows,
        "held_out_rows": job.train.held_out_rows,
        "diffusion": asdict(job.diffusion),
        "lora": asdict(job.train.lora) if job.train.trained == "lora" else None,
        "start": _start_id(job, begun),
    }
    if job.raw:  # whose shards have an order, and numbers in it
        identity["raw"] = {stream: [source.digest, source.info.data_hash] for stream, source in job.raw.items()}
    if not begun:
        storage.write_json(path, identity)
        return
    begun = {"size": job.size} | begun  # it was not written down while there was one size alone
    if keys := [key for key in identity | begun if identity.get(key) != begun.get(key)]:
        changed = ", ".join(f"{key} (was {begun.get(key)})" for key in keys)
        raise ValueError(f"{job.run_dir}: its training was begun with another {changed}; choose another run_dir")


def _start_id(job: TrainJob, begun: Mapping[str, Any]) -> str | None:
    """The digest of what `model.start` names, wherever it lies; of weights that are read no more and gone, as begun.

    Runs that were begun before it was written down have none.
    """
    start = job.model.start
    is_gone = not job.reads_start and not (start and storage.exists(start))
    if is_gone or (begun and "start" not in begun):
        return begun.get("start")
    with named("model.start"):
        return _weights_id(job, start) if start else None


def _weights_id(job: TrainJob, start: str) -> str:
    """The digest of gigabytes, which are read once a run: later starts look whether their files are as they were."""
    path = storage.join(job.folder, "start.json")
    files = [[file, storage.fingerprint(file)] for file in network_files(start, "unet")]
    known = storage.read_json(path) if storage.exists(path) else {}
    if known.get("files") != files:
        known = {"files": files, "digest": weights_id(start, "unet")}
        storage.write_json(path, known)
    return known["digest"]
