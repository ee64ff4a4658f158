import csv
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import DataConfig, EncodeConfig, FetchConfig, RowFilters, StreamConfig
from pipelines.encode import ShardEncoder
from pipelines.ledger import Entry, Funnel, funnel_text
from pipelines.media import read_clip
from pipelines.pictures import read_image
from pipelines.prepare import prepare, stored_plans
from pipelines.status import show_status
from pipelines.verify import _damage_of_latents, damage, verify
from pipelines.web import IMAGE_FAULTS, VIDEO_FAULTS
from t2v import shards, storage
from t2v.shards import encoder_id
from tests.pipelines.conftest import real_clip

SEED = 3
REAL_CLIPS = {
    "bikes.mp4": "ok",
    "cityCC0.mpg": "ok",
    "bigbuckbunny.mp4": "too_short",
    "carphone_pristine.mp4": "too_short",
}


@dataclass(frozen=True)
class Prepared:
    run_dir: Path
    data: DataConfig
    vae: str
    captions: dict[str, dict[str, str]]  # by stream and URL
    funnel: Funnel


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A VAE of the real class with random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    folder = str(tmp_path_factory.mktemp("vae"))
    AutoencoderKL(block_out_channels=[8, 8, 8, 8], norm_num_groups=4, **blocks).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(ray_session, corpus, vae, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    with (corpus.folder / "webvid.csv").open(newline="") as file:
        videos = list(csv.DictReader(file))
    videos.insert(5, dict.fromkeys(videos[0], "") | {"name": "a clip that nobody has"})
    (corpus.folder / "real").mkdir()
    for name in REAL_CLIPS:
        shutil.copy(real_clip(name), corpus.folder / "real")
        videos.append(dict.fromkeys(videos[0], "") | {"contentUrl": f"{corpus.base_url}/real/{name}", "name": name})
    with (run_dir / "webvid.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, videos[0].keys())
        writer.writeheader()
        writer.writerows(videos)
    images = pq.read_table(corpus.folder / "laion.parquet").to_pylist()
    data = DataConfig(
        size=32,
        raw="webdataset",
        videos=StreamConfig(str(run_dir / "webvid.csv"), "webvid", shard_rows=16),
        images=StreamConfig(str(corpus.folder / "laion.parquet"), "laion2b-en", shard_rows=40),
        fetch=FetchConfig(timeout_s=2, retries=1, allow_networks=["127.0.0.0/8"]),
        encode=EncodeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=1),
    )
    funnel = prepare(str(run_dir), data, vae, SEED)
    captions = {
        "videos": {row["contentUrl"]: row["name"] for row in videos},
        "images": {row["URL"]: row["TEXT"] for row in images},
    }
    return Prepared(run_dir, data, vae, captions, funnel)


def ledger(prepared, stream):
    folder = prepared.run_dir / "data/ledger" / stream
    return [Entry(**row) for row in pq.read_table(folder).to_pylist()]


def latents(prepared, stream):
    """Every row in the shards by row_id, as (shard's info, group of rows, index in the group)."""
    folder = str(prepared.run_dir / "data/latents" / stream)
    found = {}
    for shard in shards.list_shards(folder):
        for number in range(len(shard.row_groups)):
            rows = shards.read_rows(shard.path, number)
            found |= {row_id: (shard.info, rows, index) for index, row_id in enumerate(rows.row_id)}
    return found


@pytest.mark.parametrize(("stream", "faults"), [("videos", VIDEO_FAULTS), ("images", IMAGE_FAULTS)])
def test_every_row_ends_with_its_own_reason(prepared, stream, faults):
    entries = ledger(prepared, stream)
    assert [entry.url for entry in entries] == list(prepared.captions[stream])
    planted = {"faults": faults, "real": REAL_CLIPS}
    for entry in entries:
        folder, _, name = urlsplit(entry.url).path[1:].partition("/")
        expected = planted[folder][name] if folder in planted else "ok" if entry.url else "no_url"
        assert entry.status == expected, entry
        assert bool(entry.message) == (expected != "ok")
    assert sum(entry.status == "ok" for entry in entries) > 40


@pytest.mark.parametrize(("stream", "frames"), [("videos", 16), ("images", 1)])
def test_the_latents_are_those_of_the_rows_that_are_ok(prepared, corpus, stream, frames):
    import torch

    from t2v.frozen import load_vae

    encoder = load_vae(prepared.vae)
    entries = [entry for entry in ledger(prepared, stream) if entry.status == "ok"]
    found = latents(prepared, stream)
    assert sorted(found) == sorted(entry.row_id for entry in entries)
    for entry in {*entries[::15], *(entry for entry in entries if "/real/" in entry.url)}:
        info, rows, index = found[entry.row_id]
        assert (info.stream, info.shape, info.encoder) == (stream, (4, frames, 4, 4), encoder.id)
        assert rows.caption[index] == prepared.captions[stream][entry.url]
        if "/faults/" in entry.url:
            continue
        data = (corpus.folder / urlsplit(entry.url).path[1:]).read_bytes()
        if stream == "videos":
            clip = read_clip(data, 16, 3.0, 32, key=f"{SEED}/{entry.row_id}")
            pixels = clip.frames
            assert (rows.fps[index], rows.start_s[index]) == (clip.source_fps, np.float32(clip.start_s))
        else:
            pixels = read_image(data, 32).frames
        for stored, expected in zip((rows.mean, rows.logvar), encoder.encode(torch.from_numpy(pixels)), strict=True):
            np.testing.assert_allclose(stored[index], expected.transpose(0, 1).numpy(), rtol=2e-3, atol=2e-3)


def test_the_funnel_adds_up(prepared):
    funnel = prepared.funnel
    written = storage.read_json(str(prepared.run_dir / "data/funnel.json"))
    for stream, rows in prepared.captions.items():
        assert funnel[stream].total() == len(rows) == written[stream]["rows"]
        assert dict(funnel[stream]) == written[stream]["status"]
        assert written[stream]["yield_percent"] == pytest.approx(100 * funnel[stream]["ok"] / len(rows))
    text = funnel_text({"videos": {"ok": 3, "http_404": 1}, "images": {"ok": 1_200}})
    assert [line.split() for line in text.splitlines()] == [
        ["videos", "images"],
        ["rows", "in", "4", "1,200"],
        ["ok", "3", "1,200"],
        ["http_404", "1", "0"],
        ["yield", "75.0", "%", "100.0", "%"],
    ]


def written(prepared):
    folders = ("latents/videos", "latents/images", "ledger/videos", "ledger/images", "done/videos", "done/images")
    paths = [path for name in folders for path in (prepared.run_dir / "data" / name).glob("0*")]
    return {path: path.stat().st_mtime_ns for path in paths}


def test_what_came_in_can_be_looked_at(prepared):
    for stream in ("videos", "images"):
        sheet = cv2.imread(str(prepared.run_dir / f"data/sheets/{stream}.jpg"))
        assert sheet.shape[1:] == (8 * 32, 3) and sheet.shape[0] % 32 == 0
        assert sheet.std() > 10


def test_a_second_run_does_nothing(prepared):
    before, begun = written(prepared), time.monotonic()
    assert prepare(str(prepared.run_dir), prepared.data, prepared.vae, SEED) == prepared.funnel
    assert time.monotonic() - begun < 2
    assert written(prepared) == before


def test_a_missing_summary_has_its_shard_made_again_alike_and_no_other(prepared):
    before = written(prepared)
    done = min(path for path in before if "done/videos" in str(path))
    shard = prepared.run_dir / "data/latents/videos" / f"{done.stem}.parquet"
    content = shard.read_bytes()
    done.unlink()
    prepare(str(prepared.run_dir), prepared.data, prepared.vae, SEED)
    after = written(prepared)
    assert after.keys() == before.keys()
    assert {path.stem for path in after if after[path] != before[path]} == {done.stem}
    assert shard.read_bytes() == content


def test_a_sound_run_is_verified_and_its_status_is_its_funnel(prepared, capsys):
    assert verify(str(prepared.run_dir)) == 0
    show_status(str(prepared.run_dir))
    out = capsys.readouterr().out
    assert "shards read again, 0 damaged" in out and funnel_text(prepared.funnel) in out
    assert out.count("all done") == 2


def test_a_damaged_shard_is_named_queued_again_and_made_anew(prepared, capsys):
    shard = min((prepared.run_dir / "data/latents/videos").glob("0*.parquet"))
    content = shard.read_bytes()
    shard.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    assert verify(str(prepared.run_dir)) == 1
    show_status(str(prepared.run_dir))
    out = capsys.readouterr().out
    assert f"videos {shard.stem}: cannot be read: OSError could not verify page integrity" in out
    total = len(list(shard.parent.glob("0*.parquet")))
    assert f"{total - 1}/{total} shards" in out and "rows/s lately" in out
    prepare(str(prepared.run_dir), prepared.data, prepared.vae, SEED)
    assert shard.read_bytes() == content and verify(str(prepared.run_dir)) == 0


def rewritten(path, change):
    """The Parquet file at `path` with its rows, as dictionaries, changed."""
    table = pq.read_table(path)
    pq.write_table(type(table).from_pylist(change(table.to_pylist()), schema=table.schema), path)


def not_finite(rows):
    return [rows[0] | {"mean": b"\xff" * len(rows[0]["mean"])}, *rows[1:]]


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("ledger", lambda rows: rows[1:], "does not hold the rows of its manifest"),
        ("ledger", lambda rows: [row | {"status": "corrupt"} for row in rows], "its ledger and its summary count"),
        ("latents", lambda rows: rows[:-1], "not those of the rows that its ledger calls ok"),
        ("latents", lambda rows: [rows[0], *rows], "it holds a row twice"),
        ("latents", not_finite, "not finite"),
        ("latents", lambda rows: [row | {"caption": ""} for row in rows], "its content is not what was written"),
    ],
)
def test_whatever_is_wrong_with_a_shard_is_told(prepared, tmp_path, part, change, expected):
    shutil.copytree(prepared.run_dir / "data", tmp_path / "data")
    plan = next(plan for plan in stored_plans(str(tmp_path / "data")) if plan.stream == "images")
    name = plan.names[1]
    rewritten(tmp_path / "data" / part / "images" / f"{name}.parquet", change)
    task = {"stream": "images", "name": name, "manifest": plan.manifest.path, "index": 1}
    assert expected in damage(str(tmp_path / "data"), task)


