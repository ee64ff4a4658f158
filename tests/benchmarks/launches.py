"""What the host costs: a micro-batch's forward and backward pass launched kernel by kernel, and as one CUDA graph.

    python tests/benchmarks/launches.py            (one GPU)
    python tests/benchmarks/launches.py --tiny     (on a CPU, to see that it runs: nothing is captured there)

The published UNet in bf16 with gates recomputed, random inputs. The first table is of one picture and one clip so
small that a GPU waits for nearly every kernel: what is left is what Python and PyTorch need, and where.
"""

import cProfile
import pstats
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from header import header
from train_engines import TINY, UNET, new_unet
from train_engines import config as unet_config

SHAPES = [(1, 4, 8), (1, 1, 8)] if TINY else [(1, 16, 8), (1, 1, 8)]  # samples, frames, latent size
FULL = [] if TINY else [(b, f, 32) for frames in (64, 128, 256) for b, f in ((frames // 16, 16), (frames, 1))]
REPEATS = 3 if TINY else 8
DEVICE = "cpu" if TINY else "cuda"


def micro_batch(unet: Any, samples: int, frames: int, size: int) -> Callable[[], None]:
    """One forward and backward pass, which adds to the weights' gradients."""
    dtype = next(unet.parameters()).dtype
    latents = torch.randn(samples, 4, frames, size, size, device=DEVICE, dtype=dtype)
    text = torch.randn(samples, 77, UNET["text_dim"] if TINY else 1024, device=DEVICE, dtype=dtype)
    timesteps, noise = torch.full((samples,), 500, device=DEVICE), torch.randn_like(latents)
    return lambda: F.mse_loss(unet(latents, timesteps, text).float(), noise.float()).backward()


def wait() -> None:
    if not TINY:
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object]) -> tuple[float, float]:
    """Of one run: until the host has launched it, and until it is done; the least of several."""
    times = []
    for _ in range(REPEATS):
        wait()
        begun = time.perf_counter()
        run()
        launched = time.perf_counter()
        wait()
        times.append((1e3 * (launched - begun), 1e3 * (time.perf_counter() - begun)))
    return min(launched for launched, _ in times), min(done for _, done in times)


def capture(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph


def profile(run: Callable[[], None]) -> None:
    """Where the host's time goes, by Python's functions; the backward pass runs in this thread for it."""
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        run()
        wait()
        profiler.enable()
        for _ in range(REPEATS):
            run()
        profiler.disable()
        wait()
    stats = pstats.Stats(profiler)
    print(f"  {sum(row[0] for row in stats.stats.values()) // REPEATS:,} calls of functions a run, the longest:")
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:25]  # type: ignore[attr-defined]
    for (file, line, name), (_, calls, own, _, _) in rows:
        where = f"{'/'.join(file.split('/')[-2:])}:{line} {name}"
        print(f"  {1e3 * own / REPEATS:7.2f} ms  {calls / REPEATS:7.0f} calls  {where}")


def main() -> None:
    print(header(), flush=True)
    torch.backends.cudnn.benchmark = True
    unet = new_unet(torch.float32 if TINY else torch.bfloat16)
    print(f"{sum(weight.numel() for weight in unet.parameters()):,} parameters of {unet_config().block_out_channels}")
    for weight in unet.parameters():
        weight.grad = torch.zeros_like(weight)
    pool, graphs = None if TINY else torch.cuda.graph_pool_handle(), []
    for samples, frames, size in SHAPES + FULL:
        run = micro_batch(unet, samples, frames, size)
        for _ in range(2):
            run()
        launched, done = milliseconds(run)
        line = f"{samples:3} x {frames:2} frames of {8 * size:3}: launched in {launched:6.1f} ms, done in {done:6.1f}"
        if not TINY:
            before, begun = torch.cuda.memory_reserved(), time.perf_counter()
            graph = capture(run, pool)
            seconds = time.perf_counter() - begun
            _, replayed = milliseconds(graph.replay)
            gib = (torch.cuda.memory_reserved() - before) / 2**30
            line += f"; as a graph {replayed:6.1f} ms, captured in {seconds:.1f} s, {gib:.1f} GiB more reserved"
            graphs.append(graph)  # a pool lives as long as one of its graphs
        print(line, flush=True)
        if size == 8:
            profile(run)


if __name__ == "__main__":
    main()
