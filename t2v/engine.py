"""DeepSpeed around the UNet: ZeRO, precision, gradient clipping, and an EMA that is sharded like the optimizer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from t2v.blocks import FeedForward
from t2v.config import TrainConfig

# On CPUs deepspeed would compile a shared-memory all-reduce for two minutes; gloo serves as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """Trains `unet` on this rank: `backward` once a slot, `update` once a step.

    `ema` holds this rank's shard of the moving average, laid out as ZeRO lays out the fp32 master weights: it
    costs no communication, and 4 / ranks bytes a parameter.
    """

    def __init__(self, unet: nn.Module, config: TrainConfig, micro_steps: int) -> None:
        self.config, self.micro_steps = config, micro_steps
        for module in unet.modules():
            if isinstance(module, FeedForward):
                module.keep = config.recompute == "activations"
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=torch.cuda.is_available(),
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=unet, optimizer=optimizer, config=_deepspeed_config(config, micro_steps)
        )
        self.ema = [shard.clone() for shard in self._master_shards()]

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def unet(self, *inputs: Tensor) -> Tensor:
        """The UNet's forward pass, as DeepSpeed runs it."""
        return self.engine(*inputs)

    def backward(self, loss: Tensor, weight: float) -> None:
        """Adds one slot's gradient, which counts `weight` in the step's; DeepSpeed takes means over slots and ranks."""
        self.engine.backward(loss * (weight * self.micro_steps * self.engine.world_size))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def update(self, learning_rate: float, ema_decay: float) -> None:
        """One optimizer step on the gradient of all slots, then the moving average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        torch._foreach_lerp_(self.ema, self._master_shards(), 1 - ema_decay)

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return float(self.engine.get_global_grad_norm() or 0.0)

    def save(self, folder: str, state: dict) -> None:
        """Writes this rank's part of a checkpoint; every rank calls it."""
        self.engine.save_checkpoint(folder, tag="state", client_state=state)
        torch.save(self.ema, os.path.join(folder, f"ema_{self.engine.global_rank}.pt"))

    def load(self, folder: str) -> dict:
        """Restores what `save` wrote, and returns its `state`; ValueError if it was made by another number of ranks."""
        check_ranks(folder, self.engine.world_size)
        _, state = self.engine.load_checkpoint(folder, tag="state")
        self.ema = torch.load(
            os.path.join(folder, f"ema_{self.engine.global_rank}.pt"), map_location=self.device, weights_only=True
        )
        return state

    @contextmanager
    def ema_weights(self) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """The averaged weights by name, fp32, gathered one by one; every rank must go through all of them."""
        masters = self._master_shards()
        kept = [shard.clone() for shard in masters]
        _copy(masters, self.ema)
        try:
            yield ((name, _whole(weight)) for name, weight in self.engine.module.named_parameters())
        finally:
            _copy(masters, kept)

    def _master_shards(self) -> list[Tensor]:
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
            if hasattr(self.optimizer, name):
                return [shard.detach() for shard in getattr(self.optimizer, name)]
        return [weight.detach() for weight in self.engine.module.parameters()]


def _whole(weight: nn.Parameter) -> Tensor:
    """The fp32 master of a weight, gathered from all ranks; without ZeRO every rank has it."""
    gathered = safe_get_full_fp32_param(weight)
    return weight.detach().float().clone() if gathered is None else gathered


def check_ranks(folder: str, world: int) -> None:
    """ValueError if the checkpoint in `folder` was written by another number of ranks than `world`."""
    saved = sum(name.startswith("ema_") for name in os.listdir(folder))
    if saved != world:
        raise ValueError(
            f"{folder}: the checkpoint was written by {saved} ranks and cannot continue on {world}; "
            f"set train.workers to {saved}"
        )


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _deepspeed_config(config: TrainConfig, micro_steps: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,  # read by nothing here: slots may differ in size
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": torch.cuda.is_available()},
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW, so that nothing is compiled
        "steps_per_print": 10**9,
    }