@pytest.mark.parametrize("part", ["done", "ledger", "latents", "manifest"])
def test_whatever_cannot_be_read_is_told(prepared, tmp_path, part):
    shutil.copytree(prepared.run_dir / "data", tmp_path / "data")
    plan = next(plan for plan in stored_plans(str(tmp_path / "data")) if plan.stream == "images")
    task = {"stream": "images", "name": plan.names[1], "manifest": plan.manifest.path, "index": 1}
    files = {"done": f"{plan.names[1]}.json", "manifest": "000000.parquet"}
    path = tmp_path / "data" / part / "images" / files.get(part, f"{plan.names[1]}.parquet")
    path.write_bytes(b"{}" if part == "done" else path.read_bytes()[:-40] + bytes(40))
    assert damage(str(tmp_path / "data"), task).startswith("cannot be read: ")


def test_rows_of_one_url_are_no_damage(tmp_path):
    info = shards.LatentInfo("images", (4, 1, 2, 2), "vae", 1.0, "settings")
    ids, mean = ["a", "a", "b"], np.zeros((3, 4, 1, 2, 2), np.float16)
    path = str(tmp_path / "0.parquet")
    shards.write_shard(path, info, ids, ["", "", ""], mean, None, np.zeros(3), np.zeros(3))
    digest = shards.digest_rows(shards.read_shard(path))
    assert _damage_of_latents(path, ["a", "a", "b"], digest) == ""
    assert _damage_of_latents(path, ["a", "b"], digest) == "it holds a row twice"


