"""Latent shards: one Parquet schema for both streams, written by the preparation and read by the training feed.

A row is a clip or a picture: the mean (and, if kept, the log-variance) of its VAE posterior, unscaled, as the
plain bytes of an fp16 array. Uncompressed fixed-size binary reads seven times faster than Arrow's tensor type;
row groups of about 100 rows are the unit of shuffled reading.

n rows, c channels, f frames, h w latent size (pixels / 8).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import compress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t2v import storage
from t2v.config import Stream
from t2v.digest import digest_of
from t2v.weights import named, weights_id

ROWS_PER_GROUP = 100
INDEX = "index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_KEY = b"latents"


@dataclass(frozen=True)
class LatentInfo:
    """What every row of a shard has in common; stored in the schema's metadata.

    `shape` is (c, f, h, w); `encoder` and `scale` tell the VAE and its latent scale (latent = scale * z);
    `data_hash` stands for the settings that made the rows.
    """

    stream: Stream
    shape: tuple[int, int, int, int]
    encoder: str
    scale: float
    data_hash: str
    dtype: str = "float16"

    @property
    def frames(self) -> int:
        return self.shape[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one mean or one log-variance."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Shard:
    """A shard as the training order needs it: where it is and how many rows each of its row groups has."""

    path: str
    row_groups: tuple[int, ...]
    info: LatentInfo

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True)
class ShardFile:
    """An open shard; `read_rows` reads any of its row groups."""

    path: str
    parquet: pq.ParquetFile
    info: LatentInfo


@dataclass(frozen=True)
class Rows:
    """Rows of a shard: mean and logvar are fp16 [n, c, f, h, w], read-only views of Arrow's buffers."""

    row_id: list[str]
    caption: list[str]
    mean: np.ndarray
    logvar: np.ndarray | None
    fps: np.ndarray
    start_s: np.ndarray

    def __len__(self) -> int:
        return len(self.row_id)

    def __getitem__(self, rows: slice) -> "Rows":
        logvar = None if self.logvar is None else self.logvar[rows]
        return Rows(self.row_id[rows], self.caption[rows], self.mean[rows], logvar, self.fps[rows], self.start_s[rows])


def encoder_id(vae: str | None) -> str:
    """What names a VAE in shards: the digest of its weights, those of a diffusers folder or the checkpoint they are in.

    ValueError or FileNotFoundError, naming the config key, where there are none.
    """
    if vae is None:
        raise ValueError("model.vae is not set: give the path of a diffusers AutoencoderKL folder")
    with named("model.vae"):
        return weights_id(vae, "vae")


def latent_schema(info: LatentInfo, keep_variance: bool) -> pa.Schema:
    """The Parquet schema of a shard, its metadata included."""
    latent = pa.binary(info.row_bytes)
    fields = [pa.field("row_id", pa.string()), pa.field("caption", pa.string()), pa.field("mean", latent)]
    if keep_variance:
        fields.append(pa.field("logvar", latent))
    fields += [pa.field("fps", pa.float32()), pa.field("start_s", pa.float32())]
    return pa.schema(fields, metadata={_KEY: json.dumps(asdict(info) | {"frames": info.frames}, sort_keys=True)})


