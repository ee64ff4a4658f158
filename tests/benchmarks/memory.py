"""Peak memory of training steps through t2v/engine.py on one GPU, beside what t2v/memory.py predicts.

    python tests/benchmarks/memory.py [tiny] [CASE ...]

Configurations of the published model, ZeRO-2 in bf16 unless they say otherwise, each in a process of its own: a small
batch, a large one, a larger one that recomputes gates, and small ones in fp16, with ZeRO-3 and with low-rank updates
alone; and, as `encoder`, what a process that encodes for `train.feed: online` takes of a GPU in all. `tiny` shows on a
CPU, with a small model, that the script works; there is no memory to measure there.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
CASES = {  # frames of a slot and of a micro-batch, and what else is set
    "small": (16, 16, {}),
    "large": (320, 160, {}),
    "gates": (256, 256, {"recompute": "gates"}),
    "fp16": (32, 16, {"precision": "fp16"}),
    "zero-3": (32, 16, {"zero_stage": 3}),
    "lora": (160, 160, {"trained": "lora"}),
}
STEPS = 2  # the second one finds AdamW's moments there


def main(tiny: bool, cases: list[str]) -> None:
    from header import header

    print(header(), flush=True)
    for case in cases or [*CASES, "encoder"]:
        command = [sys.executable, __file__, "only", case, *(["tiny"] if tiny else [])]
        done = subprocess.run(command, timeout=420)
        if done.returncode:
            print(f"{case}: failed with code {done.returncode}", flush=True)


def make_job(case: str, tiny: bool) -> object:
    from t2v.config import DiffusionConfig, MixConfig, ModelConfig, SampleConfig, TextConfig, TrainConfig, UNetConfig
    from t2v.job import TrainJob

    slot, micro, settings = CASES[case]
    mix = MixConfig(slots=2, image_every=2, frames_per_slot=slot, micro_frames=micro)
    train = TrainConfig(workers=1, gpus_per_worker=0 if tiny else 1, mix=mix, **settings)
    text = TextConfig("random", layers=23, skip_layers=0)
    unet = UNetConfig()
    if tiny:
        train.precision, text = "fp32", TextConfig("random", width=16, heads=2, layers=2)
        unet = UNetConfig(block_out_channels=[16, 32], layers_per_block=1, head_dim=8, text_dim=16, norm_groups=8)
    size = 32 if tiny else 256
    return TrainJob("", 0, size, 16, ModelConfig(unet, text=text), DiffusionConfig(), train, SampleConfig())


def only(case: str, tiny: bool) -> None:
    """Trains some steps on random latents as a rank does, and prints both peaks."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    from t2v.cards import GIB
    from t2v.memory import predict
    from t2v.rehearsal import largest_slots, rehearse

    job = make_job(case, tiny)
    predicted = predict(job)
    seconds = rehearse(job, largest_slots(job), STEPS)
    expected = sum(predicted.values()) - predicted["reserve"]
    parts = "  ".join(f"{name} {size / GIB:.2f}" for name, size in predicted.items() if name != "reserve")
    line = f"{case:<12} predicted {expected / GIB:6.2f} GiB"
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        line += (
            f"  measured {peak / GIB:6.2f}  difference {expected / peak - 1:+.1%}  of {torch.cuda.get_device_name()}"
        )
    print(f"{line}  last of {STEPS} steps {seconds:.2f} s\n    {parts}", flush=True)


def encoder(tiny: bool) -> None:
    """Encodes 64 frames at once with a VAE of Stable Diffusion's shape, twice."""
    import torch
    from diffusers import AutoencoderKL

    from t2v.cards import GIB
    from t2v.frozen import Vae
    from t2v.memory import encoder_bytes

    on_gpu, size, levels = torch.cuda.is_available(), 32 if tiny else 256, 4
    model = AutoencoderKL(
        block_out_channels=[32] * levels if tiny else [128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=2,
        latent_channels=4,
    )
    vae = Vae(model.eval().requires_grad_(False).to("cuda" if on_gpu else "cpu"), "random", 64)
    frames = torch.randint(0, 256, (64, size, size, 3), dtype=torch.uint8)
    for _ in range(2):
        vae.encode(frames)
    line = f"encoder      predicted {encoder_bytes(model, 64, size) / GIB:6.2f} GiB, context included"
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated()
        line += f"  measured {(total - free) / GIB:6.2f} of the card, {peak / GIB:.2f} of it by tensors at their peak"
    print(line, flush=True)


if __name__ == "__main__":
    tiny = "tiny" in sys.argv
    if sys.argv[1:3] == ["only", "encoder"]:
        encoder(tiny)
    elif sys.argv[1:2] == ["only"]:
        only(sys.argv[2], tiny)
    else:
        main(tiny, [name for name in sys.argv[1:] if name != "tiny"])