def test_nothing_prepared_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was prepared"):
        show_status(str(tmp_path))


def test_filtered_rows_and_duplicates_are_in_the_ledger_and_never_fetched(prepared, corpus, tmp_path, monkeypatch):
    """Also where blocks hold several shards and several datasets follow each other."""
    monkeypatch.setattr("pipelines.prepare.BLOCKS", 2)
    monkeypatch.setattr("pipelines.prepare._SHARDS_AT_ONCE", 5)
    (good, *_) = (row for row in pq.read_table(corpus.folder / "laion.parquet").to_pylist() if "/images/" in row["URL"])
    refused = [
        good | {"URL": f"{corpus.base_url}/nowhere/{number}.jpg", "WIDTH": 20 if number % 2 else 500, "punsafe": 1.0}
        for number in range(10)
    ]
    pq.write_table(pa.Table.from_pylist([good, *refused, good]), tmp_path / "m.parquet")
    filters = RowFilters(min_side=50, max_punsafe=0.5)
    images = StreamConfig(str(tmp_path / "m.parquet"), "laion2b-en", 2, filters, drop_duplicates=True)
    run = replace(prepared, run_dir=tmp_path / "run", data=replace(prepared.data, videos=StreamConfig(), images=images))
    funnel = prepare(str(run.run_dir), run.data, run.vae, SEED)
    assert funnel == {"images": {"ok": 1, "filtered_size": 5, "filtered_unsafe": 5, "duplicate_url": 1}}
    entries = ledger(run, "images")
    assert [entry.url for entry in entries] == [good["URL"], *(row["URL"] for row in refused), good["URL"]]
    assert [entry.stage for entry in entries] == ["encode"] + ["manifest"] * 11
    assert all(entry.message and not entry.bytes and not entry.seconds for entry in entries[1:])
    assert list(latents(run, "images")) == [entries[0].row_id]


