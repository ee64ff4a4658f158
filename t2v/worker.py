"""Training on Ray Train: starts the ranks, keeps their checkpoints, and starts them anew after what clusters do."""

import os
import platform
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointConsistencyMode,
    CheckpointUploadMode,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
    ValidationConfig,
    ValidationTaskConfig,
)
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer

from t2v import storage
from t2v.checkpoint import furthest_first, is_copy, newest_first
from t2v.checks import check, cluster_resources
from t2v.config import Stream
from t2v.epochs import begin_anew
from t2v.gauges import Gauges
from t2v.identity import keep_identity
from t2v.job import TrainJob
from t2v.news import needs_of_worker, news
from t2v.published import start_weights
from t2v.watch import Pulse, Watch

if TYPE_CHECKING:
    from t2v.engine import Staged
    from t2v.online import Tables
    from t2v.record import Record

PREVIEW_GRACE_S = 180.0  # for the samples of a milestone to be drawn, waiting for a free GPU included
NAME_GRACE_S = 30.0  # for Ray to notice that a job which was killed is gone
HOPELESS = (ValueError, ArithmeticError, FileNotFoundError, ImportError)  # the same data would meet them again
NOTHING_YET_S = 0.5
# Called with prompts and the samples of a milestone: a task that shows it, whose result is its losses by name.
OnExport = Callable[[TrainJob, list[str], int], ray.ObjectRef]
# Rank 0 calls it with the number of ranks and of raw shards begun: an actor a stream, whose `next()` gives references
# to the tables that come next, to whichever rank asks.
Encode = Callable[[TrainJob, int, Mapping[Stream, int]], dict[Stream, ray.actor.ActorHandle]]


def fit(job: TrainJob, on_export: OnExport, encode: Encode | None = None) -> None:
    """Trains until `train.samples`, from the run folder's newest checkpoint if it has one.

    `encode` starts what `train.feed: online` trains on, whenever ranks are started (pipelines/online.py).

    SIGTERM has all ranks write a checkpoint and end. ValueError if data, cluster and job do not go together
    (t2v/checks.py), the folder was begun as another run (t2v/identity.py), or another job trains in it; Diverged
    (t2v/trainer.py).
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # which prints every line of a rank twice
    if not ray.is_initialized():
        ray.init()
    for line in check(job, cluster_resources()):
        print(f"[train] {line}", flush=True)
    if job.is_fresh and job.model.start and storage.is_local(job.model.start):
        # Mapped, not read: it tells here whether they fit.
        start_weights(job.model.start, job.model.unet, whole=job.train.trained == "lora")
    keep_identity(job)
    with _watched(job) as watch:
        storage.sweep(job.folder)
        if job.is_fresh and not job.raw:
            begin_anew(job)
        _supervise(job, watch, on_export, encode)
    samples, furthest = _furthest(job)[0]
    if samples < job.samples:
        print(f"[train] stopped as asked at {samples:,}/{job.samples:,} samples; the same command goes on", flush=True)
    elif job.exported_samples < samples:  # its validation failed
        _export(job, furthest, samples)


def _supervise(job: TrainJob, watch: Any, on_export: OnExport, encode: Encode | None) -> None:
    """Runs Ray Train; what becomes of ranks is for it to see, and here what becomes of itself."""
    failures, furthest = 0, _furthest(job)
    while True:
        _mend_registry(job)
        try:
            _trainer(job, watch, on_export, encode).fit()
            return
        except ControllerError as error:
            if isinstance(error.controller_failure, HOPELESS + (RuntimeError,)):
                raise error.controller_failure from None
            raise
        except RayActorError:
            before, furthest = furthest, _furthest(job)
            failures = failures + 1 if furthest == before else 1
            if failures > job.train.max_failures:
                raise
            print("[train] Ray Train's controller died; it is started anew", flush=True)
            time.sleep(_back_off_s(failures - 1))


def _trainer(job: TrainJob, watch: Any, on_export: OnExport, encode: Encode | None) -> TorchTrainer:
    train = job.train
    on_gpu = train.gpus_per_worker > 0
    return TorchTrainer(  # type: ignore[call-arg]  # a checker sees the trainer of Ray Train's first version
        _work,
        train_loop_config={"job": job, "watch": watch, "encode": encode},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=(train.min_workers, train.workers) if train.min_workers else train.workers,  # type: ignore[arg-type]
            use_gpu=on_gpu,
            resources_per_worker=needs_of_worker(train),
            elastic_resize_monitor_interval_s=train.grow_every_s,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="train",
            **_place(job.run_dir),
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
            failure_config=FailureConfig(max_failures=-1),  # _Failures counts them, from checkpoint to checkpoint
            worker_runtime_env={"env_vars": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}},
            callbacks=[_Failures(train.max_failures)],  # type: ignore[list-item]
        ),
        validation_config=ValidationConfig(
            partial(_validate, job=job, watch=watch, on_export=on_export),
            ray_remote_kwargs={"num_cpus": 0, "max_retries": 0},
        ),
    )


def _place(run_dir: str) -> dict[str, Any]:
    """Where Ray Train keeps its notes: on the client of all other files, since Arrow's own know fewer URLs."""
    if storage.is_local(run_dir):
        return {"storage_path": run_dir}
    filesystem, inner = storage.resolve(run_dir)
    return {"storage_path": inner, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}


