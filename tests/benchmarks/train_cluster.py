"""Clusters that lose things while training runs on them: nodes, nodes after a notice, the head; and that grow.

Every node is a raylet of its own on this machine; the head has no room for ranks, so that it outlives them.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import psutil
from header import PROJECT, PYTHON
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient
from train_runs import (
    ARGUMENTS,
    STEP,
    command,
    compare_losses,
    compare_weights,
    finish,
    new_run,
    prepare,
    seen,
    start,
    starts,
    train,
    wait_for,
    wait_for_steps,
)

NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}
RUN = {"train.samples": STEP * 80, "train.checkpoint_every_samples": STEP * 5, "train.milestone_every_samples": 10**9}
ELASTIC = {"train.min_workers": 1, "train.grow_every_s": 45}
RARE = {"train.checkpoint_every_samples": 10**9}
NOTICE_S = 90


def make_cluster(folder: Path, nodes: int, **head: Any) -> tuple[Cluster, list[Any]]:
    """A head and nodes of room for one rank each, and the data to train on."""
    if not (folder / "prepared").exists():
        cluster = Cluster(initialize_head=True, head_node_args=ARGUMENTS)
        prepare(folder, cluster.address)
        cluster.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args=ARGUMENTS | {"num_cpus": 0} | head)
    return cluster, [cluster.add_node(**NODE) for _ in range(nodes)]


def holds_a_rank(node: Any) -> bool:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("RayTrainWorker" in " ".join(child.cmdline()) for child in raylet.children(recursive=True))


def nodes(folder: Path) -> None:
    """Nodes that hold a rank go without a word, and others come."""
    cluster, room = make_cluster(folder, nodes=3)
    changes = RUN | {"train.workers": 3}
    undisturbed, run = train(folder, "undisturbed-3", cluster.address, changes), new_run(folder, "nodes")
    process = start("train", run, cluster.address, changes)
    for pause_s in (0, 10, 30):
        assert wait_for_steps(run, process, number=8), "ended too early"
        lost = next(node for node in room if holds_a_rank(node))
        cluster.remove_node(lost, allow_graceful=False)
        begun = time.monotonic()
        print(f"  a node with a rank killed at {seen(run):,} samples; another comes after {pause_s} s", flush=True)
        time.sleep(pause_s)
        room[room.index(lost)] = cluster.add_node(**NODE)
        assert wait_for(run, process, "at the start")
        gone_s = time.monotonic() - begun
        print(f"  training went on {gone_s:.0f} s after the loss, from {starts(run)[-1]['samples']:,}", flush=True)
    finish(process, run)
    compare_weights(undisturbed, run)
    cluster.shutdown()


def drain(cluster: Cluster, node: Any, deadline_s: int) -> None:
    """Gives a node's notice to Ray, as what watches a cloud's machines does."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away"]
    where = ["--address", cluster.address, "--node-id", node.node_id, "--deadline-remaining-seconds", str(deadline_s)]
    ray = str(Path(PYTHON).with_name("ray"))
    subprocess.run([ray, "drain-node", *where, *reason], check=True, capture_output=True, timeout=60)


def notice(folder: Path) -> None:
    """A node is announced to go, and goes; no checkpoint is due, save by the notice: at once, and late in it."""
    cluster, room = make_cluster(folder, nodes=3)
    changes = RUN | {"train.workers": 2, "train.samples": STEP * 250}
    undisturbed, run = train(folder, "undisturbed-2", cluster.address, changes), new_run(folder, "notice")
    process = start("train", run, cluster.address, changes | RARE)
    assert wait_for_steps(run, process, number=12)
    lost = next(node for node in room if holds_a_rank(node))
    drain(cluster, lost, deadline_s=NOTICE_S)
    begun, told = time.monotonic(), seen(run)
    for shares in (2, 4):  # of two ranks
        while len(list(run.glob("train/checkpoint_*/rank-*.json"))) < shares:
            time.sleep(0.1)
            assert time.monotonic() - begun < 60, "no checkpoint came"
        took = time.monotonic() - begun
        print(f"  notice at {told:,} samples, checkpoint whole {took:.1f} s later, at {seen(run):,}", flush=True)
    while time.monotonic() - begun < NOTICE_S and len(starts(run)) < 2:
        time.sleep(0.2)
    reached = seen(run)
    cluster.remove_node(lost, allow_graceful=False)
    print(f"  the node goes {time.monotonic() - begun:.0f} s after the notice, at {reached:,} samples", flush=True)
    if len(starts(run)) < 2:
        assert wait_for(run, process, "at the start")
    seconds, again = time.monotonic() - begun, starts(run)[-1]
    print(
        f"  training went on {seconds:.0f} s after the notice, from {again['samples']:,}: "
        f"{reached - again['samples']:,} samples trained again",
        flush=True,
    )
    finish(process, run)
    compare_weights(undisturbed, run)
    cluster.shutdown()


def elastic(folder: Path) -> None:
    """Training begins with the room there is, grows with the cluster and shrinks with it."""
    cluster, room = make_cluster(folder, nodes=1)
    alone = train(folder, "undisturbed-1", cluster.address, RUN | {"train.workers": 1})
    run, changes = new_run(folder, "elastic"), RUN | {"train.workers": 3} | ELASTIC
    process = start("train", run, cluster.address, changes)
    assert wait_for_steps(run, process, number=8)
    for what in ("added", "added", "killed"):
        begun, reached = time.monotonic(), seen(run)
        if what == "added":
            room.append(cluster.add_node(**NODE))
        else:
            cluster.remove_node(room.pop(0), allow_graceful=False)
        assert wait_for(run, process, "at the start")
        again = starts(run)[-1]
        print(
            f"  a node {what} at {reached:,} samples: {again['ranks']} ranks go on {time.monotonic() - begun:.0f} s "
            f"later from {again['samples']:,}",
            flush=True,
        )
        assert wait_for_steps(run, process, number=8)
    finish(process, run)
    compare_losses(alone, run)
    cluster.shutdown()


