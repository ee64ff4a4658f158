"""Ray Data's second stage: one shard's downloads -> frames -> latents, and a ledger row for every row.

`ShardEncoder` commits them with a summary, pipelines/online.py hands them to training.

Decoded frames never leave the task, unless the VAE is in other actors (pipelines/vaes.py). Its decoders are processes
of its own, each fed by a thread. They work ahead while the VAE has a batch, and a second shard of the same actor while
the first one is unpacked or written.
k clips of frames [f, y, x, 3]; c latent channels, h w latent size.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from pipelines.config import DataConfig
from pipelines.decoding import Decoders
from pipelines.filters import Kept, Selection
from pipelines.ledger import Entry, Stage, write_ledger
from pipelines.likeness import Seen, hashes_path, write_hashes
from pipelines.media import Clip, MediaError
from pipelines.meters import Meters
from pipelines.sheet import ACROSS, DOWN, sheet_path, tiles, write_sheet
from pipelines.vaes import LocalVae, Moments, RemoteVae, VaePool
from pipelines.windows import sample_id
from t2v import shards, storage
from t2v.shards import LatentInfo

Given = TypeVar("Given")
Made = TypeVar("Made")


class Latents(NamedTuple):
    """What a shard holds at one size."""

    info: LatentInfo
    rows: shards.Rows


class Decoded(NamedTuple):
    """How a row ended, its caption, and what is kept of it if it is ok."""

    entry: Entry
    caption: str
    kept: Kept | None


@dataclass(frozen=True)
class Encoded:
    """What became of a shard: its task and the seconds it took, its rows in the ledger, and those that came through.

    `latents` has the same rows for each size. `looks` are tiles of the first shard's frames, `seen` the hashes by which
    near duplicates are known.
    """

    task: dict
    entries: list[Entry]
    latents: dict[int, Latents]
    looks: list[np.ndarray]
    seen: Seen
    seconds: float


@dataclass(frozen=True)
class _Row:
    """A row that came through: `moments` are its mean and logvar, fp16 [c, f, h, w], by size."""

    row_id: str
    caption: str
    fps: float
    start_s: float
    moments: dict[int, Moments]


class ShardEncoder:
    """Makes one shard a call: latents are committed first, then the ledger, the summary last."""

    def __init__(
        self, data_dir: str, data: DataConfig, vae_path: str, encoder: str, seed: int, vaes: VaePool | None = None
    ) -> None:
        self.data_dir, self.data = data_dir, data
        self.media = MediaEncoder(data, vae_path, encoder, seed, vaes)
        self.meters = Meters()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One row, a shard with its downloads (pipelines/prepare.py) -> one row, what became of it."""
        made = self.media.encode(batch)
        self._commit(made)
        ok = sum(entry.status == "ok" for entry in made.entries)
        return pa.table({"stream": [made.task["stream"]], "rows": [len(made.entries)], "ok": [ok]})

    def _commit(self, made: Encoded) -> None:
        name, stream = made.task["name"], made.task["stream"]
        if self.data.filters.duplicate_bits is not None:
            write_hashes(hashes_path(self.data_dir, stream, name), made.seen)
        if made.looks:
            write_sheet(sheet_path(self.data_dir, stream), made.looks[: ACROSS * DOWN])
        written = {size: self._write(made, size) for size in self.data.sizes}
        write_ledger(storage.join(self.data_dir, "ledger", stream, f"{name}.parquet"), made.entries)
        took = {"fetch": made.task["fetch_s"], "encode": made.seconds}
        summary = {
            "rows": len(made.entries),
            "status": Counter(entry.status for entry in made.entries),
            **written.pop(self.data.size),
            "also": written,
            "bytes": sum(entry.bytes for entry in made.entries),
            "seconds": took,
            "ended": time.time(),
        }
        storage.write_json(storage.join(self.data_dir, "done", stream, f"{name}.json"), summary)
        info, rows = made.latents[self.data.size]
        self.meters.shard(stream, made.entries, len(rows) * info.frames, took)

    def _write(self, made: Encoded, size: int) -> dict:
        """Write the latents of one size; what the summary says of them."""
        info, rows = made.latents[size]
        also_size = None if size == self.data.size else size
        path = shards.latents_path(self.data_dir, info.stream, made.task["name"], also_size)
        shard = shards.write_shard(path, info, **vars(rows))
        return {
            "samples": len(rows),
            "row_groups": shard.row_groups,
            "digest": shards.digest_rows(rows),
            "info": asdict(info),
        }


