"""The step of train_gpu.py without jobs/train.py: the UNet alone, and ZeRO-2, DDP and FSDP2 on torch's own launcher.

Run by train_gpu.py, for its parts `bare` and `engines=N`.
"""

import os
import statistics
import subprocess
import sys
import time
from typing import Any

from header import PROJECT, PYTHON

sys.path.insert(0, str(PROJECT))
TINY = "--tiny" in sys.argv
IMAGES, CLIPS = (4, 1) if TINY else (256, 16)  # of a slot
FRAMES, SIZE = (4, 32) if TINY else (16, 256)
SLOTS = 8
STEP = IMAGES + (SLOTS - 1) * CLIPS
UNET = {"block_out_channels": [32, 64], "layers_per_block": 1, "head_dim": 16, "norm_groups": 16, "text_dim": 64}


def inputs(ranks: int, rank: int, dtype: Any) -> list[tuple]:
    """The slots of a rank, each in two micro-batches where engines are compared, so that DDP fits as well: latents,
    timesteps, text and noise."""
    import torch

    device = "cpu" if TINY else "cuda"
    generator = torch.Generator(device).manual_seed(rank)
    draw = {"device": device, "dtype": dtype, "generator": generator}
    slots = [(IMAGES, 1), *[(CLIPS, FRAMES)] * (SLOTS - 1)][rank::ranks]
    if ranks > 1 and not TINY:
        slots = [(count // 2, frames) for count, frames in slots for _ in range(2)]
    batches = []
    for count, frames in slots:
        latents = torch.randn(count, 4, frames, SIZE // 8, SIZE // 8, **draw)
        timesteps = torch.randint(0, 1000, (count,), device=device, generator=generator)
        text = torch.randn(count, 77, UNET["text_dim"] if TINY else 1024, **draw)
        batches.append((latents, timesteps, text, torch.randn_like(latents)))
    return batches


def new_unet(dtype: Any = None) -> Any:
    """Random weights, gates recomputed."""
    import torch

    from t2v.unet import UNet

    with torch.device("cpu" if TINY else "cuda"):
        unet = UNet(config()).to(dtype or torch.float32).train()
    for module in unet.modules():
        if hasattr(module, "keep"):
            module.keep = False
    return unet


def config() -> Any:
    from t2v.config import UNetConfig

    return UNetConfig(**UNET) if TINY else UNetConfig()


def timed(step: Any, repeats: int = 3 if TINY else 6) -> float:
    """Median seconds of a step, after two that warm up."""
    import torch

    times = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        step()
        if not TINY:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def bare() -> float:
    """Seconds of a step of the UNet alone."""
    import torch
    import torch.nn.functional as F

    dtype = torch.float32 if TINY else torch.bfloat16
    unet = new_unet(dtype)
    weights = list(unet.parameters())
    masters = [weight.detach().float().clone() for weight in weights]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=not TINY)
    batches = inputs(1, 0, dtype)

    def step() -> None:
        for latents, timesteps, text, noise in batches:
            F.mse_loss(unet(latents, timesteps, text).float(), noise.float()).backward()
        torch._foreach_copy_([master.grad for master in masters], [weight.grad for weight in weights])
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        for weight in weights:
            weight.grad = None

    return timed(step)


def engine_rank(kind: str) -> None:
    """One rank of a comparison of engines, under torchrun."""
    import torch
    import torch.distributed

    rank = int(os.environ["RANK"])
    torch.backends.cudnn.benchmark = True
    if TINY:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group("gloo" if TINY else "nccl")
    step = {"zero": zero_step, "ddp": ddp_step, "fsdp": fsdp_step}[kind.rstrip("0123")](rank, kind)
    seconds = timed(step)
    if rank == 0:
        world = torch.distributed.get_world_size()
        memory = 0.0 if TINY else torch.cuda.max_memory_allocated() / 2**30
        rate = STEP / seconds
        print(
            f"{kind:<12} {world} GPUs  {rate:7.2f} samples/s  {seconds * 1e3:7.1f} ms a step  memory {memory:.1f} GiB",
            flush=True,
        )
    torch.distributed.destroy_process_group()


def zero_step(rank: int, kind: str) -> Any:
    import torch
    import torch.nn.functional as F

    from t2v.config import TrainConfig
    from t2v.engine import Engine
    from t2v.unet import UNet

    settings = TrainConfig(zero_stage=int(kind[-1]), precision="fp32" if TINY else "bf16", recompute="gates")  # type: ignore[arg-type]
    engine = Engine(UNet(config()), settings, 2 * SLOTS // torch.distributed.get_world_size())
    batches = inputs(torch.distributed.get_world_size(), rank, engine.dtype)

    def step() -> None:
        for latents, timesteps, text, noise in batches:
            loss = F.mse_loss(engine.unet(latents, timesteps, text).float(), noise.float())
            engine.backward(loss, 1 / len(batches) / torch.distributed.get_world_size())
        engine.update(1e-5, 0.999)

    return step


def ddp_step(rank: int, kind: str) -> Any:
    """DistributedDataParallel on bf16 weights, with fp32 masters, moments and average on every rank."""
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    dtype = torch.float32 if TINY else torch.bfloat16
    unet = new_unet(dtype)
    model = DistributedDataParallel(unet, gradient_as_bucket_view=True)
    weights = list(unet.parameters())
    masters = [weight.detach().float().clone() for weight in weights]
    average = [master.clone() for master in masters]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=not TINY)
    batches = inputs(torch.distributed.get_world_size(), rank, dtype)

    def step() -> None:
        for number, (latents, timesteps, text, noise) in enumerate(batches, 1):
            model.require_backward_grad_sync = number == len(batches)
            F.mse_loss(model(latents, timesteps, text).float(), noise.float()).backward()
        gradients = [master.grad for master in masters]
        torch._foreach_copy_(gradients, [weight.grad for weight in weights])
        torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, masters, 1e-3)
            torch._foreach_copy_(weights, masters)
        unet.zero_grad(set_to_none=False)

    return step


def fsdp_step(rank: int, kind: str) -> Any:
    """fully_shard of each level and the whole: fp32 shards, bf16 compute, gradients reduced in fp32; gathered once a
    step (reshard_after_forward off), as ZeRO-2 does."""
    import torch
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.float32 if TINY else torch.bfloat16
    mesh = init_device_mesh("cpu" if TINY else "cuda", (torch.distributed.get_world_size(),))
    unet = new_unet()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    weights = list(unet.parameters())
    average = [weight.detach().to_local().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=not TINY)
    batches = inputs(torch.distributed.get_world_size(), rank, dtype)

    def step() -> None:
        for number, (latents, timesteps, text, noise) in enumerate(batches, 1):
            unet.set_requires_gradient_sync(number == len(batches))
            unet.set_reshard_after_backward(number == len(batches))
            F.mse_loss(unet(latents, timesteps, text).float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [weight.to_local() for weight in weights], 1e-3)
        unet.zero_grad(set_to_none=True)

    return step


def engines(gpus: int) -> None:
    for kind in ("zero2", "ddp", "fsdp"):
        command = [
            PYTHON,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={gpus}",
            __file__,
            kind,
        ]
        done = subprocess.run(
            [*command, *(["--tiny"] if TINY else [])], capture_output=True, text=True, timeout=240, cwd=PROJECT
        )
        print(
            done.stdout.strip() if done.returncode == 0 else f"{kind}: failed\n{_errors(done.stderr)}",
            flush=True,
        )


def _errors(text: str) -> str:
    return "\n".join([line for line in text.splitlines() if "Error" in line][:4]) or text[-2500:]


def print_bare() -> None:
    import torch

    torch.backends.cudnn.benchmark = True
    seconds = bare()
    peak = 0.0 if TINY else torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{'bare':<12} 1 GPU   {STEP / seconds:7.2f} samples/s  {seconds * 1e3:7.1f} ms a step  memory {peak:.1f} GiB"
    )


if __name__ == "__main__":
    kind = sys.argv[1]
    print_bare() if kind == "bare" else engine_rank(kind)