def write_shard(
    path: str,
    info: LatentInfo,
    row_id: Sequence[str],
    caption: Sequence[str],
    mean: np.ndarray,
    logvar: np.ndarray | None,
    fps: Sequence[float],
    start_s: Sequence[float],
    rows_per_group: int = ROWS_PER_GROUP,
) -> Shard:
    """Write one shard atomically; equal input gives equal bytes.

    `mean` and `logvar` are fp16 [n, c, f, h, w]; `fps` and `start_s` tell the source's frame rate and where in
    it the clip begins (0 for pictures). ValueError if an array's shape or type is not the one of `info`.
    """
    rows = Rows(list(row_id), list(caption), mean, logvar, np.asarray(fps), np.asarray(start_s))
    table = rows_table(path, info, rows)
    with storage.open_atomic(path) as file:
        # Neither dictionaries nor statistics: both would copy whole latents into places that nobody reads.
        pq.write_table(
            table,
            file,
            row_group_size=rows_per_group,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
    full, rest = divmod(len(row_id), rows_per_group)
    return Shard(path, (rows_per_group,) * full + ((rest,) if rest else ()), info)


def rows_table(name: str, info: LatentInfo, rows: Rows) -> pa.Table:
    """Rows as a table of a shard's schema; ValueError, which begins with `name`, if their latents are not of `info`."""
    schema = latent_schema(info, keep_variance=rows.logvar is not None)
    columns = dict(vars(rows)) | {"mean": _packed(name, "mean", rows.mean, info, len(rows))}
    if rows.logvar is not None:
        columns["logvar"] = _packed(name, "logvar", rows.logvar, info, len(rows))
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def open_shard(path: str, verify: bool = True) -> ShardFile:
    """Open a shard and read its footer; ValueError names the file and the column or metadata that is wrong.

    `verify` compares what is then read with its checksums, which takes twice the time of reading.
    """
    try:
        if storage.is_local(path):
            parquet = pq.ParquetFile(storage.local_path(path), memory_map=True, page_checksum_verification=verify)
        else:
            parquet = pq.ParquetFile(storage.open_read(path), pre_buffer=True, page_checksum_verification=verify)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from error
    return ShardFile(path, parquet, _checked_info(path, parquet.schema_arrow))


def read_rows(shard: str | ShardFile, group: int) -> Rows:
    """Read one row group, all columns; latents are views of Arrow's buffers and are not copied again.

    OSError or ValueError if there is no such group, or if what is read does not agree with its checksum.
    """
    shard = open_shard(shard) if isinstance(shard, str) else shard
    return table_rows(shard.parquet.read_row_group(group), shard.info)


def read_shard(path: str) -> Rows:
    """Read a whole shard; its latents are copied."""
    shard = open_shard(path)
    table = shard.parquet.read().combine_chunks()
    return table_rows(table, shard.info)


def digest_rows(rows: Rows) -> str:
    """16 hex digits that stand for what a shard holds, however its file is laid out."""
    content = hashlib.blake2b(digest_size=8)
    columns = [rows.row_id, rows.caption, rows.fps.tolist(), rows.start_s.tolist()]
    content.update(json.dumps(columns).encode())
    for latents in (rows.mean, rows.logvar):
        if latents is not None:
            content.update(np.ascontiguousarray(latents).data)
    return content.hexdigest()


def drop_rows(path: str, unwanted: Callable[[str], bool]) -> tuple[Shard, str]:
    """Write a shard anew, atomically, without the rows whose row_id is unwanted; also gives the new `digest_rows`."""
    info, rows = open_shard(path).info, read_shard(path)
    wanted = np.array([not unwanted(row_id) for row_id in rows.row_id], bool)
    kept = Rows(
        row_id=list(compress(rows.row_id, wanted)),
        caption=list(compress(rows.caption, wanted)),
        mean=rows.mean[wanted],
        logvar=None if rows.logvar is None else rows.logvar[wanted],
        fps=rows.fps[wanted],
        start_s=rows.start_s[wanted],
    )
    return write_shard(path, info, **vars(kept)), digest_rows(kept)


def latents_folder(data_dir: str, stream: str, also_size: int | None = None) -> str:
    """Where the latents of a stream lie in a run's data folder: of `data.size`, or of one of `data.also_sizes`."""
    return storage.join(data_dir, f"latents_{also_size}" if also_size else "latents", stream)


def latents_path(data_dir: str, stream: str, name: str, also_size: int | None = None) -> str:
    """The file of a shard in that folder."""
    return storage.join(latents_folder(data_dir, stream, also_size), f"{name}.parquet")


def info_in(folder: str) -> LatentInfo | None:
    """What the rows of a folder's shards have in common, by its index or else by the first shard; None without any."""
    index = storage.join(folder, INDEX)
    if storage.exists(index):
        return info_from_json(storage.read_json(index)["info"])
    first = storage.listing(folder, ".parquet")[:1]
    return _from_footer(storage.join(folder, first[0])).info if first else None


def list_shards(folder: str) -> list[Shard]:
    """The shards of a stream that hold rows, sorted by name.

    A folder that the preparation has finished has an index, which is one read however many shards there are
    and leaves out shards of earlier settings; without it every footer is read. ValueError if the shards do not
    belong together, FileNotFoundError if there are none.
    """
    if storage.exists(storage.join(folder, INDEX)):
        shards = from_index(folder, storage.read_json(storage.join(folder, INDEX)))
    else:
        shards = [_from_footer(storage.join(folder, name)) for name in storage.listing(folder, ".parquet")]
    shards = [shard for shard in shards if shard.rows]
    if not shards:
        raise FileNotFoundError(f"{folder}: no latent shards with rows; run jobs/prepare_data.py first")
    for shard in shards[1:]:
        if shard.info != shards[0].info:
            raise ValueError(f"{shard.path} and {shards[0].path} were made with different settings or encoders")
    return shards


def write_index(folder: str, shards: Sequence[Shard]) -> None:
    """Write the list of a folder's current shards, at least one, which `list_shards` then reads for all footers."""
    storage.write_json(storage.join(folder, INDEX), index_of(shards))


def index_of(shards: Sequence[Shard]) -> dict:
    """A list of shards of one folder, at least one, as JSON."""
    groups = {shard.path.rsplit("/", 1)[-1]: shard.row_groups for shard in shards}
    return {"info": asdict(shards[0].info), "row_groups": groups}


def digest_shards(shards: Sequence[Shard]) -> str:
    """16 hex digits for shards of one folder, at least one: their names, which stand for their content, and rows."""
    return digest_of(index_of(shards))


def from_index(folder: str, index: dict) -> list[Shard]:
    """The shards of a list that `index_of` made, sorted by name."""
    info = info_from_json(index["info"])
    return [
        Shard(storage.join(folder, name), tuple(groups), info) for name, groups in sorted(index["row_groups"].items())
    ]


def info_from_json(value: dict) -> LatentInfo:
    """LatentInfo as it was written to JSON."""
    return LatentInfo(
        stream=value["stream"],
        shape=tuple(value["shape"]),
        encoder=value["encoder"],
        scale=value["scale"],
        data_hash=value["data_hash"],
        dtype=value["dtype"],
    )


def table_rows(table: pa.Table, info: LatentInfo) -> Rows:
    """The rows of such a table; their latents are views of Arrow's buffers where a column is in one piece."""
    has_variance = "logvar" in table.column_names
    return Rows(
        row_id=table.column("row_id").to_pylist(),
        caption=table.column("caption").to_pylist(),
        mean=_unpacked(table.column("mean"), info),
        logvar=_unpacked(table.column("logvar"), info) if has_variance else None,
        fps=table.column("fps").to_numpy(),
        start_s=table.column("start_s").to_numpy(),
    )


def _from_footer(path: str) -> Shard:
    shard = open_shard(path)
    footer = shard.parquet.metadata
    groups = tuple(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    shard.parquet.close()
    return Shard(path, groups, shard.info)


def _checked_info(path: str, schema: pa.Schema) -> LatentInfo:
    if _KEY not in (schema.metadata or {}):
        raise ValueError(f"{path}: no metadata {_KEY.decode()!r}: this is no latent shard")
    info = info_from_json(json.loads(schema.metadata[_KEY]))
    wanted = latent_schema(info, keep_variance="logvar" in schema.names)
    for field in wanted:
        if field.name not in schema.names:
            raise ValueError(f"{path}: column {field.name!r} is missing; columns are {', '.join(schema.names)}")
        if schema.field(field.name).type != field.type:
            found = schema.field(field.name).type
            raise ValueError(f"{path}: column {field.name!r} is {found}, but shape {info.shape} needs {field.type}")
    return info


def _packed(path: str, name: str, latent: np.ndarray, info: LatentInfo, rows: int) -> pa.Array:
    if latent.shape != (rows, *info.shape) or latent.dtype != np.dtype(info.dtype):
        wanted = f"{info.dtype} {(rows, *info.shape)}"
        raise ValueError(f"{path}: {name} is {latent.dtype} {latent.shape}, but the shard needs {wanted}")
    buffer = pa.py_buffer(np.ascontiguousarray(latent))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(info.row_bytes), rows, [None, buffer])


def _unpacked(column: pa.ChunkedArray, info: LatentInfo) -> np.ndarray:
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not len(array):
        return np.empty((0, *info.shape), info.dtype)
    values = len(array) * int(np.prod(info.shape))
    flat = np.frombuffer(array.buffers()[1], info.dtype, count=values, offset=array.offset * info.row_bytes)
    return flat.reshape(len(array), *info.shape)
