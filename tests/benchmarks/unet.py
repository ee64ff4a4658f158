"""Speed and memory of the UNet at its published size on one GPU, beside diffusers' UNet3DConditionModel.

    python tests/benchmarks/unet.py [PART ...]

Work: latents 4 x 16 x 32 x 32, text 77 x 1024, bf16 compute; a training step is forward, backward and AdamW on fp32
masters; sampling is DDIM in fp16, 50 steps, guidance 9. Random weights, zero-initialised ones too. Each part runs in
a process of its own; the first starts with an empty cache of kernels. diffusers trains as users do: fp32 weights under
bf16 autocast.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BEGUN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).parents[2]))
PARTS = ["train", "train_more", "sample", "vae", "diffusers", "diffusers_compiled"]
CLIP_TFLOP = 14.67  # forward and backward, counted


def main() -> None:
    import torch
    from header import header

    print(header(), flush=True)
    total = torch.cuda.mem_get_info()[1]
    print(f"device    {torch.cuda.get_device_name()}, {total / 2**30:.0f} GiB, driver {driver()}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for part in sys.argv[1:] or PARTS:
            command = [sys.executable, __file__, f"only={part}", cache]
            done = subprocess.run(command, timeout=420)
            if done.returncode:
                print(f"{part}: failed with code {done.returncode}", flush=True)


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.check_output(query, text=True).splitlines()[0]


def only(part: str, cache: str) -> None:
    import os

    os.environ["TRITON_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    torch.backends.cudnn.benchmark = True
    globals()[part]()


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the GPU, after three that warm up."""
    import torch

    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))[repeats // 2] / 1e3


def inputs(b: int, f: int, dtype: object) -> tuple:
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    draw = {"device": "cuda", "dtype": dtype, "generator": generator}
    timesteps = torch.randint(0, 1000, (b,), device="cuda", generator=generator)
    return torch.randn(b, 4, f, 32, 32, **draw), timesteps, torch.randn(b, 77, 1024, **draw)


def randomised(unet: object) -> object:
    """The same random weights for both, none of them zero."""
    import torch

    generator = torch.Generator("cuda").manual_seed(1)
    for _, parameter in sorted(unet.named_parameters()):
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
    return unet


def ours(dtype: object) -> object:
    import torch

    from t2v.config import UNetConfig
    from t2v.unet import UNet

    with torch.device("cuda"):
        return randomised(UNet(UNetConfig())).to(dtype)


def theirs() -> object:
    import torch
    from diffusers import UNet3DConditionModel

    with torch.device("cuda"):
        return randomised(UNet3DConditionModel())


def our_step(b: int, f: int, keep: bool = True) -> tuple[Callable[[], None], dict]:
    """A training step on bf16 weights with fp32 masters, and where it notes its memory in bytes."""
    import torch
    import torch.nn.functional as F

    unet = ours(torch.bfloat16).train()
    for module in unet.modules():
        if hasattr(module, "keep"):
            module.keep = keep
    weights = list(unet.parameters())
    masters = [weight.detach().float() for weight in weights]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)
    latents, timesteps, text = inputs(b, f, torch.bfloat16)
    noise, memory = torch.randn_like(latents), {"activations": 0}

    def step() -> None:
        before = torch.cuda.memory_allocated()
        loss = F.mse_loss(unet(latents, timesteps, text).float(), noise.float())
        memory["activations"] = torch.cuda.memory_allocated() - before
        loss.backward()
        torch._foreach_copy_([master.grad for master in masters], [weight.grad for weight in weights])
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        for weight in weights:
            weight.grad = None

    return step, memory


def their_step(b: int, f: int, compiled: bool) -> tuple[Callable[[], None], dict]:
    """A training step of diffusers' UNet on fp32 weights under autocast, and where it notes its memory in bytes."""
    import torch
    import torch.nn.functional as F

    unet = theirs().train()
    forward = torch.compile(unet) if compiled else unet
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    latents, timesteps, text = inputs(b, f, torch.float32)
    noise, memory = torch.randn_like(latents), {"activations": 0}

    def step() -> None:
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.mse_loss(forward(latents, timesteps, text).sample.float(), noise)
        memory["activations"] = torch.cuda.memory_allocated() - before
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, memory


def measure(name: str, make: Callable[[int], tuple], batches: list[int], unit: str, tflop: float) -> None:
    """Prints the largest of `batches` that fits."""
    import gc

    import torch

    for b in batches:
        try:
            step, memory = make(b)
            begun = time.perf_counter()
            step()
            torch.cuda.synchronize()
            first, ready = time.perf_counter() - begun, time.perf_counter() - BEGUN
            took = seconds(step, 5)
        except torch.OutOfMemoryError:
            print(f"{name:<34} batch {b}: out of memory", flush=True)
            step = memory = None
            gc.collect()
            torch.cuda.empty_cache()
            continue
        print(
            f"{name:<34} batch {b:3}  {took * 1e3:7.1f} ms  {b / took:7.2f} {unit}/s  {b * tflop / took:4.0f} TFLOP/s"
            f"  activations {memory['activations'] / b / 2**30:.3f} GiB a {unit[:-1]}"
            f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            f"  first step {first:.1f} s, {ready:.1f} s after the process began",
            flush=True,
        )
        step = memory = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return


