"""DeepSpeed around the UNet: ZeRO, precision, gradient clipping, the moving average, and what a checkpoint holds."""

import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed
from torch import Tensor, nn

from t2v import checkpoint
from t2v.blocks import FeedForward
from t2v.checkpoint import CheckpointError, Piece
from t2v.config import TrainConfig
from t2v.lora import choose_trained

# On CPUs deepspeed would compile a shared-memory all-reduce for two minutes; gloo serves as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Staged:
    """This rank's share of a checkpoint on its way to storage: host memory that training no longer touches."""

    rank: int
    flats: dict[str, list[Tensor]]
    pieces: list[Piece]
    state: dict[str, Any]
    copied: torch.cuda.Event | None
    written: threading.Event = field(default_factory=threading.Event)
    write_s: float = 0.0

    def write(self, folder: str) -> None:
        """Waits for the copy from the GPU, then writes; it may run in another thread, and sets `written` at its end."""
        begun = time.monotonic()
        try:
            if self.copied:
                self.copied.synchronize()
            checkpoint.write_share(folder, self.rank, self.flats, self.pieces, self.state)
        finally:
            self.write_s = time.monotonic() - begun
            self.written.set()


class Engine:
    """Trains `unet` on this rank: `backward` once a slot, `update` once a step.

    DeepSpeed keeps the fp32 weights and AdamW's moments of this rank as a few flat tensors; `ema` is laid out as they
    are, so the moving average costs no communication, and 4 / ranks bytes a parameter.
    """

    def __init__(self, unet: nn.Module, config: TrainConfig, micro_steps: int) -> None:
        self.config, self.micro_steps = config, micro_steps
        torch.backends.cudnn.benchmark = True  # micro-batches have few shapes, and keep them
        if config.graphs and torch.cuda.is_available():
            # DeepSpeed keeps nodes of autograd, which run on the stream they were made on, and the default one cannot
            # be captured (t2v/graphs.py).
            torch.cuda.set_stream(torch.cuda.Stream())
        for module in unet.modules():
            if isinstance(module, FeedForward):
                module.keep = config.recompute == "activations"
        choose_trained(unet, config, self.dtype)
        optimizer = torch.optim.AdamW(
            _groups(unet.parameters(), config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
            fused=torch.cuda.is_available(),
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=unet, optimizer=optimizer, config=_deepspeed_config(config, micro_steps)
        )
        self.ema = [flat.clone() for flat in self._masters()]
        self._pieces = list(self._own_pieces())
        self._plain_norm = torch.zeros(())
        on_gpu = self.device.type == "cuda"
        self._host = {  # where `stage` copies to: pages are locked once, which takes seconds
            kind: [torch.empty(flat.shape, dtype=torch.float32, pin_memory=on_gpu) for flat in group]
            for kind, group in self._flats().items()
        }
        self._staged: Staged | None = None
        self._reduces_later: AbstractContextManager | None = None
        self._gradients: list[Tensor] = []
        if config.zero_stage in (1, 2):
            self._lay_out_gradients()

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.config.precision]

    def unet(self, *inputs: Tensor) -> Tensor:
        """The UNet's forward pass."""
        return self.engine.module(*inputs) if self._gradients else self.engine(*inputs)

    def backward(self, loss: Tensor, weight: Tensor | float) -> None:
        """Adds one slot's gradient, which counts `weight` in the step's."""
        if self._gradients:
            return self.optimizer.scale_if_loss(loss * weight).backward()
        if self.config.zero_stage and not self._reduces_later:
            self._reduces_later = self.engine.coalesce_grad_reduction()
            self._reduces_later.__enter__()
        steps = self.engine.gradient_accumulation_steps()
        self.engine.backward(loss * (weight * steps * self.engine.world_size))  # DeepSpeed takes means over both
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def update(self, learning_rate: float, ema_decay: float) -> bool:
        """One optimizer step on the gradient of all slots, then the moving average.

        False, on all ranks alike, if the gradient is not finite: then nothing changes.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._staged and self._staged.copied:
            torch.cuda.current_stream().wait_event(self._staged.copied)
        is_applied = self._step_flat() if self._gradients else self._step()
        if is_applied:
            torch._foreach_lerp_(self.ema, self._masters(), 1 - ema_decay)
        return is_applied

    def _step_flat(self) -> bool:
        """Sums gradients over ranks, each keeping its part, and has DeepSpeed's optimizer step on that."""
        for index, gradient in enumerate(self._gradients):
            part = gradient
            if self.engine.world_size > 1:
                part = gradient.new_empty(gradient.numel() // self.engine.world_size)
                torch.distributed.reduce_scatter_tensor(part, gradient)
            self.optimizer.averaged_gradients[index] = [part]
        self.optimizer.step()
        self._clear_gradients()
        return not self.optimizer.overflow

    def _step(self) -> bool:
        """The same by DeepSpeed's engine."""
        if self._reduces_later:
            self._reduces_later.__exit__(None, None, None)
            self._reduces_later = None
        if self._is_plain:
            gradients = [weight.grad for weight in self._masters() if weight.grad is not None]
            self._plain_norm = torch.nn.utils.get_total_norm(gradients)
            if not self._plain_norm.isfinite():
                self.engine.zero_grad()
                self.engine.micro_steps += 1
                return False
        self.engine.step()
        return self.engine.was_step_applied()

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient before clipping; it waits for the GPU."""
        return float(self._plain_norm if self._is_plain else self.optimizer._global_grad_norm or 0.0)

    def stage(self, state: dict[str, Any]) -> Staged:
        """Copies this rank's share of a checkpoint to host memory that the next call uses again.

        On a GPU it returns at once: the copy runs beside the next step's passes, and the next `update` waits for it.
        """
        flats = self._flats()
        state |= {"ranks": self.engine.world_size, "optimizer_steps": self._optimizer_steps()}
        if self.config.precision == "fp16":
            state["loss_scale"] = self.optimizer.loss_scaler.cur_scale
        copied = None
        if self.device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._copy_to_host(flats)
            copied = stream.record_event()
        else:
            self._copy_to_host(flats)
        self._staged = Staged(self.engine.global_rank, self._host, self._share(), state, copied)
        return self._staged

    def load(self, folder: str) -> dict[str, Any]:
        """Restores what ranks of any number and ZeRO stage have written, and returns its state.

        CheckpointError, on all ranks alike, if one of them cannot read its part; the weights are then undefined.
        """
        problem, state = "", {}
        try:
            state = checkpoint.read_state(folder)
            flats = self._flats()
            for piece, start, end, elements in checkpoint.read_pieces(folder, self._pieces):
                for kind, tensor in elements.items():
                    piece.of(flats[kind], start, end).copy_(tensor)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        problems: list[str] = [""] * self.engine.world_size
        torch.distributed.all_gather_object(problems, problem)
        if found := next(filter(None, problems), ""):
            raise CheckpointError(found)
        for flat in self._masters():
            self._moments(flat)["step"].fill_(state["optimizer_steps"])
        if self.config.precision == "fp16" and "loss_scale" in state:
            self.optimizer.loss_scaler.cur_scale = state["loss_scale"]
        self._publish_masters()
        return state

    def _lay_out_gradients(self) -> None:
        """Gives gradients of ZeRO 1 and 2 one buffer a group, laid out as DeepSpeed lays out the weights.

        Autograd adds to views of it, in fp32 where a step has several slots, and one call sums it over ranks, after
        the last backward pass: of the published model 2.8 or 5.6 GB, which with all else that four H100s do together
        costs 3 % of a step. DeepSpeed's own way, a hook a weight, overlaps the two, but takes Python longer than a GPU
        takes for a backward pass.
        """
        for hook in self.optimizer._grad_acc_hooks:
            hook.remove()
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        for weights, flat in zip(self.optimizer.bit16_groups, self.optimizer.bit16_groups_flat, strict=True):
            gradient = torch.zeros_like(flat, dtype=torch.float32 if self.micro_steps > 1 else flat.dtype)
            self._gradients.append(gradient)
            for weight in weights:
                weight.grad_dtype = gradient.dtype
                first = (weight.data_ptr() - flat.data_ptr()) // flat.element_size()
                self._views.append((weight, gradient[first : first + weight.numel()].view_as(weight)))
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        torch._foreach_zero_(self._gradients)
        for weight, view in self._views:
            weight.grad = view

    @property
    def _is_plain(self) -> bool:
        """Whether DeepSpeed leaves weights and optimizer as they are: neither ZeRO nor mixed precision."""
        return self.optimizer is self.engine.basic_optimizer

    def _masters(self) -> list[Tensor]:
        """The flat fp32 weights that the optimizer steps."""
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
            if hasattr(self.optimizer, name):
                return list(getattr(self.optimizer, name))
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a flat tensor, made as AdamW itself would at its first step."""
        state = self.engine.basic_optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device if torch.cuda.is_available() else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master.data), torch.zeros_like(master.data)
        return state

    def _flats(self) -> dict[str, list[Tensor]]:
        masters = self._masters()
        moments = [self._moments(master) for master in masters]
        return {
            "master": [master.detach().view(-1) for master in masters],
            "exp_avg": [state["exp_avg"].view(-1) for state in moments],
            "exp_avg_sq": [state["exp_avg_sq"].view(-1) for state in moments],
            "ema": [flat.detach().view(-1) for flat in self.ema],
        }

    def _optimizer_steps(self) -> int:
        return int(self._moments(self._masters()[0])["step"])

    def _own_pieces(self) -> Iterable[Piece]:
        """Which stretches of which weights the flat tensors of this rank hold."""
        groups = {id(flat): index for index, flat in enumerate(self._masters())}
        for name, weight in self.engine.module.named_parameters():
            if not weight.requires_grad:
                continue
            if hasattr(weight, "ds_id"):  # ZeRO-3: the r-th of equal stretches, the last ones padded
                group, offset, count = self.optimizer.grad_position[self.optimizer.get_param_id(weight)]
                start = count * self.engine.global_rank
                if start < weight.ds_numel:
                    yield Piece(name, start, min(start + count, weight.ds_numel), group, offset)
            elif (mapping := getattr(weight, "_hp_mapping", None)) is not None:
                own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Piece(name, own.start, own.start + own.numel, mapping.param_group_index, flat.start)
            elif self._is_plain:
                yield Piece(name, 0, weight.numel(), groups[id(weight)])

    def _share(self) -> list[Piece]:
        """The pieces that this rank writes: all its own, or where every rank has everything, every so many-th."""
        return self._pieces[self.engine.global_rank :: self.engine.world_size] if self._is_plain else self._pieces

    def _copy_to_host(self, flats: dict[str, list[Tensor]]) -> None:
        for kind, group in flats.items():
            for host, flat in zip(self._host[kind], group, strict=True):
                host.copy_(flat, non_blocking=True)

    def _publish_masters(self) -> None:
        """Brings the weights that the model computes with up to date."""
        if hasattr(self.optimizer, "update_lp_params"):
            self.optimizer.update_lp_params()
        elif hasattr(self.optimizer, "fp16_partitioned_groups_flat"):
            self._publish_stage_3()

    def _publish_stage_3(self) -> None:
        zero = self.optimizer
        for low, master, weights in zip(
            zero.fp16_partitioned_groups_flat,
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
            strict=True,
        ):
            low.data.copy_(master.data)
            for weight, new in zip(weights, zero.unflatten(low, weights), strict=True):
                weight.data = new.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _groups(weights: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weights that are trained, in groups: biases and the scales of norms do not decay."""
    trained = [weight for weight in weights if weight.requires_grad]
    if not weight_decay:
        return [{"params": trained, "weight_decay": 0.0}]
    return [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]


def _deepspeed_config(config: TrainConfig, micro_steps: int) -> dict:
    """DeepSpeed requires batch sizes; nothing reads these."""
    sums = config.zero_stage == 3 and config.precision != "fp32" and micro_steps > 1
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1 if config.zero_stage else micro_steps,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": torch.cuda.is_available()},
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32" if sums else None},
        "zero_allow_untested_optimizer": True,  # torch's AdamW, so that nothing is compiled
        "steps_per_print": 10**9,
    }
