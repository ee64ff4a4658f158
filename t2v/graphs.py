"""A micro-batch's passes as one CUDA graph, which the host launches with one call.

Kernel by kernel the published UNet's passes take the host 0.36 s, however small the micro-batch: as long as an H100
takes for 140 frames (tests/benchmarks/results/launches.txt).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Graphs:
    """Calls `run` with tensors, `warm` times, and from then on replays what it launches for tensors of the same shapes.

    `run` returns a tensor without a gradient, and launches the same for equal shapes, without waiting for the GPU. The
    first calls must have all shapes twice: they find kernels, and their memory is not yet a graph's. What a call
    returns is overwritten by the next one. All graphs share the memory of what is freed within them, and keep it.
    On a CPU there is nothing to replay.
    """

    def __init__(self, run: Callable[..., Tensor], warm: int) -> None:
        self._run, self._warm = run, warm
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._pool: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._warm -= 1
        if self._warm >= 0 or not inputs[0].is_cuda:
            return self._run(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture(inputs)
        graph, held, result = self._graphs[shapes]
        torch._foreach_copy_(held, inputs)
        graph.replay()
        return result

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        held = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()  # not the default one, which cannot be captured (t2v/engine.py)
        # Other threads read data and write checkpoints meanwhile, and may.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = self._run(*held)
        return graph, held, result