def head(folder: Path) -> None:
    """The head goes and with it the cluster, the submitted driver too; a new one gets the same command."""
    changes = RUN | {"train.workers": 2}
    cluster, _ = make_cluster(folder, nodes=2)
    undisturbed, run = train(folder, "undisturbed-2", cluster.address, changes), new_run(folder, "head")
    cluster.shutdown()
    cluster, room = make_cluster(folder, nodes=2, include_dashboard=True)
    follow(submit(cluster, run, changes), run, until=20 * STEP)
    lost = [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in (cluster.head_node, *room)]
    lost = [child for raylet in lost for child in raylet.children(recursive=True)]
    ranks = [process for process in lost if "RayTrainWorker" in process.name()]
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    print(f"  head killed at {seen(run):,} samples", flush=True)
    begun = time.monotonic()
    for what, each in {"ranks": ranks, "processes of Ray": lost}.items():  # agents stay a minute longer than all others
        while any(map(is_alive, each)) and time.monotonic() - begun < 180:
            time.sleep(0.5)
        left = sum(map(is_alive, each))
        print(f"  {left} of its {len(each)} {what} are left {time.monotonic() - begun:.0f} s later", flush=True)
    cluster.shutdown()
    cluster, _ = make_cluster(folder, nodes=2, include_dashboard=True)
    follow(submit(cluster, run, changes), run, until=RUN["train.samples"])
    print(f"  the same command on a new cluster went on from {starts(run)[-1]['samples']:,} samples", flush=True)
    compare_weights(undisturbed, run)
    cluster.shutdown()


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def submit(cluster: Cluster, run: Path, changes: dict[str, float]) -> Callable[[], str]:
    """What `ray job submit` does; returns what tells the job's status."""
    client = JobSubmissionClient(f"http://{cluster.webui_url}")
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    for _ in range(60):
        try:
            line = shlex.join(command("train", str(run), changes))
            job = client.submit_job(
                entrypoint=f"cd {PROJECT} && {line} >> {run}/log.txt 2>&1", runtime_env={"env_vars": environment}
            )
            return lambda: str(client.get_job_status(job))
        except RuntimeError:  # the agent that takes jobs is still starting
            time.sleep(1)
    raise AssertionError("no job was taken")


def follow(status: Callable[[], str], run: Path, until: int) -> None:
    """Waits for the log to tell of so many samples, or for the job's end."""
    while seen(run) < until or until == RUN["train.samples"]:
        time.sleep(1)
        assert (now := status()) != "FAILED", f"failed, see {run}/log.txt"
        if now == "SUCCEEDED":
            return


def s3(folder: Path) -> None:
    """All of a run is in a bucket; a rank and the driver are killed; then the model makes a clip."""
    from moto.server import ThreadedMotoServer

    sys.path.insert(0, str(PROJECT))
    from tests.t2v.mlflow_server import Server

    store, mlflow = ThreadedMotoServer("127.0.0.1", 0, verbose=False), Server(Path(tempfile.mkdtemp()))
    store.start()
    mlflow.start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # every request
    address, port = store.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{address}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "MLFLOW_TRACKING_URI": mlflow.uri}
    cluster, _ = make_cluster(folder, nodes=2)
    changes = RUN | {"train.workers": 2, "train.milestone_every_samples": STEP * 40}
    undisturbed, copy, run = train(folder, "undisturbed-2", cluster.address, changes), folder / "s3", "s3://bucket/run"
    shutil.rmtree(copy, ignore_errors=True)
    bucket = fsspec.filesystem("s3", use_listings_cache=False)
    bucket.mkdir("bucket")
    bucket.put(f"{folder}/prepared/data", f"{run}/data", recursive=True)
    process = start("train", copy, cluster.address, changes, run)
    assert wait_for_steps(copy, process, number=12)
    next(each for each in psutil.Process().children(recursive=True) if "RayTrainWorker" in each.name()).kill()
    print(f"  a rank killed at {seen(copy):,} samples", flush=True)
    assert wait_for(copy, process, "at the start")
    assert wait_for_steps(copy, process, number=12)
    process.kill()
    process.wait()
    print(f"  the driver killed at {seen(copy):,} samples", flush=True)
    finish(start("train", copy, cluster.address, changes, run), copy)
    prompts = copy / "prompts.txt"
    prompts.write_text("a red circle moves left\n")
    finish(start("generate", copy, cluster.address, {"prompts": str(prompts), "sample.cpus_per_worker": 1}, run), copy)
    bucket.get(f"{run}/train", f"{copy}/train", recursive=True)
    print(f"  ranks were started from {[begun['samples'] for begun in starts(copy)]} samples")
    for part in ("train/checkpoint_*/*", "train/milestones/**", "train/model/**", "train/*.json*", "samples/**"):
        print(f"  {part}: {sum(not name.endswith('/') for name in bucket.glob(f'{run}/{part}'))} objects")
    compare_weights(undisturbed, copy)
    compare_losses(undisturbed, copy)
    cluster.shutdown()
    mlflow.stop()
    store.stop()


MODES: dict[str, Callable[[Path], None]] = {
    "nodes": nodes,
    "notice": notice,
    "elastic": elastic,
    "head": head,
    "s3": s3,
}
