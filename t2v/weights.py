"""Tensors as others have written them: safetensors or PyTorch pickles, alone or as a folder's one file or many shards.

A pickle from outside is never executed. torch's restricted reader takes tensors and plain containers alone; for other
classes, such as those that Lightning leaves beside the weights, it is given stand-ins that keep nothing and do nothing.

torch is imported where it is used: which files a folder's weights are (`weight_files`) is asked where nobody needs it.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from t2v import storage

if TYPE_CHECKING:
    from torch import Tensor, nn

DIFFUSERS_STEMS = ("diffusion_pytorch_model",)
TRANSFORMERS_STEMS = ("model", "pytorch_model")
_ZIP, _OLD_PICKLE = b"PK\x03\x04", b"\x80\x02"
_SHOWN = 8  # problems that a message spells out


@contextmanager
def named(key: str) -> Iterator[None]:
    """Puts the config key that gave a path before the message of what is wrong with it."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def part(folder: str, name: str) -> str:
    """The folder of one network, given that folder itself or the pipeline's that holds it under `name`."""
    inside = storage.join(folder, name)
    return inside if storage.exists(storage.join(inside, "config.json")) else folder


def weight_files(folder: str, stems: Sequence[str] = DIFFUSERS_STEMS) -> list[str]:
    """The files that hold the weights of a folder as diffusers and transformers name them: one, or an index's shards.

    Full precision is taken before fp16, safetensors before pickles. FileNotFoundError if there are none or a shard is
    missing, ValueError if the index names files outside the folder.
    """
    for name in _names(stems):
        path = storage.join(folder, name)
        if storage.exists(path):
            return _shards(path, folder) if name.endswith(".json") else [path]
    raise FileNotFoundError(f"{folder} has no {stems[0]}.safetensors, nor fp16, sharded or .bin weights in its place")


def network_files(path: str, name: str) -> list[str]:
    """The files that hold the weights of a network: `path` itself, or those of a folder as `part` finds it.

    FileNotFoundError or ValueError as `weight_files`, or where there is nothing.
    """
    if not storage.exists(path):
        raise FileNotFoundError(f"there is no file or folder {path}")
    return [path] if storage.is_file(path) else weight_files(part(path, name))


def weights_id(path: str, name: str) -> str:
    """What names the weights of a network: the digest of the content of `network_files`."""
    digests = [storage.digest(file) for file in network_files(path, name)]
    return digests[0] if len(digests) == 1 else hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()


def _names(stems: Sequence[str]) -> Iterator[str]:
    for variant in ("", ".fp16"):
        for kind in ("safetensors", "bin"):
            for stem in stems:
                yield f"{stem}{variant}.{kind}"
                yield f"{stem}.{kind}.index{variant}.json"
                yield f"{stem}{variant}.{kind}.index.json"
                yield f"{stem}.{kind}{variant}.index.json"  # as diffusers wrote it before 0.31


def _shards(index: str, folder: str) -> list[str]:
    if not isinstance(places := storage.read_json(index).get("weight_map"), dict):
        raise ValueError(f"{index}: no weight_map, which would tell the shards")
    names = sorted(set(map(str, places.values())))
    if strange := [name for name in names if "/" in name or "\\" in name]:
        raise ValueError(f"{index}: {strange[0]!r} is no file of this folder")
    paths = [storage.join(folder, name) for name in names]
    if missing := [path for path in paths if not storage.exists(path)]:
        raise FileNotFoundError(f"{index}: {_listed(missing)} missing")
    return paths


