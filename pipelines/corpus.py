"""Writes the miniature's corpus to disk as the web has it: mp4 and jpg files, two manifests, and rows that fail."""

import csv
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import CorpusConfig
from pipelines.shapes import COLOURS, Scene, caption, draw_scene, render
from pipelines.video import write_mp4
from pipelines.web import IMAGE_FAULTS, VIDEO_FAULTS, serve
from t2v import storage


def write_corpus(folder: str | Path, config: CorpusConfig, base_url: str) -> None:
    """Write clips, pictures, manifests and the test split, on all cores; base_url is where the folder is served.

    `corpus.json` comes last: where it is, the corpus is whole and a rerun returns at once.
    ValueError for a folder that holds the corpus of another config or another base_url.
    """
    folder = Path(folder)
    _check_colours(config)
    if _is_written(folder, config, base_url):
        return
    for name in ("videos", "images", "test", "faults"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    videos = {f"videos/{i:06d}.mp4": draw_scene(config, "train", i) for i in range(config.clips)}
    images = {f"images/{i:06d}.jpg": draw_scene(config, "pictures", i) for i in range(config.pictures)}
    test = {f"test/video{i}.mp4": draw_scene(config, "test", i) for i in range(config.test_clips)}
    _write_clips(folder, videos | test)
    for name, scene in images.items():
        _write_picture(folder / name, scene)
    if config.faults:
        _write_faults(folder, videos["videos/000000.mp4"])
        videos |= {f"faults/{name}": videos["videos/000000.mp4"] for name in VIDEO_FAULTS}
        images |= {f"faults/{name}": images["images/000000.jpg"] for name in IMAGE_FAULTS}
    _write_webvid(folder / "webvid.csv", _shuffled(videos, config.seed), base_url)
    _write_laion(folder / "laion.parquet", _shuffled(images, config.seed), base_url, config.seed)
    _write_msrvtt(folder / "test.csv", test)
    _write_summary(folder / "corpus.json", config, base_url, len(videos), len(images))


@contextmanager
def own_corpus(run_dir: str, config: CorpusConfig | None) -> Iterator[None]:
    """Makes the corpus of a run that has one, if it is not there yet, and serves it on loopback meanwhile."""
    if config is None:
        yield
        return
    folder = f"{run_dir}/corpus"
    with serve(folder, corpus_port(folder)) as base_url:
        print(f"[corpus] {folder}, served on {base_url}", flush=True)
        write_corpus(folder, config, base_url)
        yield


def corpus_port(folder: str | Path) -> int:
    """The port that a written corpus's manifests point at, for a server to take again; 0 where there is none."""
    path = Path(folder) / "corpus.json"
    return storage.read_json(str(path))["port"] if path.exists() else 0


def _check_colours(config: CorpusConfig) -> None:
    unknown = set(config.picture_only_colours) - set(COLOURS)
    if unknown:
        raise ValueError(
            f"corpus.picture_only_colours: no such colour: {', '.join(sorted(unknown))}; there are {', '.join(COLOURS)}"
        )
    if set(config.picture_only_colours) == set(COLOURS):
        raise ValueError("corpus.picture_only_colours: all colours are named, which leaves none for the clips")


def _is_written(folder: Path, config: CorpusConfig, base_url: str) -> bool:
    path = folder / "corpus.json"
    if not path.exists():
        return False
    summary = storage.read_json(str(path))
    found = summary["config"] | {"base_url": summary["base_url"]}
    wanted = asdict(config) | {"base_url": base_url}
    changed = [f"{name} is {found.get(name)!r}" for name, value in wanted.items() if found.get(name) != value]
    if changed:
        raise ValueError(f"{folder} holds another corpus ({'; '.join(changed)}): choose another folder or delete it")
    return True


def _write_clips(folder: Path, clips: dict[str, Scene]) -> None:
    paths = [folder / name for name in clips]
    workers = min(os.cpu_count() or 1, len(paths) // 16)
    if workers < 2:
        list(map(_write_clip, paths, clips.values()))
        return
    # Spawned, because a fork of a process that has run threads (Ray's, PyTorch's) may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_write_clip, paths, clips.values(), chunksize=4))


def _write_clip(path: Path, scene: Scene) -> None:
    times_s = (k / scene.fps for k in range(round(scene.duration_s * scene.fps)))
    frames = (render(scene, t_s, scene.height, scene.width) for t_s in times_s)
    write_mp4(str(path), frames, scene.fps, {"preset": "veryfast", "crf": "18", "g": "48"})


def _write_picture(path: Path, scene: Scene) -> None:
    frame = render(scene, 0, scene.height, scene.width)
    if not cv2.imwrite(str(path), frame[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]):
        raise OSError(f"could not write {path}")


def _write_faults(folder: Path, scene: Scene) -> None:
    """The files under faults/ that are broken in themselves."""
    clip, picture = (folder / "videos/000000.mp4").read_bytes(), (folder / "images/000000.jpg").read_bytes()
    (folder / "faults/truncated.mp4").write_bytes(clip[: len(clip) // 2])
    (folder / "faults/huge.jpg").write_bytes(_claim_size(picture, 60_000, 60_000))
    _write_clip(folder / "faults/short.mp4", replace(scene, duration_s=1.0))
    (folder / "faults/empty.mp4").touch()
    (folder / "faults/empty.jpg").touch()


def _claim_size(jpg: bytes, height: int, width: int) -> bytes:
    """The same JPEG with another size in its frame header (ITU-T T.81, B.2.2)."""
    at = jpg.index(b"\xff\xc0") + 5
    return jpg[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpg[at + 4 :]


def _shuffled(scenes: dict[str, Scene], seed: int) -> list[tuple[str, Scene]]:
    """Rows in an order that spreads those that fail over the manifest."""
    rows = list(scenes.items())
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def _write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _write_webvid(path: Path, rows: list[tuple[str, Scene]], base_url: str) -> None:
    lines = [
        (number, f"{base_url}/{name}", "shapes", caption(scene), f"PT00H00M{round(scene.duration_s):02d}S")
        for number, (name, scene) in enumerate(rows)
    ]
    _write_csv(path, [("videoid", "contentUrl", "page_dir", "name", "duration"), *lines])


def _write_laion(path: Path, rows: list[tuple[str, Scene]], base_url: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = {
        "URL": [f"{base_url}/{name}" for name, _ in rows],
        "TEXT": [caption(scene) for _, scene in rows],
        "WIDTH": [scene.width for _, scene in rows],
        "HEIGHT": [scene.height for _, scene in rows],
        "similarity": rng.uniform(0.28, 0.4, len(rows)),
        "punsafe": rng.uniform(0, 0.01, len(rows)),
        "pwatermark": rng.uniform(0, 0.2, len(rows)),
        "hash": rng.integers(-(2**63), 2**63 - 1, len(rows)),
    }
    pq.write_table(pa.table(columns), path)


def _write_msrvtt(path: Path, test: dict[str, Scene]) -> None:
    """Paths are relative to the table's own folder."""
    lines = [(Path(name).stem, name, caption(scene)) for name, scene in test.items()]
    _write_csv(path, [("video_id", "path", "sentence"), *lines])


def _write_summary(path: Path, config: CorpusConfig, base_url: str, videos: int, images: int) -> None:
    expected = {"videos": VIDEO_FAULTS, "images": IMAGE_FAULTS} if config.faults else {"videos": {}, "images": {}}
    summary = {
        "config": asdict(config),
        "base_url": base_url,
        "port": urlsplit(base_url).port,
        "rows": {"videos": videos, "images": images, "test": config.test_clips},
        "faults": {
            stream: Counter(status for status in faults.values() if status != "ok")
            for stream, faults in expected.items()
        },
    }
    storage.write_json(str(path), summary)
