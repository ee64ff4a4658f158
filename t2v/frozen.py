"""What is never trained: the VAE between pixels and latents, the text tower and the samplers' schedulers.

diffusers and open_clip are imported where they are used: either takes seconds, and few processes need both.

b videos or prompts, n frames, c latent channels, f frames of a video, h w latent size, l tokens, d text width.
"""

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor, nn

from t2v import autoencoder, keys, storage
from t2v.clip import TextShape, check_tokenizer, folder_shape, open_clip_shape, read_open_clip, read_transformers
from t2v.config import DiffusionConfig, TextConfig
from t2v.shards import encoder_id
from t2v.weights import fill, fitted, named, part, read_folder, read_tensors, under

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
    from open_clip.transformer import TextTransformer

Scheduler = Union["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]


class Vae:
    """A frozen AutoencoderKL that takes and gives frames as they are stored, some at a time to bound the memory.

    `id` names the weights that made a latent; `scale` brings latents to unit variance before diffusion. A GPU encodes
    in fp16, as latents are stored, and decodes in fp32.
    """

    def __init__(self, model: "AutoencoderKL", weights_id: str, chunk_frames: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.id = weights_id
        self.scale = float(model.config["scaling_factor"])
        self.chunk_frames = chunk_frames
        self.encodes_in = torch.float16 if model.device.type == "cuda" else torch.float32

    @torch.no_grad()
    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, unscaled: training draws its latents from them (VGen does so).

        uint8 [n, 8h, 8w, 3] -> two of float32 [n, c, h, w], on the VAE's device, which fp16 can hold. Frames are
        bounded, so that ValueError, where it cannot, speaks of the weights and not of one row.
        """
        moments = torch.cat([self._moments(chunk.to(self.model.device)) for chunk in frames.split(self.chunk_frames)])
        if not _storable(moments).all():  # before the clamp, which would hide an infinity
            raise ValueError("model.vae: its latents are beyond fp16 or not finite, in fp32 too: broken weights")
        mean, logvar = moments.movedim(-1, 1).contiguous().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # as diffusers does

    def _moments(self, frames: Tensor) -> Tensor:
        """Mean and log-variance side by side, float32 [n, h, w, 2 c]; a frame that overflows fp16 is done in fp32."""
        pixels = frames / 127.5 - 1
        if self.encodes_in == torch.float32:
            return autoencoder.encode(self.model, pixels)
        moments = autoencoder.encode(self._half, pixels.half()).float()
        failed = ~_storable(moments)
        if failed.any():
            moments[failed] = autoencoder.encode(self.model, pixels[failed])
        return moments

    @cached_property
    def _half(self) -> "AutoencoderKL":
        """The encoder's weights as a GPU reads them fastest, made when first needed: who decodes alone has none."""
        encoder = copy.deepcopy(self.model)
        del encoder.decoder
        autoencoder.channels_last(encoder.half())
        return encoder

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [b, c, f, h, w] -> uint8 frames [b, f, 8h, 8w, 3], on the VAE's device."""
        z = latents.to(self.model.device, torch.float32).transpose(1, 2) / self.scale  # b f c h w
        chunks = z.flatten(0, 1).split(self.chunk_frames)
        frames = torch.cat([_to_uint8(self.model.decode(chunk).sample) for chunk in chunks])
        return frames.unflatten(0, z.shape[:2])


def _storable(moments: Tensor) -> Tensor:
    """Which of the images [n, ...] are all finite numbers of fp16: bool [n]."""
    return (moments.abs() <= torch.finfo(torch.float16).max).flatten(1).all(1)


def _to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] in [n, 3, y, x] -> uint8 [n, y, x, 3].

    Differs: rounds. The public code truncates, which darkens every frame by half a level on average.
    """
    return (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def load_vae(path: str | None, device: str | torch.device = "cpu", chunk_frames: int = 32) -> Vae:
    """The VAE of a diffusers folder, a pipeline's or its vae/, or of a Stable Diffusion checkpoint, in float32.

    ValueError or FileNotFoundError, naming the config key, where there is none or its tensors do not fit.
    """
    from diffusers.models import AutoencoderKL

    weights_id = encoder_id(path)
    assert path is not None
    with named("model.vae"):
        config, tensors, names = _read_vae(path)
        with torch.device("meta"):
            model = AutoencoderKL.from_config(config)
        like = model.state_dict()
        fill(model, fitted(tensors, keys.renamed(like, names), like, path))
    return Vae(model.to(device), weights_id, chunk_frames)


def _read_vae(path: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Config of the AutoencoderKL, its tensors, and which names in them are not those of today's diffusers."""
    if storage.is_file(path):
        tensors = read_tensors(path)
        tensors = under("first_stage_model.", tensors) or tensors  # a whole checkpoint's, or the VAE's alone
        config = _ldm_config(tensors, path)
        return config, tensors, keys.ldm_vae(len(config["block_out_channels"]), config["layers_per_block"])
    folder = part(path, "vae")
    settings = storage.join(folder, "config.json")
    if not storage.exists(settings):
        raise FileNotFoundError(f"{folder} is no diffusers AutoencoderKL folder, it has no config.json")
    config = storage.read_json(settings)
    if (kind := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise ValueError(f"{settings}: _class_name is {kind!r}, this VAE is an AutoencoderKL")
    if (activation := config.get("act_fn", "silu")) != "silu":
        raise ValueError(f"{settings}: act_fn is {activation!r}, this VAE's is silu")
    tensors = read_folder(folder)
    old = any(name.endswith(".proj_attn.weight") for name in tensors)
    return config, tensors, keys.old_diffusers_vae() if old else {}


def _ldm_config(tensors: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """What the shapes of an LDM autoencoder tell of it; the rest is as in Stable Diffusion."""
    widths: list[int] = []
    while (name := f"encoder.down.{len(widths)}.block.0.conv2.weight") in tensors:
        widths.append(tensors[name].shape[0])
    if not widths or "post_quant_conv.weight" not in tensors:
        raise ValueError(f"{path}: no first_stage_model of a known layout; its first tensors are {list(tensors)[:8]}")
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": sum(f"encoder.down.0.block.{index}.conv1.weight" in tensors for index in range(9)),
        "latent_channels": tensors["post_quant_conv.weight"].shape[0],
        "scaling_factor": 0.18215,
    }


class TextEncoder(nn.Module):
    """A CLIP text tower's layers, then its final norm (paper 3.1): one state a token, no projection.

    As in the public implementation a token sees those before it, and padding (id 0) is not masked.
    """

    def __init__(self, tower: "TextTransformer") -> None:
        import open_clip

        super().__init__()
        self.tokenizer = open_clip.SimpleTokenizer(context_length=tower.context_length)
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.blocks = tower.transformer.resblocks
        self.ln_final = tower.ln_final
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Width of a state, d."""
        return self.token_embedding.embedding_dim

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> token ids, int64 [b, l], on the CPU; a prompt too long keeps its start and the end token."""
        return self.tokenizer(prompts)

    @torch.no_grad()  # not inference_mode: the UNet's backward pass has to keep the states
    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [b, l] -> states [b, l, d]."""
        states = self.token_embedding(tokens.to(self.positional_embedding.device)) + self.positional_embedding
        for block in self.blocks:
            states = block(states, attn_mask=self.attn_mask)
        return self.ln_final(states)

    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts -> states [b, l, d]."""
        return self(self.tokenize(prompts))


def load_text(config: TextConfig, device: str | torch.device = "cpu") -> TextEncoder:
    """The frozen text tower: an open_clip checkpoint's, a released folder's, or a small random one.

    With `weights: random` the start is drawn from `config.seed` and stays as it is. The UNet learns to read the
    states through its cross-attention, so they need not mean anything before: distinct words only have to give
    distinct states, which a random transformer does. It serves closed vocabularies such as the miniature's.

    A GPU has it in fp16, as the public code does: in fp32 it would take a twentieth of a training step.

    ValueError or FileNotFoundError, naming the config key, where there are no weights or they do not fit.
    """
    if config.weights is None:
        raise ValueError("model.text.weights is not set: give the path of an open_clip checkpoint, or `random`")
    if config.weights == "random":
        whole, skip = TextEncoder(_random_tower(config)), config.skip_layers
    else:
        with named("model.text.weights"):
            whole, skip = _published_tower(config.weights, config.architecture, config.skip_layers)
    if not 0 <= skip < len(whole.blocks):
        raise ValueError(f"model.text.skip_layers: {skip} of {len(whole.blocks)} layers")
    whole.blocks = whole.blocks[: len(whole.blocks) - skip]
    return whole.to(device, torch.float16 if torch.device(device).type == "cuda" else torch.float32)


def _random_tower(config: TextConfig) -> "TextTransformer":
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(config.seed)
        return _tower(TextShape(config.width, config.heads, config.layers, config.context))


def _tower(shape: TextShape) -> "TextTransformer":
    from open_clip.transformer import QuickGELU, TextTransformer

    return TextTransformer(
        context_length=shape.context,
        vocab_size=shape.vocabulary,
        width=shape.width,
        heads=shape.heads,
        layers=shape.layers,
        mlp_ratio=shape.mlp_ratio,
        output_dim=None,
        act_layer=QuickGELU if shape.quick_gelu else nn.GELU,
    )


def _published_tower(path: str, architecture: str, skip_layers: int) -> tuple[TextEncoder, int]:
    """The tower with all layers that its source has, and how many of them to skip.

    A released folder has no layers but those that are used, unless it has as many as the whole architecture.
    """
    import open_clip

    if not storage.exists(path):
        raise FileNotFoundError(f"there is no file or folder {path}")
    model = open_clip.get_model_config(architecture)
    is_file = storage.is_file(path)
    shape = open_clip_shape(model, architecture) if is_file else folder_shape(path)
    with torch.device("meta"):
        tower = _tower(shape)
        text = TextEncoder(tower)
    text.attn_mask = tower.build_causal_mask()
    if is_file:
        fill(text, read_open_clip(path, text.state_dict()))
        return text, skip_layers
    check_tokenizer(path, text)
    fill(text, read_transformers(path, shape, text.state_dict()))
    is_whole = model is not None and (shape.width, shape.layers) == tuple(
        model["text_cfg"][key] for key in ("width", "layers")
    )
    return text, skip_layers if is_whole else 0


def make_scheduler(config: DiffusionConfig, sampler: str, steps: int) -> Scheduler:
    """A diffusers scheduler whose `timesteps` are set, noisiest first; ValueError where `steps` cannot be taken.

    DDIM is the public implementation's: 50 of 1000 steps are 981, 961, ..., 1 and the last one ends at the noise
    level of t = 0. The others are what diffusers makes of its settings, so that an exported model behaves alike there.
    Zero terminal SNR needs the last timestep among them: 50 steps are then 999, 979, ..., 19 (Lin et al., 2305.08891,
    3.3). DPM-Solver++ and UniPC, which divide by the signal, get one of 2^-12 from diffusers there.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    scheduler: Scheduler = DDIMScheduler(
        num_train_timesteps=config.timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[config.prediction],
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing="trailing" if config.zero_terminal_snr else "leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    if sampler == "dpm++":
        scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    elif sampler == "unipc":
        scheduler = UniPCMultistepScheduler.from_config(scheduler.config)
    elif sampler != "ddim":
        raise ValueError(f"sampler: {sampler!r} is none of ddim, dpm++, unipc")
    scheduler.set_timesteps(steps)
    _check_timesteps(scheduler.timesteps.tolist(), config, sampler, steps)
    return scheduler


def _check_timesteps(timesteps: list[int], config: DiffusionConfig, sampler: str, steps: int) -> None:
    """Refuses what diffusers gets wrong in silence, naming `steps`."""
    # Trailing timesteps are rounded: DDIM, which goes back by timesteps // steps, would miss them, and for some numbers
    # of steps (61, 103, ...) there comes out one too many, -1.
    fits = config.timesteps % steps == 0 if sampler == "ddim" else len(timesteps) == steps
    if config.zero_terminal_snr and not fits:
        raise ValueError(
            f"steps: {steps} cannot be spaced over {config.timesteps} timesteps for {sampler} with zero_terminal_snr; "
            f"take a divisor of {config.timesteps}"
        )
    if timesteps[0] >= config.timesteps or len(set(timesteps)) < steps:
        raise ValueError(f"steps: {steps} are too many for {sampler} over {config.timesteps} timesteps")
