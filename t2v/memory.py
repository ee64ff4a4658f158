"""How much GPU memory a rank will need, predicted: a run that does not fit should not begin.

Two moments can be the fullest: the start of a backward pass, when all that the forward pass kept is still there, and
the optimizer's step, when all gradients are. DeepSpeed's share is as its version in pyproject.toml allocates it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from t2v.cards import GIB
from t2v.config import TextConfig, TrainConfig, UNetConfig
from t2v.cost import NARROW, WIDE, unet_cost, widest_tensor
from t2v.job import TrainJob
from t2v.lora import adapted_weights, choose_trained, trained_shapes
from t2v.mix import Slot
from t2v.unet import UNet

BUCKET = 500_000_000  # gradients that ZeRO-3 reduces at once
GATHERED = 1_000_000_000  # weights that ZeRO-3 holds at most beside its own
VOCABULARY = 49_408
RESERVE = 3 * GIB  # for CUDA's context, NCCL's buffers, and what the allocator and convolutions need to be fast
# Of a VAE that encodes: frames at full resolution in the first level's width that are there at once. Plain PyTorch has
# six in a residual block; a GPU's kernels have four (the block's input, what its second norm reads and makes, and the
# product), which leaves two for the allocator and convolutions. With CUDA's context, which was set by it, an H100 took
# 7.43 of 7.47 GiB; were all frames of a batch to overflow fp16 and to be encoded once more in fp32, they would need
# more.
ENCODER_TENSORS = 6
ENCODER_CONTEXT = GIB  # of CUDA, since an encoder is a process of its own


def predict_worst(job: TrainJob) -> tuple[int, dict[str, float]]:
    """With how many workers, of all numbers that may have to do, a rank needs most, and what it then needs."""
    counts, train = count_weights(job.model.unet, job.train), job.train
    needs = {
        workers: predict(replace(job, train=replace(train, workers=workers)), counts=counts)
        for workers in range(train.min_workers or train.workers, train.workers + 1)
    }
    return max(needs.items(), key=lambda need: sum(need[1].values()))


def predict(
    job: TrainJob, ranks: Sequence[Sequence[Slot]] | None = None, counts: tuple[int, int, int] | None = None
) -> dict[str, float]:
    """Bytes of each part of the fullest rank's memory, at its fullest moment; together they are what a card must have.

    `ranks` are the micro-batches of each rank where they are not those that the job gives them, `counts` what
    `count_weights` has told.

    All but `reserve` is what torch.cuda.max_memory_allocated will say; with `graphs`, which keep the memory of their
    activations, it says less than they are. With `precision: fp32` it is a lower bound: the kernels for attention,
    which keep least, are for 16 bits.
    """
    world, train = job.train.workers, job.train
    ranks = ranks or [job.step.of_rank(rank, world) for rank in range(world)]
    weights, trained, adapted = counts or count_weights(job.model.unet, train)
    unlike = {(slot.stream, slot.count): slot for slots in ranks for slot in slots}.values()
    passes, update = _gradients(train, len(ranks[0]), trained)
    during_passes = {
        "gradients": passes,
        "communication": _buckets(train),
        "activations": max(activation_bytes(job, slot) for slot in unlike) + _bytes(train) * adapted,
    }
    kept = during_passes["activations"] if train.graphs else 0.0
    during_update = {"gradients": update, "communication": 0.0, "activations": kept}
    parts = {
        "weights": _weights(train, weights) + (0.0 if train.precision == "fp32" else _bytes(train) * float(adapted)),
        "optimizer and average": _states(train, trained),
        "text tower": (2.0 if train.gpus_per_worker else 4.0) * count_text_weights(job.model.text),
        "reserve": float(RESERVE),
    }
    return parts | max(during_passes, during_update, key=lambda moment: sum(moment.values()))


def encoder_bytes(vae: Any, frames: int, size: int) -> float:
    """What a process takes of a GPU that encodes so many frames of `size` x `size` pixels at once, at most.

    `vae` is an AutoencoderKL, whose weights are there in fp32 and its encoder's in fp16 too (t2v/frozen.py).
    """
    weights, width = sum(weight.numel() for weight in vae.parameters()), vae.config["block_out_channels"][0]
    return (4 + 2.0) * weights + 2.0 * ENCODER_TENSORS * frames * width * size**2 + ENCODER_CONTEXT


def encoders_beside(job: TrainJob) -> dict[str, float]:
    """Bytes of the encoders for which a rank leaves room on its GPU, with `train.feed: online`; Ray may place as many.

    Nothing where ranks or encoders have whole GPUs.
    """
    source, left = (job.raw or {}).get("videos"), 1 - job.train.gpus_per_worker
    each = source.needs["GPU"] if source else 0.0
    if not source or not 0 < each < 1 or not (count := int(left / each + 1e-6)):
        return {}
    return {f"{count} x an encoder of train.feed online on its GPU": count * source.encoder_bytes}


def count_weights(config: UNetConfig, train: TrainConfig | None = None) -> tuple[int, int, int]:
    """Parameters of the UNet: all of them, those that are trained, and those that have low-rank updates.

    ValueError as lora.choose_trained.
    """
    with torch.device("meta"):
        unet = UNet(config)
        choose_trained(unet, train or TrainConfig())
    trained = sum(shape.numel() for shape in trained_shapes(unet).values())
    return sum(weight.numel() for weight in unet.parameters()), trained, adapted_weights(unet)


def count_text_weights(config: TextConfig) -> int:
    """Parameters of the text tower, nearly; a checkpoint's is taken to be ViT-H/14's, whose shape is the default."""
    shape = config if config.weights == "random" else TextConfig()
    layers = shape.layers - config.skip_layers
    return 12 * layers * shape.width**2 + (VOCABULARY + shape.context) * shape.width


def activation_bytes(job: TrainJob, slot: Slot) -> float:
    """What a micro-batch has in memory as its backward pass begins.

    That starts at full resolution with a feed-forward layer: the gradients of what its gate reads and writes, and what
    the gate writes once more. With `recompute: gates` the layer's norm and what its gate reads come on top.
    """
    frames, size = job.frames_of(slot.stream), job.size // 8
    cost = unet_cost(job.model.unet, frames, size, job.model.text.context)
    keeps_gates = job.train.recompute == "activations"
    widths = WIDE + 2 * NARROW + (0 if keeps_gates else WIDE + 1)
    numbers = cost.kept + (cost.gates if keeps_gates else 0) + widths * widest_tensor(job.model.unet, frames, size)
    return _bytes(job.train) * float(slot.count * numbers + cost.once)


def _bytes(train: TrainConfig) -> int:
    return 4 if train.precision == "fp32" else 2


def _is_plain(train: TrainConfig) -> bool:
    return train.zero_stage == 0 and train.precision == "fp32"


def _share(train: TrainConfig) -> float:
    """The part of what ZeRO shards that one rank has; DeepSpeed's optimizer for bf16 shards at stage 0 too."""
    return 1.0 if _is_plain(train) else 1 / train.workers


