"""Fail before spending: what is wrong with a training run is told in its first seconds, and what it will do as well."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace

import ray
from ray._private.state import state
from ray.exceptions import RayTaskError

from t2v import storage
from t2v.cards import GIB, Card, find_card
from t2v.job import TrainJob
from t2v.memory import encoders_beside, predict, predict_worst
from t2v.plan import make_plan, sample_flops, size_of

Resources = Mapping[str, float]

ACCELERATOR = "accelerator_type:"  # how Ray names the cards of a cluster among its resources
CPU_FLOPS = 1e12  # that a rehearsal without a GPU may take: some seconds on a few cores


def check(job: TrainJob, resources: Resources) -> list[str]:
    """What a run will do, in lines, or ValueError or FileNotFoundError with the first thing that keeps it from it.

    `resources` are `cluster_resources()`.
    """
    return [line for one in CHECKS for line in one(job, resources)]


def cluster_resources() -> Resources:
    """What the cluster has, or can grow to where it has an autoscaler (whose word Ray Train takes, too)."""
    now, most = ray.cluster_resources(), state.get_max_resources_from_cluster_config() or {}
    return now | {name: max(count, now.get(name, 0)) for name, count in most.items()}


def dry_run(job: TrainJob) -> None:
    """Prints what `check` says, all problems in place of the first, and takes one step on random data on one rank.

    ValueError at the end if there were problems.
    """
    if not ray.is_initialized():
        ray.init()
    resources, problems = cluster_resources(), 0
    for one in (*CHECKS, _rehearsal):
        try:
            lines = one(job, resources)
        except (ValueError, FileNotFoundError) as error:
            problems += 1
            lines = [f"problem: {error}"]
        for line in lines:
            print(f"[train] {line}", flush=True)
    if problems:
        raise ValueError(f"this run cannot train as it is: {problems} problems above")


def _sharing(job: TrainJob, resources: Resources) -> list[str]:
    """Every number of workers that may have to share a step can: the first two have the smallest micro-batches."""
    for world in range(job.train.min_workers or job.train.workers, job.train.workers + 1):
        try:
            for rank in range(min(2, world)):
                job.step.of_rank(rank, world)
        except ValueError as error:
            raise ValueError(f"{error} (with {world} of train.workers)") from None
    return make_plan(job).lines()


def _workers(job: TrainJob, resources: Resources) -> list[str]:
    train = job.train
    workers = train.min_workers or train.workers
    for kind, each in (("GPU", train.gpus_per_worker), ("CPU", train.cpus_per_worker)):
        if workers * each > resources.get(kind, 0):
            key = "train.workers" if train.min_workers is None else "train.min_workers"
            raise ValueError(
                f"{key}: {workers} workers of train.{kind.lower()}s_per_worker {each:g} need {workers * each:g} "
                f"{kind}s, the cluster has {resources.get(kind, 0):g}; add nodes, or set fewer workers"
            )
        beside = sum(source.needs.get(kind, 0) for source in (job.raw or {}).values())
        if workers * each + beside > resources.get(kind, 0) + 1e-6:
            raise ValueError(
                f"train.feed: online needs {beside:g} {kind}s for a download (data.fetch) and an encoder (data.encode) "
                f"of each stream, beside {workers} workers of train.{kind.lower()}s_per_worker {each:g}; the cluster "
                f"has {resources.get(kind, 0):g}; add nodes, or set fewer"
            )
    return [f"{train.workers} workers of {train.gpus_per_worker:g} GPUs and {train.cpus_per_worker} CPUs"]


def _shards(job: TrainJob, resources: Resources) -> list[str]:
    """Shards are there, and of this size, VAE and number of frames; so are the weights that training begins with."""
    text = job.model.text.weights
    if text is None:
        raise ValueError("model.text.weights is not set: give the path of an open_clip checkpoint, or `random`")
    if text != "random" and not storage.exists(text):
        raise FileNotFoundError(f"model.text.weights: there is no file or folder {text}")
    lines = []
    for stream, source in job.sources().items():
        rows = source.rows - job.train.held_out_rows
        if rows < 1:
            raise ValueError(f"train.held_out_rows: {job.train.held_out_rows} are all {stream} that there are")
        seen = job.samples // job.step.total * job.step.samples[stream]
        of = "raw shards: at the least" if job.raw else "shards,"
        lines.append(f"{rows:,} {stream} to train on in {source.shards:,} {of} each seen {seen / rows:.3g} times")
    return lines


def _storage(job: TrainJob, resources: Resources) -> list[str]:
    """The run folder can be written, and has room for the checkpoints that are kept and the one being written.

    Milestones may be moved away while a run goes on, so that they will not fit is told and ends nothing.
    """
    folder = job.folder
    probe = storage.join(folder, "writable")
    try:
        storage.write_json(probe, True)
        storage.remove(probe)
    except OSError as error:
        raise ValueError(f"run_dir: {folder} cannot be written: {error}") from None
    if not storage.is_local(folder):
        return [f"{folder} can be written"]
    plan, local = make_plan(job), storage.local_path(folder)
    wanted = (job.train.keep_checkpoints + 1) * plan.checkpoint_bytes + 2 * plan.model_bytes
    free = shutil.disk_usage(local).free + _bytes_of_checkpoints(local)
    if wanted > free:
        raise ValueError(
            f"train.keep_checkpoints: {job.train.keep_checkpoints} and the next one take {size_of(wanted)}, {folder} "
            f"has {size_of(free)}; keep fewer, or choose a larger run_dir"
        )
    milestones = job.samples // job.train.milestone_every_samples
    coming = milestones - len(storage.folders(storage.join(folder, "milestones")))
    added = max(0, coming) * (plan.checkpoint_bytes + plan.model_bytes)
    lines = [
        f"{size_of(wanted)} of {size_of(free)} for checkpoints; "
        f"{milestones} milestones, of which {max(0, coming)} are to come, add {size_of(added)} by the end"
    ]
    if wanted + added > free:
        lines.append(f"warning: {folder} has no room for all of them; move some away before {size_of(free)} are full")
    return lines


def _bytes_of_checkpoints(folder: str) -> int:
    """What a run that goes on has written there already, and will write over: all but milestones."""
    own = (os.path.join(folder, name) for name in os.listdir(folder) if name != "milestones")
    places = (place for path in own for place in os.walk(path))
    paths = (os.path.join(base, name) for base, _, names in places for name in names)
    return sum(os.lstat(path).st_size for path in paths if os.path.exists(path))


def _memory(job: TrainJob, resources: Resources) -> list[str]:
    """The fullest rank fits the smallest card of the cluster, with the encoders that share its GPU."""
    if not job.train.gpus_per_worker:
        return ["trained on CPUs: GPU memory is of no concern"]
    beside, (workers, parts) = encoders_beside(job), predict_worst(job)
    parts |= beside
    wanted = sum(parts.values())
    told = f"{wanted / GIB:.1f} GiB ({', '.join(f'{name} {size / GIB:.1f}' for name, size in parts.items())})"
    fewer = workers < job.train.workers
    told += f" with {workers} workers" if fewer else ""
    card = _smallest_card(resources)
    if card is None:
        return [f"a rank will need {told}; of this cluster's cards nothing is known"]
    if wanted > card.memory_bytes:
        raise ValueError(
            f"train.mix.micro_frames: {job.train.mix.micro_frames} has a rank need {told}, one {card.name} has "
            f"{card.memory_bytes / GIB:.1f}; lower it{' or data.encode.batch_frames' if beside else ''}, set "
            "train.recompute to gates, or raise train.zero_stage" + (" or train.min_workers" if fewer else "")
        )
    days = make_plan(job).days(card)
    return [f"a rank will need {told} of the {card.memory_bytes / GIB:.1f} of one {card.name}; about {days:.3g} days"]


def _smallest_card(resources: Resources) -> Card | None:
    """None if there is a card of which nothing is known, or no card."""
    found = [find_card(name.removeprefix(ACCELERATOR)) for name in resources if name.startswith(ACCELERATOR)]
    known = [card for card in found if card]
    return min(known, key=lambda card: card.memory_bytes) if known and len(known) == len(found) else None


CHECKS: tuple[Callable[[TrainJob, Resources], list[str]], ...] = (_sharing, _workers, _shards, _storage, _memory)


def _rehearsal(job: TrainJob, resources: Resources) -> list[str]:
    """One step where the cluster has a place for it: as a task, for it needs DeepSpeed and a process of its own."""
    from t2v.rehearsal import largest_slots, rehearse

    slots, cost = largest_slots(job), sample_flops(job)
    what = " and ".join(f"{slot.count} {slot.stream}" for slot in slots)
    gpus = min(1, job.train.gpus_per_worker) if resources.get("GPU") else 0
    alone = replace(job, train=replace(job.train, workers=1, min_workers=None, gpus_per_worker=gpus))
    if not gpus and (flops := sum(slot.count * cost[slot.stream] for slot in slots)) > CPU_FLOPS:
        return [f"no step is rehearsed: {what} are {flops / 1e12:.0f} TFLOP, too many for this cluster without a GPU"]
    card, wanted = _smallest_card(resources), sum(predict(alone, [slots]).values())
    if gpus and card and wanted > card.memory_bytes:
        return [
            f"no step is rehearsed: on one {card.name} alone, with nothing sharded, it needs {wanted / GIB:.0f} GiB"
        ]
    place = ray.remote(rehearse).options(num_gpus=gpus, num_cpus=1, max_retries=0)
    try:
        seconds = ray.get(place.remote(alone, slots))
    except RayTaskError as error:
        raise ValueError(f"the rehearsed step of {what} failed: {error.cause}") from error
    return [f"rehearsed a step of {what} on random data: {seconds:.1f} s, the first of its kind"]
