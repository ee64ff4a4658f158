"""The only door to a run folder: thin functions over fsspec, so that it may be a local path or any URL."""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple

import fsspec


class File(NamedTuple):
    """A file that was found; `version` changes when it is written anew."""

    path: str
    size: int
    version: str


def join(base: str, *parts: str) -> str:
    """Path of `parts` below `base`, for local paths and URLs alike."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def is_local(path: str) -> bool:
    """Whether `path` lies on this machine's own file system, where rename is atomic and files can be mapped."""
    return "://" not in path or path.startswith("file://")


def local_path(path: str) -> str:
    """`path` without its `file://`, for libraries that open files by themselves."""
    return path.removeprefix("file://")


def absolute(path: str) -> str:
    """A local path from the root, for processes that work in another folder; a URL as it is."""
    return os.path.abspath(local_path(path)) if is_local(path) else path


def resolve(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that `path` is on, and its own name of it; it never lists from memory, for others write too."""
    return fsspec.core.url_to_fs(path, use_listings_cache=False)


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, inner = resolve(path)
    return filesystem.exists(inner)


def is_file(path: str) -> bool:
    """Whether `path` is a file, links followed."""
    filesystem, inner = resolve(path)
    return filesystem.isfile(inner)


def is_folder(path: str) -> bool:
    """Whether `path` is a folder, links followed."""
    filesystem, inner = resolve(path)
    return filesystem.isdir(inner)


def listing(folder: str, suffix: str = "") -> list[str]:
    """Sorted names of the files in `folder` that end in `suffix`; a folder that does not exist is empty.

    Files that are still being written have names that begin with a dot and are left out.
    """
    return [name for name in _names(folder, "file") if name.endswith(suffix)]


def folders(folder: str) -> list[str]:
    """Sorted names of the folders in `folder`, hidden ones left out; a folder that does not exist is empty."""
    return _names(folder, "directory")


def matches(pattern: str) -> list[str]:
    """The files that a pattern with * stands for, sorted; none if there are none."""
    filesystem, inner = resolve(pattern)
    found = filesystem.glob(inner, detail=True).items()
    return sorted(_outer(filesystem, pattern, path) for path, entry in found if entry["type"] == "file")


def walk(folder: str) -> Iterator[list[File]]:
    """The files in `folder` and below, hidden ones left out, one folder's at a time, sorted by name."""
    filesystem, inner = resolve(folder)
    for base, folders, files in filesystem.walk(inner, detail=True):
        for name in sorted(folders):
            folders[name] = folders.pop(name)  # walked in this order
        yield [
            File(_outer(filesystem, folder, f"{base.rstrip('/')}/{name}"), info["size"], str(info))
            for name, info in sorted(files.items())
            if name and not name.startswith(".")  # an empty one marks the folder
        ]


def read_ranges(paths: Sequence[str], starts: Sequence[int], ends: Sequence[int]) -> list[bytes | Exception]:
    """Bytes `starts[k]` to before `ends[k]` of each path of one file system, or why not; remote ones concurrently."""
    if not paths:
        return []
    filesystem, _ = resolve(paths[0])
    inner = [resolve(path)[1] for path in paths]
    return filesystem.cat_ranges(inner, list(starts), list(ends), on_error="return")


def open_read(path: str, ahead: bool = True) -> BinaryIO:
    """Open a file for reading bytes, with seek; `ahead` reads more of a remote file than asked, in case it is next."""
    filesystem, inner = resolve(path)
    return filesystem.open(inner, "rb", **({} if ahead else {"cache_type": "none"}))


def read_bytes(path: str) -> bytes:
    """The whole of a file."""
    with open_read(path) as file:
        return file.read()


def read_many(paths: Sequence[str]) -> list[bytes]:
    """The whole of many small files of one file system, in the order given; remote ones are read concurrently."""
    if not paths:
        return []
    filesystem, _ = resolve(paths[0])
    inner = [resolve(path)[1] for path in paths]
    contents = filesystem.cat(inner, recursive=False)
    return [contents[path] for path in inner] if isinstance(contents, dict) else [contents]


def digest(path: str) -> str:
    """16 hex digits that stand for a file's content (blake2b)."""
    content = hashlib.blake2b(digest_size=8)
    with open_read(path) as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def fingerprint(path: str) -> str:
    """What changes when a file is written anew (size, time, tag), without reading it."""
    filesystem, inner = resolve(path)
    return str(filesystem.ukey(inner))


def read_json(path: str) -> Any:
    """The value in a JSON file; ValueError names the file if it is not JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def write_json(path: str, value: Any) -> None:
    """Write `value` as JSON, atomically; keys are sorted, so equal values give equal bytes."""
    with open_atomic(path) as file:
        file.write(_json(value))


def write_json_once(path: str, value: Any) -> Any:
    """Write `value` as JSON unless the file is there; returns what is there then, the same for all who try at once.

    A local file is linked to its name, which only one can do; an object store is asked to refuse a second put.
    """
    if not exists(path):
        with suppress(FileExistsError):
            _create(path, _json(value))
    return read_json(path)


def read_lines(path: str) -> list[Any]:
    """The values of a JSONL file."""
    return [json.loads(line) for line in read_bytes(path).splitlines()]


def write_lines(path: str, values: Sequence[Any]) -> None:
    """Write one JSON value a line, atomically."""
    with open_atomic(path) as file:
        file.write("".join(json.dumps(value, sort_keys=True) + "\n" for value in values).encode())


def remove(path: str) -> None:
    """Delete a file; one that is not there is no error."""
    filesystem, inner = resolve(path)
    if filesystem.exists(inner):
        filesystem.rm_file(inner)


def remove_folder(path: str) -> None:
    """Delete a folder and all in it; one that is not there is no error."""
    filesystem, inner = resolve(path)
    if filesystem.exists(inner):
        filesystem.rm(inner, recursive=True)


def sweep(folder: str) -> None:
    """Deletes what kills have left half-written below a local folder for longer than a day."""
    if not is_local(folder):
        return  # what goes to an object store is spooled in each machine's own folder for such files
    for base, folders, files in os.walk(local_path(folder)):
        for name in (name for name in folders + files if name.startswith(".") and name.endswith(".part")):
            path = os.path.join(base, name)
            with suppress(FileNotFoundError):
                if time.time() - os.path.getmtime(path) > 86_400:
                    shutil.rmtree(path) if name in folders else os.unlink(path)


def copy_folder(source: str, target: str) -> None:
    """Copy the files of a folder, each appearing whole, in order of their names."""
    for name in listing(source):
        with open_read(join(source, name)) as file, open_atomic(join(target, name)) as copy:
            shutil.copyfileobj(file, copy, 1 << 24)


@contextmanager
def open_atomic(path: str) -> Iterator[BinaryIO]:
    """Open a file for writing bytes that appears under `path` whole or, after an exception or a kill, not at all.

    On a local file system the bytes go to a temporary name beside `path`, which is then renamed; on an object
    store they are spooled on this machine and sent in one put, which such stores commit atomically.
    """
    if is_local(path):
        with _beside(local_path(path)) as file:
            yield file
        return
    filesystem, inner = resolve(path)
    with tempfile.NamedTemporaryFile() as spool:
        yield spool  # type: ignore[misc]
        spool.flush()
        filesystem.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
        filesystem.put_file(spool.name, inner)


@contextmanager
def _beside(path: str) -> Iterator[BinaryIO]:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _names(folder: str, kind: str) -> list[str]:
    filesystem, inner = resolve(folder)
    try:
        entries = filesystem.ls(inner, detail=True)
    except FileNotFoundError:
        return []
    paths = (entry["name"].rstrip("/") for entry in entries if entry["type"] == kind)
    names = (path.rsplit("/", 1)[-1] for path in paths if path != inner.rstrip("/"))  # an object marks its folder
    return sorted(name for name in names if not name.startswith("."))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _create(path: str, content: bytes) -> None:
    """Writes a file whole; FileExistsError if there is one."""
    filesystem, inner = resolve(path)
    filesystem.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
    if not is_local(path):
        filesystem.pipe_file(inner, content, mode="create")
        return
    temporary = _temporary(inner)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, inner)
    finally:
        os.unlink(temporary)


def _temporary(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{secrets.token_hex(4)}.part")


def _outer(filesystem: fsspec.AbstractFileSystem, like: str, inner: str) -> str:
    """A file system's own name of a file, written as `like` is: plain for local files, with its protocol elsewhere."""
    return filesystem.unstrip_protocol(inner) if "://" in like else inner
