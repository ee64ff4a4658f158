from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2v import shards, storage
from t2v.shards import LatentInfo

INFO = LatentInfo("videos", (4, 3, 2, 2), encoder="0123456789abcdef", scale=0.18215, data_hash="abcdef")


def write(path, rows=250, info=INFO, keep_variance=True, seed=0):
    numbers = np.random.default_rng(seed)
    mean, logvar = numbers.standard_normal((2, rows, *info.shape)).astype(np.float16)
    ids = [f"{row:016x}" for row in range(rows)]
    captions = [f"caption {row}" for row in range(rows)]
    fps, start_s = [25.0] * rows, [row / 4 for row in range(rows)]
    shard = shards.write_shard(path, info, ids, captions, mean, logvar if keep_variance else None, fps, start_s)
    return shard, mean, logvar


@pytest.mark.parametrize("where", ["local", "memory"])
def test_rows_come_back_by_row_group(where, tmp_path):
    path = storage.join(str(tmp_path) if where == "local" else f"memory://{tmp_path}", "a.parquet")
    shard, mean, logvar = write(path)
    assert (shard.row_groups, shard.rows) == ((100, 100, 50), 250)
    file = shards.open_shard(path)
    assert file.info == INFO
    groups = [shards.read_rows(file, group) for group in range(3)]
    assert [len(group) for group in groups] == [100, 100, 50]
    np.testing.assert_array_equal(np.concatenate([group.mean for group in groups]), mean)
    np.testing.assert_array_equal(np.concatenate([group.logvar for group in groups]), logvar)
    assert groups[2].row_id[0] == f"{200:016x}"
    assert groups[2].caption[0] == "caption 200"
    assert (groups[2].fps[0], groups[2].start_s[0]) == (25, 50)
    assert not groups[0].mean.flags.owndata  # a view of Arrow's buffer


def test_without_variance(tmp_path):
    path = str(tmp_path / "a.parquet")
    write(path, keep_variance=False)
    assert shards.read_rows(path, 0).logvar is None


def test_equal_rows_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write(str(tmp_path / f"{name}.parquet"))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_latents_are_stored_plain(tmp_path):
    _, mean, _ = write(str(tmp_path / "a.parquet"), rows=100)
    assert mean.tobytes() in (tmp_path / "a.parquet").read_bytes()


def test_listing_by_footers_and_by_index(tmp_path):
    folder = str(tmp_path)
    first, _, _ = write(storage.join(folder, "000000.parquet"), rows=150)
    second, _, _ = write(storage.join(folder, "000001.parquet"), rows=20)
    empty, _, _ = write(storage.join(folder, "000002.parquet"), rows=0)
    assert shards.list_shards(folder) == [first, second]
    write(storage.join(folder, "000003.parquet"), info=replace(INFO, data_hash="of earlier settings"))
    with pytest.raises(ValueError, match=r"000003\.parquet.*different settings"):
        shards.list_shards(folder)
    shards.write_index(folder, [first, second, empty])
    assert shards.list_shards(folder) == [first, second]


def test_a_digest_is_the_same_wherever_the_shards_lie_and_tells_others_apart(tmp_path):
    here, there = ([write(f"{tmp_path}/{folder}/{name}.parquet", rows=9)[0] for name in "ab"] for folder in ("x", "y"))
    digest = shards.digest_shards(here)
    assert digest == shards.digest_shards(there) and len(digest) == 16
    more, _, _ = write(f"{tmp_path}/y/b.parquet", rows=10)
    assert digest not in (shards.digest_shards(here[:1]), shards.digest_shards([there[0], more]))


def test_a_folder_without_rows_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no latent shards"):
        shards.list_shards(str(tmp_path / "videos"))


def test_errors_name_the_file_and_what_is_wrong(tmp_path):
    path = str(tmp_path / "a.parquet")
    wrong = np.zeros((1, 4, 3, 2, 3), np.float16)
    with pytest.raises(ValueError, match=r"a\.parquet: mean is float16 \(1, 4, 3, 2, 3\).*\(1, 4, 3, 2, 2\)"):
        shards.write_shard(path, INFO, ["0"], [""], wrong, None, [0], [0])
    assert not storage.exists(path)

    (tmp_path / "a.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(ValueError, match=r"a\.parquet: not a Parquet file"):
        shards.open_shard(path)
    pq.write_table(pa.table({"row_id": ["0"]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: no metadata"):
        shards.open_shard(path)
    write(path, rows=1)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["mean"]), path)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'mean' is missing; columns are row_id, caption"):
        shards.read_rows(path, 0)
    other = shards.latent_schema(replace(INFO, shape=(4, 3, 2, 1)), keep_variance=True).metadata
    pq.write_table(table.replace_schema_metadata(other), path)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'mean' is fixed_size_binary\[96\], but shape"):
        shards.read_rows(path, 0)


@pytest.mark.parametrize("keep_variance", [True, False])
def test_a_shard_without_some_of_its_rows_is_as_if_it_had_been_written_so(tmp_path, keep_variance):
    path, expected = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    _, mean, logvar = write(path, keep_variance=keep_variance)
    unwanted = {f"{row:016x}" for row in range(1, 250, 2)} | {f"{row:016x}" for row in range(100, 200)}
    kept = [row for row in range(250) if f"{row:016x}" not in unwanted]
    shard, digest = shards.drop_rows(path, unwanted.__contains__)
    assert digest == shards.digest_rows(shards.read_shard(path))
    assert (shard.row_groups, shard.info) == ((75,), INFO)
    shards.write_shard(
        expected,
        INFO,
        [f"{row:016x}" for row in kept],
        [f"caption {row}" for row in kept],
        mean[kept],
        logvar[kept] if keep_variance else None,
        [25.0] * len(kept),
        [row / 4 for row in kept],
    )
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert shards.drop_rows(path, lambda _: True)[0].rows == 0