def read_folder(folder: str, stems: Sequence[str] = DIFFUSERS_STEMS) -> dict[str, "Tensor"]:
    """All tensors of a folder's weights, by name; as `weight_files` finds and `read_tensors` reads them."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, stems):
        more = read_tensors(path)
        if twice := tensors.keys() & more.keys():
            raise ValueError(f"{path}: {_listed(sorted(twice))} in another shard too")
        tensors |= more
    return tensors


def read_tensors(path: str) -> dict[str, "Tensor"]:
    """The tensors of a file by name, as they are stored; a local file is mapped into memory, not copied.

    What kind of file it is, its first bytes tell. A pickle may hold the tensors plain or under `state_dict`.
    FileNotFoundError, or ValueError if the file holds something else.
    """
    if not storage.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    with storage.open_read(path) as file:
        head = file.read(9)
    if head[8:] == b"{":
        return _read_safetensors(path)
    if head.startswith((_ZIP, _OLD_PICKLE)):
        return _state_dict(_read_pickle(path, zipped=head.startswith(_ZIP)), path)
    raise ValueError(f"{path}: neither safetensors nor a file of torch.save")


def _read_safetensors(path: str) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        return load_file(storage.local_path(path)) if storage.is_local(path) else load(storage.read_bytes(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: not safetensors ({error})") from error


class _Inert:
    """Takes the place of an object of an unknown class: made of anything, and nothing comes of it."""

    def __new__(cls, *_: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _InertDict:
    """The same where the unknown class is a dict: only of a plain one does torch's reader let items be set."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def _read_pickle(path: str, zipped: bool) -> Any:
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    local = storage.is_local(path)
    source: Any = storage.local_path(path) if local else io.BytesIO(storage.read_bytes(path))
    try:
        unknown = get_unsafe_globals_in_checkpoint(source) if zipped else []
        stand_ins: list[Any] = [(_InertDict if name.lower().endswith("dict") else _Inert, name) for name in unknown]
        if not local:
            source.seek(0)
        with safe_globals(stand_ins):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped and local)
    except UnpicklingError as error:
        reason = str(error).split("\n")[-1] if "WeightsUnpickler error" in str(error) else error
        raise ValueError(f"{path}: holds more than tensors, and is not executed ({reason})") from error
    except Exception as error:  # whatever a broken or hostile file makes of the reader
        raise ValueError(f"{path}: cannot be read as a file of torch.save ({error})") from error


def _state_dict(content: Any, path: str) -> dict[str, "Tensor"]:
    from torch import Tensor

    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds {type(content).__name__}, not named tensors")
    if others := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path}: {_listed(others)} not tensors")
    return dict(content)


def under(prefix: str, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fitted(
    tensors: Mapping[str, "Tensor"], names: Mapping[str, str], like: Mapping[str, "Tensor"], where: str
) -> dict[str, "Tensor"]:
    """`tensors` under the names and in the shapes of a module, one to one; nothing is left over on either side.

    `names` gives for each name of the module, or for those wanted, the one in `tensors`; `like` is its state dict. A
    convolution of one tap is the same as a linear layer: axes of size 1 at the end of a shape may be there or not.
    ValueError names the first eight that do not fit, by the names they have in `where`, and counts the others.
    """
    shapes = {name: like[name].shape for name in names}
    problems = [f"{name} is missing" for name in set(names.values()) - tensors.keys()]
    problems += [f"{name} is not in the model" for name in tensors.keys() - set(names.values())]
    for ours, shape in shapes.items():
        tensor = tensors.get(names[ours])
        if tensor is not None and _without_ones(tensor.shape) != _without_ones(shape):
            problems.append(f"{names[ours]} is {list(tensor.shape)}, not {list(shape)}")
        elif tensor is not None and not tensor.is_floating_point():
            problems.append(f"{names[ours]} holds {tensor.dtype}, not numbers in floating point")
    if problems:
        raise ValueError(f"{where}: {_listed(sorted(problems), '; ')}")
    return {ours: tensors[names[ours]].reshape(shape) for ours, shape in shapes.items()}


def fill(module: "nn.Module", tensors: Mapping[str, "Tensor"]) -> None:
    """Gives a module built on the meta device all its weights, as fp32 copies of `tensors`, which may be mapped."""
    import torch

    copies = {
        name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    module.load_state_dict(copies, assign=True)


def _without_ones(shape: Sequence[int]) -> list[int]:
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
