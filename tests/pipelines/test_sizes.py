"""One preparation at several sizes: the latents of each are those of a preparation of its own, from one decoding."""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines import media
from pipelines.config import DataConfig, EncodeConfig, StreamConfig
from pipelines.encode import ShardEncoder
from pipelines.prepare import ShardFetcher, plan_streams, prepare
from pipelines.verify import verify
from pipelines.windows import read_windows
from t2v import shards, storage
from t2v.shards import encoder_id
from tests.pipelines.conftest import real_clip

SEED = 3
FOLDERS = {32: "latents", 64: "latents_64", 16: "latents_16"}
STREAMS = {"videos": 16, "images": 1}  # and the frames of a row


@dataclass(frozen=True)
class Prepared:
    run_dir: Path
    data: DataConfig
    vae: str

    def again(self) -> None:
        prepare(str(self.run_dir), self.data, self.vae, SEED)

    def written(self) -> dict[Path, int]:
        found = (path for part in ("latents*", "ledger", "done") for path in self.run_dir.glob(f"data/{part}/*/0*"))
        return {path: path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def prepared(ray_session, corpus, tiny_model, tmp_path_factory):
    """Both streams at three sizes, a broken file in each, pictures large enough for JPEG to be decoded at a half."""
    folder = tmp_path_factory.mktemp("sizes")
    for stream, suffix in (("videos", "mp4"), ("images", "jpg")):
        (folder / stream).mkdir()
        for path in sorted((corpus.folder / stream).glob(f"*.{suffix}"))[:7]:
            shutil.copy(path, folder / stream)
        (folder / stream / f"000003b.{suffix}").write_bytes(b"neither")
    shutil.copy(real_clip("bikes.mp4"), folder / "videos/bikes.mp4")
    data = DataConfig(
        size=32,
        also_sizes=[64, 16],
        videos=StreamConfig(str(folder / "videos"), "generic", shard_rows=5),
        images=StreamConfig(str(folder / "images"), "generic", shard_rows=5),
        encode=EncodeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=1),
    )
    made = Prepared(folder / "run", data, f"{tiny_model}/vae")
    made.again()
    return made


def stored(run_dir, folder, stream):
    found = shards.list_shards(str(run_dir / "data" / folder / stream))
    return found, [shards.read_shard(shard.path) for shard in found]


@pytest.mark.parametrize("size", FOLDERS)
def test_each_size_is_what_a_preparation_of_its_own_makes(prepared, tmp_path, size):
    prepare(str(tmp_path), replace(prepared.data, size=size, also_sizes=[]), prepared.vae, SEED)
    for stream, frames in STREAMS.items():
        found, rows = stored(prepared.run_dir, FOLDERS[size], stream)
        _, alone = stored(tmp_path, "latents", stream)
        assert found[0].info.shape == (4, frames, size // 8, size // 8)
        assert [len(part) for part in rows] == [len(part) for part in alone] == [4, 3 + (stream == "videos")]
        for one, other in zip(rows, alone, strict=True):
            for column, values in vars(one).items():
                np.testing.assert_array_equal(values, vars(other)[column])


def test_shards_of_all_sizes_have_one_name_one_order_and_one_summary(prepared):
    for stream in STREAMS:
        done = {path.stem for path in prepared.run_dir.glob(f"data/done/{stream}/*")}
        rows = set()
        for folder in FOLDERS.values():
            found, parts = stored(prepared.run_dir, folder, stream)
            assert {Path(shard.path).stem for shard in found} == done
            rows.add(tuple(row_id for part in parts for row_id in part.row_id))
        assert len(done) == 2 and len(rows) == 1


def test_every_file_is_decoded_once(prepared, tmp_path):
    data, encoder = prepared.data, encoder_id(prepared.vae)
    stage = ShardEncoder(str(tmp_path), data, prepared.vae, encoder, SEED)
    decoders, bodies = stage.media.selection._decoders, Counter()
    call = decoders.call
    decoders.call = lambda function, body, *rest: bodies.update([body]) or call(function, body, *rest)
    rows = 0
    for plan in plan_streams(str(tmp_path), data, encoder, SEED):
        for task in plan.tasks(str(tmp_path), done=False).to_pylist():
            rows += stage(ShardFetcher(str(tmp_path), data)(pa.Table.from_pylist([task])))["rows"][0].as_py()
    decoders.close()
    good = [path for stream in STREAMS for path in (prepared.run_dir.parent / stream).glob("*[0-9s].*")]
    assert rows == 17 and bodies == Counter(path.read_bytes() for path in good)


def test_as_many_frames_are_converted_for_three_sizes_as_for_one(monkeypatch):
    body, converted = real_clip("bikes.mp4").read_bytes(), Counter()
    convert = media._squares
    monkeypatch.setattr(media, "_squares", lambda frame, *rest: converted.update([frame.pts]) or convert(frame, *rest))
    clips = read_windows(body, 16, 3.0, [64, 32, 16], 10**8, "a", 1, None, False, False).clips
    assert [part.shape for part in clips] == [(1, 16, size, size, 3) for size in (64, 32, 16)]
    assert len(converted) == converted.total() == 16


def test_a_second_run_does_nothing_and_a_missing_summary_has_all_sizes_made_again(prepared):
    before = prepared.written()
    prepared.again()
    assert prepared.written() == before
    done = min(prepared.run_dir.glob("data/done/videos/*"))
    content = {path: path.read_bytes() for path in before if path.stem == done.stem and "latents" in str(path)}
    done.unlink()
    prepared.again()
    after = prepared.written()
    assert len(content) == 3 and content == {path: path.read_bytes() for path in content}
    assert {path.stem for path in before if after[path] != before[path]} == {done.stem}


@pytest.mark.parametrize("lost", [True, False])
def test_damage_at_another_size_is_found_and_mended(prepared, capsys, lost):
    assert verify(str(prepared.run_dir)) == 0
    shard = min(prepared.run_dir.glob("data/latents_16/images/0*"))
    content = shard.read_bytes()
    at = content.index(shards.read_shard(str(shard)).mean[0].tobytes())
    shard.unlink() if lost else shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert verify(str(prepared.run_dir)) == 1
    assert f"images {shard.stem}: at 16 pixels, cannot be read: " in capsys.readouterr().out
    prepared.again()
    assert shard.read_bytes() == content and verify(str(prepared.run_dir)) == 0


def test_a_run_of_one_size_that_was_begun_before_there_were_more_goes_on(prepared, tmp_path):
    run = replace(prepared, run_dir=tmp_path, data=replace(prepared.data, also_sizes=[], videos=StreamConfig()))
    run.again()
    for path in map(str, tmp_path.glob("data/done/images/*")):
        storage.write_json(path, {key: value for key, value in storage.read_json(path).items() if key != "also"})
    before = run.written()
    run.again()
    assert run.written() == before and verify(str(tmp_path)) == 0
