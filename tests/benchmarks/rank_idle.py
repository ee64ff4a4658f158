"""How long ranks wait under the schedule `rank`, measured: the passes of each rank's step, timed alone on one GPU.

    python tests/benchmarks/rank_idle.py [--tiny]

The published model and a tenth of the batch sizes that the paper prints, with gates recomputed and CUDA graphs, for 4
and 8 ranks. A rank that is done with its passes waits for the slowest before gradients are summed. `packed` is timed
as well: what it pays for smaller micro-batches. `--tiny` shows on a CPU that the script works.
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
TINY = "--tiny" in sys.argv
REPEATS = 5


def make_job(ranks: int, schedule: str) -> Any:
    from t2v.config import DiffusionConfig, MixConfig, ModelConfig, SampleConfig, TextConfig, TrainConfig, UNetConfig
    from t2v.job import TrainJob

    sizes = (16, 28) if TINY else (140, 320)  # the paper's image GPU has 1,400 at all, its others 3,200
    micro_frames = 32 if TINY else 256
    mix = MixConfig(
        slots=8, images_per_step=sizes[0], videos_per_step=sizes[1], micro_frames=micro_frames, schedule=schedule
    )
    train = TrainConfig(workers=ranks, gpus_per_worker=0 if TINY else 1, mix=mix, recompute="gates", graphs=not TINY)
    text, unet = TextConfig("random"), UNetConfig()
    if TINY:
        train.precision, text = "fp32", TextConfig("random", width=16, heads=2, layers=2)
        unet = UNetConfig(block_out_channels=[16, 32], layers_per_block=1, head_dim=8, text_dim=16, norm_groups=8)
    model = ModelConfig(unet, text=text)
    return TrainJob("", 0, 32 if TINY else 256, 16, model, DiffusionConfig(), train, SampleConfig())


def passes_of(job: Any) -> Any:
    """A function that gives the seconds of the passes of some micro-batches, once their kernels are found."""
    import torch

    from t2v.engine import Engine
    from t2v.graphs import Graphs
    from t2v.unet import UNet

    engine = Engine(UNet(job.model.unet), replace(job.train, workers=1), 2)  # two: gradients are summed in fp32
    dim = job.model.unet.text_dim

    def run(latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        loss = engine.unet(latents, timesteps, text).float().square().mean()
        engine.backward(loss, 1.0)
        return loss.detach()

    def seconds(slots: tuple) -> float:
        batches = []
        for slot in slots:
            frames, size = job.frames_of(slot.stream), job.size // 8
            draw = {"device": engine.device, "dtype": engine.dtype}
            latents = torch.randn(slot.count, job.model.unet.channels, frames, size, size, **draw)
            text = torch.randn(slot.count, 77, dim, **draw)
            batches.append((latents, torch.full((slot.count,), 9, device=engine.device), text))
        graphs, times = Graphs(run, 2 * len(batches)), []
        for _ in range(3 + REPEATS):
            begun = time.perf_counter()
            for batch in batches:
                graphs(*batch)
            if engine.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return statistics.median(times[3:])

    return seconds


def main() -> None:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("LOCAL_RANK", "0")
    import torch
    import torch.distributed
    from header import header

    print(header(), flush=True)
    if not TINY:
        print(f"device    {torch.cuda.get_device_name()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo" if TINY else "nccl", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        compare(passes_of(make_job(4, "rank")))
        torch.distributed.destroy_process_group()


def compare(seconds: Any) -> None:
    """Prints what the passes of each unlike rank take, and what share of their time all would wait."""
    from t2v.plan import sample_flops

    for ranks in (4, 8):
        slowest = {}
        for schedule in ("rank", "packed"):
            job, times = make_job(ranks, schedule), {}
            of_ranks = [job.step.of_rank(rank, ranks) for rank in range(ranks)]
            kinds = [tuple((slot.stream, slot.count) for slot in slots) for slots in of_ranks]
            for kind, slots in zip(kinds, of_ranks, strict=True):
                if kind not in times:
                    times[kind] = seconds(slots)
                    what = ", ".join(f"{count} {stream}" for stream, count in kind)
                    print(
                        f"{schedule:<7} {ranks} ranks  {times[kind]:.3f} s  {kinds.count(kind)} x ({what})", flush=True
                    )
            slowest[schedule] = max(times.values())
            idle = 1 - sum(times[kind] for kind in kinds) / (slowest[schedule] * ranks)
            print(
                f"{schedule:<7} {ranks} ranks  idle {idle:.1%} measured, "
                f"{job.step.idle_share(ranks, sample_flops(job)):.1%} predicted",
                flush=True,
            )
        print(f"packed  {ranks} ranks  its passes take {slowest['packed'] / slowest['rank']:.1%} of rank's", flush=True)


if __name__ == "__main__":
    main()