class MediaEncoder:
    """Has the VAE and the decoders, and encodes one shard a call.

    Several threads may call it, which share its decoders; the VAE is its own unless there is a pool of them.
    """

    def __init__(self, data: DataConfig, vae_path: str, encoder: str, seed: int, vaes: VaePool | None = None) -> None:
        self.data, self.seed = data, seed
        self.vae = RemoteVae(vaes) if vaes else LocalVae(vae_path, encoder, data.sizes, data.encode.batch_frames)
        self.threads = max(1, int(data.encode.cpus_per_worker))
        self.pool = ThreadPoolExecutor(self.threads)
        self.vae_calls = ThreadPoolExecutor(2 * data.encode.shards_at_once)
        self.selection = Selection(data, Decoders(data.decode), self.vae.device)

    def encode(self, batch: pa.Table) -> Encoded:
        """One row, a shard with its downloads (pipelines/prepare.py) -> what became of it."""
        begun = time.monotonic()
        (task,) = batch.drop_columns(["downloads"]).to_pylist()
        downloads = pa.ipc.open_stream(batch.column("downloads")[0].as_buffer()).read_all()
        frames = self.data.frames if task["stream"] == "videos" else 1
        at_once = max(1, self.data.encode.batch_frames // (frames * self.data.windows))

        entries: list[Entry] = []
        kept: list[_Row] = []
        looks: list[np.ndarray] = []
        seen = Seen(self.data.filters.duplicate_bits or 0)
        ahead = at_once + 2 * self.threads  # the next batch is decoded while the VAE has this one
        decoded = _in_order(self.pool, lambda row: self._decode(task["stream"], row), _rows(downloads), ahead)
        unlike = _unlike(decoded, seen)

        def batches() -> Iterator[list[tuple[str, str, Clip]]]:
            while group := list(islice(unlike, at_once)):
                entries.extend(row.entry for row in group)
                clips = [
                    (sample_id(row.entry.row_id, window), row.caption, clip)
                    for row in group
                    if row.kept
                    for window, clip in row.kept.clips.items()
                ]
                if task["index"] == 0 and len(looks) < ACROSS * DOWN:
                    looks.extend(tiles([clip.frames for _, _, clip in clips]))
                yield clips

        for encoded in _in_order(self.vae_calls, self._encode, batches(), ahead=1):
            kept += encoded

        if len(entries) != task["rows"]:
            raise RuntimeError(f"shard {task['name']}: {task['rows']} rows in, {len(entries)} in its ledger")
        ok = sum(entry.status == "ok" for entry in entries)
        if not ok <= len(kept) <= ok * self.data.windows:
            raise RuntimeError(f"shard {task['name']}: {ok} rows are ok, but there are {len(kept)} latents")
        latents = {size: self._latents(task, frames, kept, size) for size in self.data.sizes}
        return Encoded(task, entries, latents, looks, seen, time.monotonic() - begun)

    def _latents(self, task: dict, frames: int, kept: list[_Row], size: int) -> Latents:
        facts = self.vae.facts()[size]
        channels, height, width = facts.shape
        info = LatentInfo(task["stream"], (channels, frames, height, width), facts.id, facts.scale, task["data_hash"])
        return Latents(info, _rows_of(kept, size, info, self.data.keep_variance))

    def _decode(self, stream: str, row: dict) -> Decoded:
        body, caption = row["body"], row["caption"]
        entry = Entry(row["row_id"], row["url"], row["status"], row["stage"], row["message"], len(body), row["seconds"])
        if entry.status != "ok":
            return Decoded(entry, caption, None)
        try:
            if stream == "videos":
                kept = self.selection.video(body, f"{self.seed}/{entry.row_id}")
            else:
                kept = self.selection.picture(body)
        except MediaError as error:
            last: Stage = "filter" if error.status.startswith("filter") else "decode"
            return Decoded(replace(entry, status=error.status, stage=last, message=error.message), caption, None)
        return Decoded(replace(entry, stage="encode"), caption, kept)

    def _encode(self, clips: list[tuple[str, str, Clip]]) -> list[_Row]:
        if not clips:
            return []
        of_sizes = zip(*((clip.frames, *clip.also) for _, _, clip in clips), strict=True)
        moments = zip(*map(self._encode_frames, of_sizes), strict=True)
        return [
            _Row(row_id, caption, clip.source_fps, clip.start_s, dict(zip(self.data.sizes, of_clip, strict=True)))
            for (row_id, caption, clip), of_clip in zip(clips, moments, strict=True)
        ]

    def _encode_frames(self, clips: Sequence[np.ndarray]) -> list[Moments]:
        """Mean and logvar [c, f, h, w] of each clip; they are of one size."""
        mean, logvar = (
            part.reshape(len(clips), -1, *part.shape[1:]).swapaxes(1, 2)  # k c f h w
            for part in self.vae.encode(np.concatenate(clips))
        )
        return list(zip(mean, logvar, strict=True))


def _rows_of(kept: list[_Row], size: int, info: LatentInfo, keep_variance: bool) -> shards.Rows:
    def stacked(latents: list[np.ndarray]) -> np.ndarray:
        return np.stack(latents) if latents else np.empty((0, *info.shape), info.dtype)

    return shards.Rows(
        row_id=[row.row_id for row in kept],
        caption=[row.caption for row in kept],
        mean=stacked([row.moments[size][0] for row in kept]),
        logvar=stacked([row.moments[size][1] for row in kept]) if keep_variance else None,
        fps=np.array([row.fps for row in kept], np.float32),
        start_s=np.array([row.start_s for row in kept], np.float32),
    )


def _rows(downloads: pa.Table) -> Iterator[dict]:
    """The rows as dictionaries, one after another, so that bodies are copied out of the table only when due."""
    for batch in downloads.to_batches(max_chunksize=1):
        yield from batch.to_pylist()


def _unlike(rows: Iterable[Decoded], seen: Seen) -> Iterator[Decoded]:
    """The same rows, but of near duplicates none is kept but the first."""
    for row in rows:
        twin = seen.twin(row.entry.row_id, row.kept.hashes) if row.kept and row.kept.hashes else None
        if twin is not None:
            entry = replace(row.entry, status="filtered_duplicate", stage="filter", message=f"like row {twin}")
            row = Decoded(entry, row.caption, None)
        yield row


def _in_order(pool: Executor, make: Callable[[Given], Made], given: Iterable[Given], ahead: int) -> Iterator[Made]:
    """Like pool.map, but never more than `ahead` results wait in memory."""
    waiting: deque[Future[Made]] = deque()
    for one in given:
        waiting.append(pool.submit(make, one))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