def _work(settings: dict) -> None:
    """What runs on every rank."""
    from t2v.trainer import Trainer  # DeepSpeed and the text tower: the driver does without them

    job: TrainJob = settings["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if not job.train.gpus_per_worker:
        torch.set_num_threads(job.train.cpus_per_worker)
    checkpoints = broadcast_from_rank_zero(_checkpoints(job) if rank == 0 else None)
    with closing(Pulse(settings["watch"], rank, world)) as pulse:
        trainer = Trainer(job, rank, world, checkpoints, _Host(job, pulse, settings["encode"]))
        status = "FAILED"
        try:
            with _node_metrics(job, trainer.record, context.get_local_rank()):
                trainer.run()
            status = "FINISHED" if trainer.samples >= job.samples else "KILLED"
        finally:
            trainer.close(status)


@contextmanager
def _node_metrics(job: TrainJob, record: "Record | None", local_rank: int) -> Iterator[None]:
    """Has one rank of each machine tell how the machine fares."""
    if local_rank:
        yield
        return
    from t2v.node_metrics import NodeMetrics
    from t2v.record import Record

    own = record or Record(job.run_dir, "train", {})
    try:
        with closing(NodeMetrics(own, platform.node())):
            yield
    finally:
        if own is not record:
            own.close(timeout_s=5)


class _Host:
    """What surrounds a rank (t2v/trainer.py)."""

    def __init__(self, job: TrainJob, pulse: Pulse, encode: Encode | None) -> None:
        self._job, self._pulse, self._encode = job, pulse, encode
        self._encoding: Mapping[Stream, ray.actor.ActorHandle] = {}
        self.observe = Gauges().set

    def report(self, staged: "Staged", samples: int, milestone: bool) -> None:
        """Has Ray Train write a checkpoint in a thread of its own, and commit it once all ranks have."""
        place = ray.train.get_context().get_storage()

        def write(_: Checkpoint, name: str) -> Checkpoint:
            staged.write(storage.join(self._job.folder, name))
            return Checkpoint(f"{place.experiment_fs_path}/{name}", place.storage_filesystem)

        ray.train.report(
            {"samples": samples},
            checkpoint=Checkpoint(tempfile.gettempdir()),  # it wants a folder; `write` does without
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=write,
            validation=ValidationTaskConfig({"samples": samples}) if milestone else False,
        )

    def tables(self, begun: Mapping[Stream, int]) -> Mapping[Stream, "Tables"]:
        """Has rank 0 start the encoders, which end with it.

        Ray Train would split a dataset into as many rows for each rank, whether they need as many or not: one that
        does not take its own would hold up another that waits, and all of them in their collectives.
        """
        context, encode = ray.train.get_context(), self._encode
        own = encode(self._job, context.get_world_size(), begun) if encode and context.get_world_rank() == 0 else None
        self._encoding = broadcast_from_rank_zero(own)
        return {stream: _tables(encoding) for stream, encoding in self._encoding.items()}

    def beat(self, samples: int) -> None:
        self._pulse.samples = samples

    def wants_stop(self) -> bool:
        return self._pulse.wants_stop

    def news(self) -> str:
        context, info = ray.train.get_context(), ray.train.get_preemption_info()
        if not info and self._job.train.min_workers is None:
            return ""  # on all ranks, without asking them
        lost, deadline_ms = (info.preempted_ranks, info.deadline_ms) if info else ([], None)
        told = None
        if context.get_world_rank() == 0:  # by its clock, and by what it sees of the cluster
            told = news(self._job.train, context.get_world_size(), lost, deadline_ms and deadline_ms / 1000)
        return broadcast_from_rank_zero(told)


def _tables(encoding: ray.actor.ActorHandle) -> "Tables":
    """The tables that an actor gives to this rank, of which the next one is always asked for; None while it waits."""
    coming: ray.ObjectRef = encoding.next.remote()
    while True:
        if not ray.wait([coming], timeout=NOTHING_YET_S)[0]:
            yield None
            continue
        references = ray.get(coming)
        coming = encoding.next.remote()
        for reference in references:
            yield ray.get(reference)


class _Failures(UserCallback):
    """Waits ever longer before ranks are started anew, and gives up where that cannot help; in Ray's controller."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        self._count = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises what ends the run: a mistake that would be met again, or one failure too many."""
        causes = [getattr(error, "_base_exc", error) for error in worker_exceptions.values()]
        for cause in causes:
            if isinstance(cause, HOPELESS):
                raise cause
        self._count += 1
        what = f"{type(causes[0]).__name__}: {str(causes[0]).strip().splitlines()[0] if str(causes[0]) else ''}"
        if self._count > self._most:
            raise RuntimeError(f"{self._count} failures without a new checkpoint between them; the last one: {what}")
        wait = _back_off_s(self._count - 1)
        print(f"[train] rank {next(iter(worker_exceptions))} failed ({what[:200]}); anew in {wait:.0f} s", flush=True)
        time.sleep(wait)


def _back_off_s(failures: int) -> float:
    return min(60.0, 2.0**failures)


def _furthest(job: TrainJob) -> list[tuple[int, str]]:
    """Samples and folder of the checkpoint that a run goes on from, if there is one."""
    return furthest_first(job.folder, lambda problem: None)[:1]


def _checkpoints(job: TrainJob) -> list[str]:
    """What there is to go on from, the furthest first; removes what Ray Train has lost sight of and nobody needs."""
    reported = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
    known = {str(entry.checkpoint.path).rstrip("/").rsplit("/", 1)[-1] for entry in reported}
    found = furthest_first(job.folder, lambda problem: print(f"[train] skipped a checkpoint: {problem}", flush=True))
    whole = [folder for _, folder in found]
    kept = {folder for folder in whole if is_copy(folder)} | set(whole[: job.train.keep_checkpoints])
    lost = {folder for folder in newest_first(job.folder) if folder.rsplit("/", 1)[-1] not in known} - kept
    for folder in lost:
        storage.remove_folder(folder)
    return [folder for folder in whole if folder not in lost]


def _validate(checkpoint: Checkpoint, job: TrainJob, watch: Any, on_export: OnExport, samples: int) -> dict[str, float]:
    """What becomes of a milestone, in a task of its own: its model is exported, and what it can do is shown."""
    from t2v import validation

    folder = storage.join(job.folder, checkpoint.path.rstrip("/").rsplit("/", 1)[-1])
    if samples < job.samples:
        validation.keep(job, folder, samples)
    _export(job, folder, samples)
    preview = on_export(job, job.prompts(), samples)
    try:
        losses = ray.get(preview, timeout=PREVIEW_GRACE_S)
        watch.observe.remote(losses)
        return losses
    except GetTimeoutError:
        ray.cancel(preview, force=True)
        print(f"[train] no room was free in {PREVIEW_GRACE_S:.0f} s to sample the model of {samples:,} samples")
    return {}


def _export(job: TrainJob, checkpoint: str, samples: int) -> None:
    """Exports the model of a checkpoint, and registers it."""
    from t2v import validation
    from t2v.record import Record

    validation.export(job, checkpoint, samples)
    with closing(Record(job.run_dir, "train", {})) as record:
        record.model(validation.model_of(job, samples), samples)


@contextmanager
def _watched(job: TrainJob) -> Iterator[Any]:
    """A Watch, of which there is one a run folder; SIGTERM asks it to stop all ranks."""
    name = f"train {job.run_dir}"
    deadline = time.monotonic() + NAME_GRACE_S
    while True:
        try:
            watch = Watch.options(name=name, namespace="t2v").remote(job.train.hang_s)  # type: ignore[attr-defined]
            break
        except ValueError:
            if time.monotonic() > deadline:
                raise ValueError(f"{job.run_dir}: another job of this cluster trains here; stop it first") from None
            time.sleep(1)

    def stop(number: int, frame: Any) -> None:
        print("[train] asked to stop: all ranks write a checkpoint", flush=True)
        watch.stop.remote()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield watch
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.kill(watch)


def _mend_registry(job: TrainJob) -> None:
    """Removes Ray Train's note of its checkpoints if it could not start with it.

    A kill can leave it half-written, another version writes another one, and a folder that it names can be gone. The
    checkpoints themselves tell what they are.
    """
    if not storage.exists(job.registry):
        return
    try:
        note = storage.read_json(job.registry)
        names = [entry["checkpoint_dir_name"] for entry in note["checkpoint_results"]]
        gone = [name for name in names if not storage.exists(storage.join(job.folder, name))]
        problem = f"it names {gone[0]}, which is gone" if gone else ""
        if note["ray_version"] != ray.__version__:
            problem = f"Ray {note['ray_version']} has written it"
    except (ValueError, KeyError, TypeError) as error:
        problem = str(error)
    if problem:
        print(f"[train] Ray Train's list of checkpoints is begun anew: {problem}", flush=True)
        storage.remove(job.registry)
