"""Media that is there already as input: WebDataset tars, also those of img2dataset and video2dataset, and folders.

Nothing is extracted. A row's url is the address of its bytes, such as "00000.tar#offset=1536&size=52110&name=012.jpg"
or "pictures/a.jpg#size=52110", and the fetch stage reads just them. Only rows of this module are read in that way: in a
manifest of URLs such an address is no URL.

Tars come from strangers: their headers are bounded, and a sample that is not plain bytes (a link, a sparse file, a part
beyond the end, no media at all) stays a row, whose address says why it is refused.
"""

import hashlib
import json
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, get_args
from urllib.parse import parse_qs, quote, urlencode

import pyarrow as pa

from pipelines.fetch import Fetched, FetchError, checked_media
from pipelines.ledger import Status
from pipelines.tables import reader_of
from t2v import storage

_PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"}
_VIDEOS = {"mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "ogv", "wmv"}
_MEDIA = _PICTURES | _VIDEOS
_BATCH_ROWS = 1000
_MAX_HEADER_BYTES = 1 << 16  # of a member's name and its extended header
_MAX_TEXT_BYTES = 1 << 20  # of a .txt or a .json
_MAX_PARTS = 64  # members of one sample
_COLUMNS = {
    "url": pa.string(),
    "caption": pa.string(),
    "duration_s": pa.float64(),
    "width": pa.float64(),
    "height": pa.float64(),
}
COLUMNS = tuple(_COLUMNS)


def is_archive(path: str) -> bool:
    """Whether a manifest is media itself: a tar, a pattern such as `tars/*.tar`, or a folder of tars or of media.

    A folder of tables without a tar is a manifest of URLs.
    """
    if path.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ValueError(f"{path}: members of a compressed tar cannot be read one by one; decompress it first")
    if path.endswith(".tar") or not storage.is_folder(path):
        return path.endswith(".tar")
    names = storage.listing(path)
    return any(name.endswith(".tar") for name in names) or not any(map(reader_of, names))


def archive_fingerprint(path: str) -> str:
    """What changes when an archive does: the names or the versions of its tars or files; FileNotFoundError for none."""
    content = hashlib.blake2b(digest_size=16)
    for tar in _tars(path):
        content.update(f"{tar}\0{storage.fingerprint(tar)}\0".encode(errors="replace"))
    if not _tars(path):
        for files in storage.walk(path):
            content.update(str(files).encode(errors="replace"))
    return content.hexdigest()


def read_archive(path: str) -> Iterator[pa.RecordBatch]:
    """Stream an archive's samples as batches of COLUMNS, in the order of the archive.

    Captions are those of .txt members or files, else of the "caption" in .json. FileNotFoundError, at once, where
    there is neither a tar nor a folder.
    """
    tars = _tars(path)
    samples = (sample for tar in tars for sample in _tar_samples(tar)) if tars else _folder_samples(path)
    return _batches(sample.row() for sample in samples)


def read_members(urls: Sequence[str], max_bytes: int) -> list[Fetched]:
    """The bytes at addresses that `read_archive` gave, in the same order; never raises for an address."""
    begun = time.monotonic()
    places = [_place(url, max_bytes) for url in urls]
    wanted = [place for place in places if isinstance(place, _Place)]
    read = storage.read_ranges(
        [place.path for place in wanted],
        [place.offset for place in wanted],
        [place.offset + place.size for place in wanted],
    )
    bodies = iter(zip(wanted, read, strict=True))
    seconds = (time.monotonic() - begun) / max(1, len(urls))
    return [
        Fetched(b"", place.status, place.message, seconds)
        if isinstance(place, FetchError)
        else _checked(*next(bodies), max_bytes, seconds)
        for place in places
    ]


@dataclass
class _Sample:
    """What belongs together under one key: the media's address, its caption and what is known of it."""

    key: str
    path: str
    place: dict[str, Any] = field(default_factory=dict)
    caption: str | None = None
    known: dict = field(default_factory=dict)
    parts: int = 0

    def refuse(self, status: Status, why: str) -> None:
        if "refused" not in self.place:
            self.place = {"refused": status, "why": why, "name": self.key}

    def row(self) -> dict[str, Any]:
        if not self.place:
            self.refuse("not_media", "no picture or video under this key")
        numbers = {
            "duration_s": self.known.get("duration"),
            "width": self.known.get("width"),
            "height": self.known.get("height"),
        }
        caption = self.known.get("caption") if self.caption is None else self.caption
        return {
            "url": f"{self.path}#{urlencode(self.place, quote_via=quote, errors='replace')}",
            "caption": caption if isinstance(caption, str) else "",
            **{name: value if _is_number(value) else None for name, value in numbers.items()},
        }


@dataclass(frozen=True)
class _Place:
    path: str
    offset: int
    size: int


class _BoundedHeaders:
    """A tar's file as tarfile sees it, which reads nothing but headers: none longer than they reasonably are."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _tars(path: str) -> list[str]:
    """The tars of an archive, none of a folder of media; FileNotFoundError where there is neither."""
    if storage.is_folder(path):
        return [storage.join(path, name) for name in storage.listing(path, ".tar")]
    tars = [path] if storage.is_file(path) else storage.matches(path)
    if not tars:
        raise FileNotFoundError(f"{path}: no such tar or folder")
    return tars


def _tar_samples(path: str) -> Iterator[_Sample]:
    """Samples as WebDataset has them: members that follow each other and share the name up to its first dot."""
    sample: _Sample | None = None
    with storage.open_read(path) as file:
        end = file.seek(0, 2)
        file.seek(0)
        for member in _members(path, file):
            if isinstance(member, str):
                if sample:
                    yield sample
                sample = _Sample(member, path)
                sample.refuse("corrupt", member)
                break
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if sample is None or sample.key != key:
                if sample:
                    yield sample
                sample = _Sample(key, path)
            _take(sample, member, extension.lower(), file, end)
    if sample:
        yield sample


def _members(path: str, file: BinaryIO) -> Iterator[tarfile.TarInfo | str]:
    """The members of a tar but its folders, and last, where it cannot be read to its end, why."""
    offset = -1
    try:
        with tarfile.open(fileobj=_BoundedHeaders(file), mode="r:", errors="replace") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                if member.size < 0 or member.offset <= offset:
                    raise tarfile.ReadError("a member that leads backwards")
                offset = member.offset
                tar.members.clear()  # or every member of every tar stayed in memory
                tar.pax_headers.clear()
                if not member.isdir():
                    yield member
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # for tarfile anything unreadable is the end
                raise tarfile.ReadError("neither a member nor the mark of the end follows")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        yield f"cannot be read after byte {max(0, offset)}: {type(error).__name__} {error}"


def _take(sample: _Sample, member: tarfile.TarInfo, extension: str, file: BinaryIO, end: int) -> None:
    """Add one member to its sample, or refuse the sample for it."""
    sample.parts += 1
    if sample.parts > _MAX_PARTS:
        sample.refuse("corrupt", f"more than {_MAX_PARTS} members under one key")
    elif extension not in _MEDIA and extension not in ("txt", "json"):
        return
    elif member.islnk() or member.issym():
        sample.refuse("forbidden_address", f"{member.name} is a link")
    elif not member.isreg() or member.issparse():
        sample.refuse("not_media", f"{member.name} is not stored as plain bytes")
    elif member.offset_data + member.size > end:
        sample.refuse("corrupt", f"{member.name} goes on beyond the end of the tar")
    elif extension in _MEDIA:
        if not sample.place:
            sample.place = {"offset": member.offset_data, "size": member.size, "name": member.name}
    elif member.size <= _MAX_TEXT_BYTES:
        file.seek(member.offset_data)
        _describe(sample, extension, file.read(member.size))


def _folder_samples(folder: str) -> Iterator[_Sample]:
    """Media files and what lies beside each under the same name: a.jpg, a.txt, a.json."""
    for files in storage.walk(folder):
        sizes = {file.path: file.size for file in files}
        for file in files:
            stem, _, extension = file.path.rpartition(".")
            if extension.lower() not in _MEDIA:
                continue
            sample = _Sample(file.path, file.path, {"size": file.size})
            for kind in ("txt", "json"):
                if sizes.get(beside := f"{stem}.{kind}", _MAX_TEXT_BYTES + 1) <= _MAX_TEXT_BYTES:
                    _describe(sample, kind, storage.read_bytes(beside))
            yield sample


def _describe(sample: _Sample, kind: str, content: bytes) -> None:
    text = content.decode(errors="replace")
    if kind == "txt":
        sample.caption = text
        return
    try:
        known = json.loads(text)
    except (ValueError, RecursionError):
        return
    sample.known = known if isinstance(known, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**31


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    schema = pa.schema(list(_COLUMNS.items()))
    pending: list[dict[str, Any]] = []
    for row in rows:
        pending.append(row)
        if len(pending) == _BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(pending, schema)
            pending = []
    if pending:
        yield pa.RecordBatch.from_pylist(pending, schema)


def _place(url: str, max_bytes: int) -> _Place | FetchError:
    path, _, address = url.rpartition("#")
    said = {name: values[0] for name, values in parse_qs(address).items()}
    if said.get("refused") in get_args(Status):
        return FetchError(said["refused"], said.get("why", ""))  # type: ignore[arg-type]
    place = _Place(path, int(said.get("offset", 0)), int(said["size"]))
    if place.size > max_bytes:
        return FetchError("too_large", f"{place.size:,} bytes")
    return place


def _checked(place: _Place, read: bytes | Exception, max_bytes: int, seconds: float) -> Fetched:
    try:
        if isinstance(read, Exception):
            raise FetchError("connection", f"{type(read).__name__}: {read}")
        if len(read) < place.size:
            raise FetchError("corrupt", f"{len(read):,} of {place.size:,} bytes")
        return Fetched(checked_media(read, "", max_bytes), "ok", "", seconds)
    except FetchError as error:
        return Fetched(b"", error.status, error.message, seconds)