def _weights(train: TrainConfig, weights: int) -> float:
    if train.zero_stage < 3:
        return _bytes(train) * float(weights)
    own = weights / train.workers
    return _bytes(train) * (own + min(weights - own, GATHERED))


def _states(train: TrainConfig, trained: int) -> float:
    """fp32 masters, AdamW's two moments and the average; without ZeRO and in fp32 the weights are the masters."""
    return (12.0 if _is_plain(train) else 16.0) * trained * _share(train)


def _buckets(train: TrainConfig) -> float:
    """Where DeepSpeed has gradients of ZeRO-3 wait for their reduction."""
    return _bytes(train) * float(BUCKET) if train.zero_stage == 3 else 0.0


def _gradients(train: TrainConfig, micro_batches: int, trained: int) -> tuple[float, float]:
    """Bytes of gradients as the last backward pass begins, and in the optimizer's step.

    Sums of several micro-batches are kept in fp32, and those of one as they are computed; in ZeRO 1 and 2 they are
    always there (t2v/engine.py). For the step a rank has its part of them once more, and DeepSpeed takes its norm in
    fp64.
    """
    own = trained * _share(train)
    each = 4 if micro_batches > 1 or train.zero_stage == 0 else _bytes(train)
    if train.zero_stage in (1, 2):
        return each * float(trained), each * (trained + (own if train.workers > 1 else 0)) + 8 * own
    if micro_batches > 1 or train.zero_stage == 0:
        return 4 * float(trained), 4 * float(trained)
    return 0.0, _bytes(train) * float(trained) + (4 if train.precision == "fp32" else 2 + 4) * own