def large() -> bool:
    import torch

    return torch.cuda.mem_get_info()[1] > 100 * 2**30


def train() -> None:
    measure("clips, cold cache", lambda b: our_step(b, 16), [26, 24] if large() else [12, 11], "clips", CLIP_TFLOP)
    ceilings()


def train_more() -> None:
    import torch

    name = "clips, gate recomputed, warm cache"
    measure(name, lambda b: our_step(b, 16, keep=False), [32] if large() else [16], "clips", CLIP_TFLOP)
    measure("images", lambda b: our_step(b, 1), [384, 320] if large() else [192, 160], "images", CLIP_TFLOP / 16)
    measure(
        "images, gate recomputed",
        lambda b: our_step(b, 1, keep=False),
        [512] if large() else [256],
        "images",
        CLIP_TFLOP / 16,
    )
    if large():
        torch.cuda.set_per_process_memory_fraction(78 * 2**30 / torch.cuda.mem_get_info()[1])
        measure("clips, gate recomputed, of 78 GiB", lambda b: our_step(b, 16, keep=False), [16], "clips", CLIP_TFLOP)


def ceilings() -> None:
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    print(f"matrix product ceiling {2 * 8192**3 / seconds(lambda: a @ b, 20) / 1e12:.0f} TFLOP/s", flush=True)
    x = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    print(f"copy ceiling {4 * 2**30 / seconds(lambda: y.copy_(x), 10) / 1e12:.2f} TB/s", flush=True)


def sample() -> None:
    """Whole sampling runs: 50 guided DDIM steps, the graph's capture apart."""
    import torch

    from t2v.autoencoder import channels_last
    from t2v.config import DiffusionConfig, SampleConfig
    from t2v.diffusion import Diffusion
    from t2v.sampler import Captured
    from t2v.sampler import sample as run

    unet = Captured(channels_last(ours(torch.float16).eval().requires_grad_(False)))
    for b in (1, 8):
        _, _, text = inputs(b + 1, 16, torch.float16)
        call = (unet, text[1:], text[:1], (4, 16, 32, 32), range(b))
        run(*call, SampleConfig(steps=2), Diffusion(DiffusionConfig()))
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run(*call, SampleConfig(), Diffusion(DiffusionConfig()))
        torch.cuda.synchronize()
        print(f"sampling, batch {b}: {time.perf_counter() - begun:.2f} s", flush=True)


def vae() -> None:
    import torch
    from diffusers import AutoencoderKL

    from t2v.autoencoder import channels_last, encode

    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("cuda"):
        model = AutoencoderKL(**sizes, **blocks).half().eval().requires_grad_(False)
    frames = torch.rand(128, 3, 256, 256, device="cuda", dtype=torch.float16) * 2 - 1
    with torch.no_grad():
        for name, layout in (("", torch.contiguous_format), (", channels-last", torch.channels_last)):
            model.to(memory_format=layout)
            x = frames.contiguous(memory_format=layout)
            print(f"diffusers VAE encode{name}: {8 / seconds(lambda x=x: model.encode(x), 5):.1f} clips/s", flush=True)
        x = frames.movedim(1, -1).contiguous()
        channels_last(model)
        print(f"VAE encode: {8 / seconds(lambda: encode(model, x), 5):.1f} clips/s", flush=True)


def diffusers() -> None:
    import torch

    batches = [10, 8] if large() else [5, 4]
    measure("diffusers, clips", lambda b: their_step(b, 16, False), batches, "clips", CLIP_TFLOP)
    measure("diffusers, images", lambda b: their_step(b, 1, False), [32], "images", CLIP_TFLOP / 16)
    unet = theirs().half().eval().requires_grad_(False)
    for b in (1, 8):
        call = inputs(2 * b, 16, torch.float16)
        with torch.no_grad():
            took = seconds(lambda call=call: unet(*call), 5)
        print(f"diffusers, a guided step, batch {b}: {took * 1e3:.1f} ms, 50 steps {50 * took:.2f} s", flush=True)


def diffusers_compiled() -> None:
    batches = [10] if large() else [6]
    measure("diffusers compiled, clips", lambda b: their_step(b, 16, True), batches, "clips", CLIP_TFLOP)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("only="):
        only(sys.argv[1].removeprefix("only="), sys.argv[2])
    else:
        main()
