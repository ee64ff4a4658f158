import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from t2v import shards
from t2v.config import UNetConfig
from t2v.shards import LatentInfo, write_shard
from t2v.unet import UNet

torch.backends.cudnn.allow_tf32 = False  # a GPU's fp32 is compared to 1e-5


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Gives every parameter, the zero-initialised ones too, random values that keep activations near 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return module


@pytest.fixture
def tiny_unet() -> UNet:
    """A UNet of two levels in eval mode whose every part acts on its output."""
    config = UNetConfig(block_out_channels=[16, 32], layers_per_block=1, head_dim=8, text_dim=24, norm_groups=8)
    return randomise(UNet(config)).eval()


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """A bucket of an object store on a loopback port, which this process finds by its environment."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
    yield "s3://bucket"
    os.environ.clear()
    os.environ |= before
    server.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a VAE and latents of both streams, as the preparation leaves them, and an image UNet."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from tests.t2v.train_ranks import job

    folder = tmp_path_factory.mktemp("data")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=4, **blocks).save_pretrained(folder / "vae")
    rng = np.random.default_rng(0)
    for stream, frames in (("images", 1), ("videos", 2)):
        info = LatentInfo(stream, (4, frames, 4, 4), shards.encoder_id(str(folder / "vae")), 1.0, "settings")
        for index in range(3):
            mean = rng.normal(size=(10, *info.shape)).astype(np.float16)
            names = [f"{stream} {index} {row}" for row in range(10)]
            path = str(folder / "data/latents" / stream / f"{index}.parquet")
            write_shard(path, info, names, names, mean, mean - 3, [3.0] * 10, [0.0] * 10, rows_per_group=5)
    unet = job("", 1).model.unet
    UNet2DConditionModel(
        block_out_channels=unet.block_out_channels, cross_attention_dim=16, attention_head_dim=[2, 4],
        norm_num_groups=8, layers_per_block=1, use_linear_projection=True,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    ).save_pretrained(folder / "start" / "unet")  # fmt: skip
    return folder
