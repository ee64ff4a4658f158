import io
from fractions import Fraction
from itertools import combinations

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import (
    ClipFilters,
    CorpusConfig,
    DataConfig,
    DecodeConfig,
    EncodeConfig,
    FetchConfig,
    StreamConfig,
)
from pipelines.decoding import Decoders
from pipelines.filters import Selection
from pipelines.ledger import Entry
from pipelines.likeness import Seen, perceptual_hash, write_hashes
from pipelines.prepare import prepare
from pipelines.shapes import draw_scene, render
from pipelines.twins import find_twins
from pipelines.verify import verify
from t2v import shards
from tests.pipelines.conftest import real_clip

BITS = 4
REAL = {"bikes.mp4": (320, 136), "cityCC0.mpg": (360, 202)}  # and a smaller size of like proportions

DECODERS = Decoders(DecodeConfig())


def bits_apart(one, other):
    return (one ^ other).bit_count()


def copied(name, size=None):
    """A real clip, encoded again at a size of its own and a poor quality."""
    width, height = size or REAL[name]
    file = io.BytesIO()
    with av.open(str(real_clip(name))) as source, av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "35"})
        stream.width, stream.height = width, height
        stream.codec_context.time_base = Fraction(1, 12_800)
        for frame in source.decode(video=0):
            small = frame.reformat(width, height, "yuv420p")
            small.time_base = stream.codec_context.time_base
            small.pts = round(frame.time / small.time_base)
            output.mux(stream.encode(small))
        output.mux(stream.encode())
    return file.getvalue()


def picture(index):
    scene = draw_scene(CorpusConfig(), "pictures", index)
    return Image.fromarray(render(scene, 0, scene.height, scene.width))


def saved(image, kind, scale=1.0, **options):
    file = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale))).save(file, kind, **options)
    return file.getvalue()


def test_a_copy_of_a_video_is_like_it_whatever_window_is_drawn_and_another_video_is_not():
    selection = Selection(DataConfig(size=64, filters=ClipFilters(duplicate_bits=BITS)), DECODERS)
    originals = {name: selection.video(real_clip(name).read_bytes(), "a") for name in REAL}
    for name in REAL:
        copy = selection.video(copied(name), "b")
        assert copy.clips[0].start_s != originals[name].clips[0].start_s
        assert max(map(bits_apart, copy.hashes, originals[name].hashes)) <= BITS
    first, second = (kept.hashes for kept in originals.values())
    assert min(map(bits_apart, first, second)) > 20


def test_pictures_that_were_scaled_and_compressed_are_alike_and_others_are_not():
    images = [picture(index) for index in range(60)]
    hashes = [perceptual_hash(np.asarray(image)) for image in images]
    for image, expected in zip(images, hashes, strict=True):
        copy = Image.open(io.BytesIO(saved(image, "JPEG", scale=0.8, quality=75)))
        assert bits_apart(perceptual_hash(np.asarray(copy)), expected) <= 10
    near = sum(bits_apart(one, other) <= 4 for one, other in combinations(hashes, 2))
    assert near <= 2  # of 1,770 pairs


def test_the_first_row_is_kept_and_later_ones_are_told_which_it_is():
    seen = Seen(max_bits=2)
    rows = {"a": (0b0000, 0), "b": (0b0011, 0), "c": (0b0111, 0), "d": (0b1111, 0b111), "e": (0b0111, 0b011)}
    twins = {row_id: seen.twin(row_id, hashes) for row_id, hashes in rows.items()}
    assert twins == {"a": None, "b": "a", "c": None, "d": None, "e": "c"}


@pytest.fixture(scope="module")
def copies(corpus):
    """A manifest of 24 pictures of which some are copies: row -> the row that it is a copy of."""
    folder = corpus.folder / "copies"
    folder.mkdir()
    copy_of = {7: 2, 11: 7, 13: 5, 20: 2, 23: 19}
    lines = ["url,caption"]
    for row in range(24):
        source = row
        while source in copy_of:
            source = copy_of[source]
        copy = row in copy_of
        content = saved(picture(source), "JPEG", scale=0.9, quality=80) if copy else saved(picture(row), "PNG")
        (folder / f"{row}.img").write_bytes(content)
        lines.append(f"{corpus.base_url}/copies/{row}.img,picture {row}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "manifest.csv"), copy_of


def run(tmp_path, manifest, model, shard_rows, **filters):
    data = DataConfig(
        size=32,
        also_sizes=[16],
        images=StreamConfig(manifest, "generic", shard_rows=shard_rows),
        fetch=FetchConfig(allow_networks=["127.0.0.0/8"]),
        encode=EncodeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=1),
        filters=ClipFilters(duplicate_bits=8, **filters),
    )
    return prepare(str(tmp_path), data, f"{model}/vae", 0), data