def test_tars_that_were_kept_give_the_same_latents_without_a_download(prepared, tmp_path):
    kept = replace(prepared.data.images, manifest=str(prepared.run_dir / "data/raw/images"))
    data = replace(prepared.data, videos=StreamConfig(), images=kept, fetch=FetchConfig())  # which may reach nothing
    funnel = prepare(str(tmp_path), data, prepared.vae, SEED)
    before, after = (
        sorted((rows.caption[index], rows.mean[index].tolist()) for _, rows, index in latents(one, "images").values())
        for one in (prepared, replace(prepared, run_dir=tmp_path))
    )
    assert [caption for caption, _ in after] == [caption for caption, _ in before]
    np.testing.assert_allclose([mean for _, mean in after], [mean for _, mean in before], atol=2e-3)  # other batches
    decoded = [entry for entry in ledger(prepared, "images") if entry.stage != "fetch"]
    assert funnel["images"].total() == len(decoded) > funnel["images"]["ok"]
    assert not (tmp_path / "data/raw").exists()


def test_a_broken_vae_stops_the_encoder_before_its_first_row(prepared, tmp_path):
    from diffusers import AutoencoderKL

    broken = AutoencoderKL.from_pretrained(prepared.vae)
    broken.quant_conv.bias.data.fill_(float("inf"))
    broken.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.vae: its latents are beyond fp16 or not finite"):
        ShardEncoder(str(tmp_path), prepared.data, str(tmp_path), encoder_id(str(tmp_path)), SEED)


def test_what_cannot_work_is_said_before_anything_is_spent(prepared, tmp_path):
    data, run_dir = prepared.data, str(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"model\.vae: .*none"):
        prepare(run_dir, data, str(tmp_path / "none"), SEED)
    with pytest.raises(ValueError, match="both unset"):
        prepare(run_dir, replace(data, videos=StreamConfig(), images=StreamConfig()), prepared.vae, SEED)
    with pytest.raises(ValueError, match=r"data\.also_sizes: 32 is data\.size as well"):
        prepare(run_dir, replace(data, also_sizes=[64, 32]), prepared.vae, SEED)
    with pytest.raises(ValueError, match=r"webvid\.csv: no column URL, TEXT"):
        prepare(run_dir, replace(data, images=replace(data.videos, columns="laion2b-en")), prepared.vae, SEED)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        prepare(str(tmp_path / "file"), data, prepared.vae, SEED)
