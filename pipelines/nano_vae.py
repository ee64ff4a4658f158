"""Trains the miniature's VAE, t2v/assets/nano_vae, on one GPU in minutes.

The paper takes its VAE ready-made; a laptop needs one that is forty times smaller, and none is published. The record
of the run that made ours lies beside the weights.

    python -m pipelines.nano_vae --material material.npz --out t2v/assets/nano_vae
"""

import math
import time

import numpy as np
import torch
from diffusers.models import AutoencoderKL
from jsonargparse import auto_cli
from torch import Tensor

from t2v.frozen import Vae, load_vae

SIZE = 64  # pixels; the network is convolutional and takes any multiple of 8
REAL_SHARE = 0.2  # of a batch
EDGE_WEIGHT = 0.5
COLOUR_WEIGHT = 4.0  # of a saturated pixel's error beyond a grey one's: the shape is small, the ground is grey
KL_WEIGHT = 5e-4  # per latent value; keeps latents near unit variance and the decoder smooth around them
WARMUP_SAMPLES = 100_000
LOG_EVERY_S = 20


def train(
    material: str,
    out: str,
    start: str | None = None,
    seconds: float = 420,
    batch: int = 384,
    learning_rate: float = 1e-3,
    device: str = "cuda",
    compiled: bool = False,
    seed: int = 0,
) -> None:
    """Trains for a stretch of wall-clock time, writes the diffusers folder `out` and prints PSNR on held-out frames.

    `material` is the file that pipelines/nano_frames.py wrote, `start` a folder to go on from. The learning rate falls
    to zero along a cosine of the time elapsed, so that a run of any length is finished.
    """
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    data = {name: torch.from_numpy(array).to(device) for name, array in np.load(material).items()}
    model = load_vae(start).model.train().requires_grad_(True) if start else new_vae()
    model.to(device, memory_format=torch.channels_last)  # type: ignore[arg-type]
    losses_of = torch.compile(_losses) if compiled else _losses
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    real = round(batch * REAL_SHARE)
    samples, logged_s, begun = 0, 0.0, time.monotonic()
    while (elapsed_s := time.monotonic() - begun) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(elapsed_s / seconds, samples)
        frames = torch.cat([_draw(data["shapes"], batch - real), _draw(data["real"], real)])
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses = losses_of(model, _to_pixels(frames))
        (losses[0] + EDGE_WEIGHT * losses[1] + KL_WEIGHT * losses[2]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if samples == 0:
            begun = time.monotonic()  # the first step compiles, for a minute or so
        samples += batch
        if elapsed_s - logged_s >= LOG_EVERY_S:
            logged_s = elapsed_s
            l1, edges, kl = losses.tolist()
            rate = samples / elapsed_s
            print(f"{elapsed_s:.0f} s: l1 {l1:.4f} edges {edges:.4f} kl {kl:.3f} {rate:.0f} frames/s", flush=True)
    _write(model, data["shapes"][:1000], out)
    vae = load_vae(out, device)
    for name in ("shapes", "real"):
        print(f"{name}: {psnr_db(vae, data[name + '_held_out']):.2f} dB held out", flush=True)
    print(f"{samples} samples, {sum(p.numel() for p in model.parameters())} parameters, {vae.id=}, {vae.scale=:.4f}")


def new_vae() -> AutoencoderKL:
    """The untrained network: diffusers' AutoencoderKL, 8 times down to 4 channels, 1.76 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 80, 80),
        norm_num_groups=8,
        sample_size=SIZE,
    )


def _schedule(progress: float, samples: int) -> float:
    return min(1.0, samples / WARMUP_SAMPLES) * (1 + math.cos(math.pi * progress)) / 2


def _draw(frames: Tensor, count: int) -> Tensor:
    """Random frames, each cropped to 64 x 64 at random and mirrored or not in x and y."""
    n, height, width, _ = frames.shape
    index = torch.randint(n, (count, 1, 1), device=frames.device)
    rows, columns = (_span(count, extent, frames.device) for extent in (height, width))
    return frames[index, rows[:, :, None], columns[:, None, :]]


def _span(count: int, extent: int, device: torch.device) -> Tensor:
    """Pixel positions of `count` random crops, rising or falling: [count, 64]."""
    first = torch.randint(extent - SIZE + 1, (count, 1), device=device)
    span = torch.arange(SIZE, device=device) + first
    return torch.where(torch.rand(count, 1, device=device) < 0.5, span, span.flip(1))


def _to_pixels(frames: Tensor) -> Tensor:
    """uint8 [b, y, x, 3] -> [-1, 1] in [b, 3, y, x]."""
    return frames.permute(0, 3, 1, 2) / 127.5 - 1


def _losses(model: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Absolute error of pixels and of their differences to neighbours, by colour weighted; KL per latent value: [3]."""
    posterior = model.encode(pixels).latent_dist
    colour = (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)) / 2
    error = (model.decode(posterior.sample()).sample.float() - pixels) * (1 + COLOUR_WEIGHT * colour)
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return torch.stack([error.abs().mean(), edges, posterior.kl().mean() / posterior.mean[0].numel()])


@torch.inference_mode()
def _write(model: AutoencoderKL, frames: Tensor, out: str) -> None:
    """Saves fp16 weights, with the factor that brings the latents of `frames` to unit variance."""
    model.eval()
    latents = [model.encode(_to_pixels(part)).latent_dist.sample() for part in frames.split(500)]
    model.register_to_config(scaling_factor=round(1 / torch.cat(latents).std().item(), 5))
    model.half().save_pretrained(out)


def psnr_db(vae: Vae, frames: Tensor) -> float:
    """Mean over frames, uint8 [n, y, x, 3], of the PSNR after a way through the latents."""
    latents = vae.encode(frames)[0].unsqueeze(2) * vae.scale  # one video of one frame each
    error = vae.decode(latents)[:, 0].float() - frames.to(vae.model.device)
    return (20 * math.log10(255) - 10 * error.square().mean(dim=(1, 2, 3)).log10()).mean().item()


if __name__ == "__main__":
    auto_cli(train, as_positional=False)