def statuses(tmp_path):
    entries = [Entry(**row) for row in pq.read_table(tmp_path / "data/ledger/images").to_pylist()]
    return {int(entry.url.rsplit("/", 1)[1].removesuffix(".img")): entry for entry in entries}


def stored(tmp_path, latents="latents"):
    """The captions in the shards, as the training order sees them, and every row_id there."""
    rows = []
    for shard in shards.list_shards(str(tmp_path / "data" / latents / "images")):
        for group, count in enumerate(shard.row_groups):
            found = shards.read_rows(shard.path, group)
            assert len(found) == count
            rows += list(zip(found.row_id, found.caption, strict=True))
    return rows


def test_copies_in_a_shard_are_rows_of_the_ledger(ray_session, copies, tiny_model, tmp_path):
    manifest, copy_of = copies
    funnel, _ = run(tmp_path, manifest, tiny_model, shard_rows=24)
    entries = statuses(tmp_path)
    refused = {row for row, entry in entries.items() if entry.status == "filtered_duplicate"}
    assert refused == set(copy_of)
    assert entries[11].message == f"like row {entries[2].row_id}"
    assert {entries[row].stage for row in refused} == {"filter"}
    assert funnel["images"] == {"ok": 24 - len(copy_of), "filtered_duplicate": len(copy_of)}
    assert [caption for _, caption in stored(tmp_path)] == [f"picture {row}" for row in range(24) if row not in refused]


def written_hashes(folder, hashes, shard_rows):
    paths = []
    for start in range(0, len(hashes), shard_rows):
        part = Seen(0)
        part.hashes = hashes[start : start + shard_rows]
        part.row_ids = [str(start + row) for row in range(len(part.hashes))]
        paths.append(str(folder / f"{start:06d}.parquet"))
        write_hashes(paths[-1], part)
    return paths


@pytest.mark.parametrize("max_bits", [0, 3, 8])
def test_the_pass_over_all_shards_finds_what_comparing_every_pair_finds(ray_session, tmp_path, max_bits):
    numbers = np.random.default_rng(max_bits)
    hashes = numbers.integers(0, 2**64, (1500, 2), np.uint64, endpoint=False)
    for row in numbers.permutation(1500)[:900]:  # copies of copies, some bits changed
        flips = numbers.choice(64, numbers.integers(0, max_bits + 3), replace=False)
        change = np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0))
        hashes[row] = hashes[numbers.integers(1500)] ^ np.array([change, change & hashes[0, 0]])
    hashes[numbers.permutation(1500)[:40]] = hashes[0]
    twins = find_twins(written_hashes(tmp_path, hashes, 400), max_bits)
    seen = Seen(max_bits)
    expected = {row for row in range(1500) if seen.twin(str(row), tuple(map(int, hashes[row]))) is not None}
    number = {row: (row // 400 << 32) + row % 400 for row in range(1500)}
    assert set(twins) == {number[row] for row in expected}
    assert len(expected) > 200
    row_of = {order: row for row, order in number.items()}
    for row, kept in ((row_of[row], row_of[kept]) for row, kept in twins.items()):
        assert kept < row and kept not in expected
        assert np.bitwise_count(hashes[row] ^ hashes[kept]).max() <= max_bits


def test_copies_in_other_shards_leave_shards_ledger_and_index(ray_session, copies, tiny_model, tmp_path):
    manifest, copy_of = copies
    funnel, data = run(tmp_path, manifest, tiny_model, shard_rows=5, duplicates_across=True)
    entries = statuses(tmp_path)
    refused = {row for row, entry in entries.items() if entry.status == "filtered_duplicate"}
    assert refused == set(copy_of)
    assert entries[20].message == entries[11].message == f"like row {entries[2].row_id}"
    assert funnel["images"] == {"ok": 24 - len(copy_of), "filtered_duplicate": len(copy_of)}
    rows = stored(tmp_path)
    assert [caption for _, caption in rows] == [f"picture {row}" for row in range(24) if row not in refused]
    assert [row_id for row_id, _ in rows] == [entries[row].row_id for row in range(24) if row not in refused]
    assert stored(tmp_path, "latents_16") == rows and verify(str(tmp_path)) == 0

    files = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.*") if path.is_file()}
    assert prepare(str(tmp_path), data, f"{tiny_model}/vae", 0) == funnel
    lost = sorted((tmp_path / "data/done/images").iterdir())[2]
    lost.unlink()  # as if the run had been cut off: its shard comes back whole and must lose its copies again
    assert prepare(str(tmp_path), data, f"{tiny_model}/vae", 0) == funnel
    untimed = {path for path in files if path != lost and "ledger" not in path.parts}
    assert {path for path in untimed if path.read_bytes() != files[path]} == set()
    assert stored(tmp_path) == stored(tmp_path, "latents_16") == rows
