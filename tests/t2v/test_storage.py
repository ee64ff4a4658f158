import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from t2v import storage


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}{tmp_path}/run"
    return str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run"


def test_a_file_appears_whole_or_not_at_all(folder):
    path = storage.join(folder, "a", "b.json")
    with pytest.raises(RuntimeError), storage.open_atomic(path) as file:
        file.write(b"half of it")
        raise RuntimeError
    assert not storage.exists(path)
    storage.write_json(path, {"n": 1})
    with pytest.raises(RuntimeError), storage.open_atomic(path) as file:
        file.write(b"half of it")
        raise RuntimeError
    assert storage.read_json(path) == {"n": 1}
    assert storage.listing(storage.join(folder, "a")) == ["b.json"]


def test_what_kills_have_left_goes_after_a_day(tmp_path):
    for name, age_s in ((".old.json.0123.part", 90_000), (".new.json.0123.part", 0), ("old.part", 90_000)):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"half")
        os.utime(tmp_path / "a" / name, (time.time() - age_s,) * 2)
    for name, age_s in ((".model.0123.part", 90_000), (".model.4567.part", 0)):
        (tmp_path / name / "new").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    storage.sweep(str(tmp_path))
    left = [".model.4567.part", ".new.json.0123.part", "old.part"]
    assert sorted(path.name for path in tmp_path.rglob("*.part")) == left
    storage.sweep(str(tmp_path / "nowhere"))


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "value.json")
    storage.write_json(path, 1)
    script = (
        "import os, signal, sys; from t2v import storage\n"
        "with storage.open_atomic(sys.argv[1]) as file:\n"
        "    file.write(b'2'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert storage.read_json(path) == 1
    assert storage.listing(str(tmp_path)) == ["value.json"]  # what the writer left is not taken for a file


def test_listing_and_reading_many(folder):
    assert storage.listing(folder) == []
    for name in ("b.json", "a.json", "c.txt"):
        storage.write_json(storage.join(folder, name), name)
    assert storage.listing(folder, ".json") == ["a.json", "b.json"]
    paths = [storage.join(folder, name) for name in ("b.json", "a.json")]
    assert storage.read_many(paths) == [b'"b.json"\n', b'"a.json"\n']
    assert storage.read_many(paths[:1]) == [b'"b.json"\n']
    assert storage.read_many([]) == []


def test_what_other_processes_write_and_remove_is_seen(bucket):
    """And what marks a folder on S3 is not taken for a file in it."""
    folder, client = f"{bucket}/seen", fsspec.filesystem("s3", use_listings_cache=False)
    storage.write_json(f"{folder}/train/a.json", 1)
    assert storage.listing(f"{folder}/train") == ["a.json"] and storage.folders(folder) == ["train"]
    client.pipe_file(f"{folder}/train/", b"")
    client.pipe_file(f"{folder}/train/b.json", b"2")
    assert storage.exists(f"{folder}/train/b.json") and storage.listing(f"{folder}/train") == ["a.json", "b.json"]
    assert [file.path for files in storage.walk(folder) for file in files] == [
        f"{folder}/train/a.json", f"{folder}/train/b.json"
    ]  # fmt: skip
    storage.copy_folder(f"{folder}/train", f"{folder}/copy")
    storage.remove_folder(f"{folder}/train")
    assert storage.folders(folder) == ["copy"] and storage.read_json(f"{folder}/copy/b.json") == 2


def test_fingerprint_changes_with_the_file_and_digest_with_its_content(folder):
    path = storage.join(folder, "a.json")
    storage.write_json(path, 1)
    fingerprint, digest = storage.fingerprint(path), storage.digest(path)
    assert (storage.fingerprint(path), storage.digest(path)) == (fingerprint, digest)
    storage.write_json(path, 22)
    assert storage.fingerprint(path) != fingerprint
    assert storage.digest(path) != digest
    storage.write_json(path, 1)
    assert storage.digest(path) == digest


def test_a_broken_json_file_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        storage.read_json(str(tmp_path / "broken.json"))


def test_of_many_who_write_a_file_once_all_read_the_first(folder):
    path = storage.join(folder, "a", "b.json")
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: storage.write_json_once(path, {"n": number}), range(32)))
    assert all(value == found[0] for value in found)
    assert storage.read_json(path) == found[0]
    assert storage.listing(storage.join(folder, "a")) == ["b.json"]
