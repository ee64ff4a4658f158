"""Files and folders of tensors as others write them, and pickles that try to do something."""

import io
import json
import os
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from t2v.weights import fitted, read_folder, read_tensors, weight_files

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1).half()}
STEM = "diffusion_pytorch_model"


class ModelCheckpoint:
    """What Lightning leaves in a checkpoint: an object whose class is not installed where it is read."""

    def __init__(self) -> None:
        self.best, self.scores = "last.ckpt", {"loss": 0.5}


class AttributeDict(dict):
    """Lightning's hyperparameters."""


class Execute:
    """Pickles into a call of `function(*arguments)`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("wrapped", [False, True])
def test_both_kinds_of_files_are_told_by_their_content(tmp_path: Path, wrapped: bool) -> None:
    save_file(TENSORS, tmp_path / "some.pth")
    torch.save({"state_dict": TENSORS, "step": 3} if wrapped else OrderedDict(TENSORS), tmp_path / "some.ckpt")
    assert same(read_tensors(str(tmp_path / "some.pth")), TENSORS)
    assert same(read_tensors(str(tmp_path / "some.ckpt")), TENSORS)


def test_files_of_old_torch_and_of_an_object_store_are_read(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_tensors(str(tmp_path / "old.pth")), TENSORS)
    leftovers = io.BytesIO()
    torch.save({"state_dict": TENSORS, "callbacks": {ModelCheckpoint: ModelCheckpoint()}}, leftovers)
    fsspec.filesystem("memory").pipe_file("/weights/new.ckpt", leftovers.getvalue())
    assert same(read_tensors("memory://weights/new.ckpt"), TENSORS)


def test_a_local_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    large = {"x": torch.zeros(8 << 20)}
    torch.save(large, tmp_path / "large.pth")
    before = _private_kib()
    read = read_tensors(str(tmp_path / "large.pth"))
    assert _private_kib() - before < 16 << 10  # of 32 MiB
    assert same(read, large)


def _private_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def test_what_lightning_leaves_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    beside = {
        "callbacks": {ModelCheckpoint: ModelCheckpoint()},
        "hyper_parameters": AttributeDict(rate=1e-4, path=Path("logs")),
        "loops": defaultdict(dict, fit={"epoch": 1}),
        "best": ModelCheckpoint(),
    }
    torch.save({"state_dict": TENSORS} | beside, tmp_path / "lightning.ckpt")
    with pytest.raises(pickle.UnpicklingError):  # as torch alone would have it
        torch.load(tmp_path / "lightning.ckpt", weights_only=True)
    assert same(read_tensors(str(tmp_path / "lightning.ckpt")), TENSORS)


@pytest.mark.parametrize("place", ["beside", "among"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("attack", ["system", "open", "exec", "apply"])
def test_a_pickle_is_never_executed(tmp_path: Path, attack: str, zipped: bool, place: str) -> None:
    target = tmp_path / "executed"
    call = {
        "system": (os.system, f"touch {target}"),
        "open": (open, str(target), "w"),
        "exec": (exec, f"open({str(target)!r}, 'w')"),
        "apply": (map, open, [str(target)]),
    }[attack]
    evil = Execute(*call)
    content = {"state_dict": TENSORS, "evil": evil} if place == "beside" else TENSORS | {"evil": evil}
    path = tmp_path / "evil.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    target.unlink(missing_ok=True)  # should pickling itself have made it
    if zipped and place == "beside" and attack != "system":
        assert same(read_tensors(str(path)), TENSORS)
    else:
        with pytest.raises(ValueError, match="evil.ckpt"):
            read_tensors(str(path))
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>", "neither safetensors nor a file of torch.save"),
        (b"PK\x03\x04 and no more", "cannot be read as a file of torch.save"),
        (b"\x80\x00\x00\x00\x00\x00\x00\x00{no json", "not safetensors"),
        ([1, 2], "holds list, not named tensors"),
        (TENSORS | {"epoch": 3, "name": "x"}, "epoch, name not tensors"),
    ],
)
def test_what_is_no_file_of_tensors_is_named(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"weights.pth: {message}"):
        read_tensors(str(path))
    with pytest.raises(FileNotFoundError, match="nowhere.pth: there is no such file"):
        read_tensors(str(tmp_path / "nowhere.pth"))


def shard(folder: Path, index: str, kind: str, prefix: str) -> None:
    names = [f"{prefix}-0000{number}-of-00002.{kind}" for number in (1, 2)]
    for name, (key, tensor) in zip(names, TENSORS.items(), strict=True):
        save_file({key: tensor}, folder / name) if kind == "safetensors" else torch.save({key: tensor}, folder / name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict(zip(TENSORS, names, strict=True))}))


@pytest.mark.parametrize(
    ("index", "kind", "prefix"),
    [
        (f"{STEM}.safetensors.index.json", "safetensors", STEM),
        (f"{STEM}.safetensors.index.fp16.json", "safetensors", f"{STEM}.fp16"),
        (f"{STEM}.fp16.safetensors.index.json", "safetensors", f"{STEM}.fp16"),
        (f"{STEM}.safetensors.fp16.index.json", "safetensors", f"{STEM}.fp16"),
        (f"{STEM}.bin.index.json", "bin", STEM),
    ],
)
def test_shards_are_read_by_their_index(tmp_path: Path, index: str, kind: str, prefix: str) -> None:
    shard(tmp_path, index, kind, prefix)
    assert same(read_folder(str(tmp_path)), TENSORS)


def test_full_precision_comes_before_half_and_safetensors_before_pickles(tmp_path: Path) -> None:
    for name in (f"{STEM}.bin", f"{STEM}.fp16.bin", f"{STEM}.fp16.safetensors", f"{STEM}.safetensors"):
        (tmp_path / name).touch()
    for expected in (f"{STEM}.safetensors", f"{STEM}.bin", f"{STEM}.fp16.safetensors", f"{STEM}.fp16.bin"):
        assert weight_files(str(tmp_path)) == [f"{tmp_path}/{expected}"]
        (tmp_path / expected).unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} has no {STEM}.safetensors"):
        weight_files(str(tmp_path))


def test_faults_of_shards_are_named(tmp_path: Path) -> None:
    index = f"{STEM}.safetensors.index.json"
    shard(tmp_path, index, "safetensors", STEM)
    save_file(TENSORS, tmp_path / f"{STEM}-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"00002-of-00002.safetensors: a\.weight in another shard too"):
        read_folder(str(tmp_path))
    (tmp_path / f"{STEM}-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json: .*00002-of-00002.safetensors missing"):
        read_folder(str(tmp_path))
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"'../secret.safetensors' is no file of this folder"):
        read_folder(str(tmp_path))
    (tmp_path / index).write_text("{}")
    with pytest.raises(ValueError, match="index.json: no weight_map"):
        read_folder(str(tmp_path))


def test_tensors_fit_one_to_one_or_the_misfits_are_named_and_counted() -> None:
    like = {"w": torch.zeros(2, 3, 1, 1), "v": torch.zeros(4)}
    names = {"w": "their.w", "v": "their.v"}
    given = {"their.w": torch.ones(2, 3), "their.v": torch.ones(4)}
    fit = fitted(given, names, like, "file")
    assert {name: tensor.shape for name, tensor in fit.items()} == {"w": (2, 3, 1, 1), "v": (4,)}
    wrong = {"their.w": torch.ones(3, 2), "their.v": torch.ones(4, dtype=torch.int8)}
    with pytest.raises(
        ValueError, match=r"file: their\.v holds torch.int8.*; their\.w is \[3, 2\], not \[2, 3, 1, 1\]$"
    ):
        fitted(wrong, names, like, "file")
    extra = given | {f"extra.{index}": torch.ones(1) for index in range(10)}
    with pytest.raises(ValueError, match=r"file: extra\.0 is not in the model; .*; extra\.7 is .*, and 2 more$"):
        fitted(extra, names, like, "file")
