import io
import json
import tarfile

import pytest

from pipelines.archives import is_archive, read_archive, read_members
from pipelines.config import StreamConfig
from pipelines.manifests import normalise, read_shard

JPEG = b"\xff\xd8\xff\xe0" + bytes(3000)
MP4 = b"\0\0\0\x18ftypmp42" + bytes(5000)


def tar(path, *members):
    """A tar of (name, bytes) and of ready TarInfos."""
    with tarfile.open(path, "w") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return str(path)


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def rows(path):
    return [row for batch in read_archive(str(path)) for row in batch.to_pylist()]


def ends(path, max_bytes=1_000_000):
    """(status, body) of each row of an archive."""
    return [(one.status, one.body) for one in read_members([row["url"] for row in rows(path)], max_bytes)]


def test_members_of_a_tar_are_read_back_with_what_is_known_of_them(tmp_path):
    known = {"url": "http://x/1", "caption": "from json", "width": 640, "height": 480, "duration": 7.5}
    path = tar(
        tmp_path / "a.tar",
        ("d.1/0.jpg", JPEG),
        ("d.1/0.json", json.dumps(known).encode()),
        ("d.1/0.txt", "ein Käfer".encode()),
        ("1.json", json.dumps(known).encode()),
        ("1.MP4", MP4),
        ("2.jpg", JPEG[:-1]),
    )
    assert [(row["caption"], row["width"], row["duration_s"]) for row in rows(path)] == [
        ("ein Käfer", 640, 7.5),
        ("from json", 640, 7.5),
        ("", None, None),
    ]
    assert ends(path) == [("ok", JPEG), ("ok", MP4), ("ok", JPEG[:-1])]


@pytest.mark.parametrize("what", ["folder", "folder/*.tar", "memory://tars/*.tar", "memory://tars"])
def test_folders_and_patterns_of_tars_are_one_manifest(tmp_path, what):
    import fsspec

    (tmp_path / "folder").mkdir()
    for index in range(3):
        path = tar(tmp_path / f"folder/{index}.tar", (f"{index}.jpg", JPEG + bytes([index])))
        fsspec.filesystem("memory").put_file(path, f"/tars/{index}.tar")
    where = what if "://" in what else str(tmp_path / what)
    assert is_archive(where)
    assert ends(where) == [("ok", JPEG + bytes([index])) for index in range(3)]


def test_a_folder_of_media_has_its_captions_beside(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a#size=1.jpg").write_bytes(JPEG)
    (tmp_path / "a#size=1.txt").write_text("one")
    (tmp_path / "sub/b.mp4").write_bytes(MP4)
    (tmp_path / "sub/b.json").write_text('{"caption": "two", "duration": 3}')
    (tmp_path / "notes.md").write_text("no media")
    assert [(row["caption"], row["duration_s"]) for row in rows(tmp_path)] == [("one", None), ("two", 3.0)]
    assert ends(tmp_path) == [("ok", JPEG), ("ok", MP4)]


@pytest.mark.parametrize(
    ("members", "status"),
    [
        ([special("1.jpg", tarfile.SYMTYPE, "/etc/passwd")], "forbidden_address"),
        ([special("1.jpg", tarfile.LNKTYPE, "0.jpg")], "forbidden_address"),
        ([special("1.jpg", tarfile.FIFOTYPE)], "not_media"),
        ([special("1.jpg", tarfile.CHRTYPE)], "not_media"),
        ([special("1.jpg", tarfile.GNUTYPE_SPARSE)], "not_media"),
        ([("1.jpg.gz", JPEG)], "not_media"),
        ([("1.txt", b"a caption alone")], "not_media"),
        ([("1.jpg", b"<!doctype html>")], "not_media"),
        ([("1.jpg", b"")], "empty"),
        ([("1.jpg", JPEG * 20)], "too_large"),
        ([(f"1.{index}", b"") for index in range(70)] + [("1.jpg", JPEG)], "corrupt"),
        ([("../../1.jpg", JPEG)], "ok"),  # a name like any other: nothing is extracted
        ([("1.jpg", JPEG), ("1.json", b"[" * 100_000)], "ok"),
        ([("1.jpg", JPEG), ("1.json", b'{"width": 1e999, "height": "x", "caption": 3}')], "ok"),
        ([("1.jpg", JPEG), ("1.txt", bytes(2_000_000))], "ok"),
    ],
)
def test_hostile_members_end_with_a_reason_and_their_neighbours_are_untouched(tmp_path, members, status):
    path = tar(tmp_path / "a.tar", ("0.jpg", JPEG), *members, ("2.jpg", JPEG))
    found = [one for one, _ in ends(path, max_bytes=50_000)]
    assert (found[0], found[1], found[-1], len(found)) == ("ok", status, "ok", 3)


def test_what_links_lead_to_is_never_read(tmp_path):
    path = tar(tmp_path / "a.tar", special("1.jpg", tarfile.SYMTYPE, str(tmp_path / "secret.jpg")))
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    assert ends(path) == [("forbidden_address", b"")]


def longname(size):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT)


def negative():
    info = tarfile.TarInfo("1.txt")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base 256: -1024
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:512]) + 8 * 32)
    return bytes(header)


@pytest.mark.parametrize(
    "tail",
    [
        b"no header" * 100,
        longname(8 << 30),
        longname(0) * 5000,  # each is read within the one before
        negative(),
    ],
)
def test_a_tar_that_breaks_off_keeps_what_came_before_and_says_where(tmp_path, tail):
    head = (tar(tmp_path / "a.tar", ("0.jpg", JPEG)), (tmp_path / "a.tar").read_bytes())[1]
    (tmp_path / "a.tar").write_bytes(head[: 512 + 3072] + tail)
    (first, last) = read_members([row["url"] for row in rows(tmp_path / "a.tar")], 50_000)
    assert (first.status, first.body, last.status) == ("ok", JPEG, "corrupt")
    assert "cannot be read after byte 0" in last.message


def test_every_cut_of_a_tar_gives_its_samples_or_a_reason(tmp_path):
    whole = (tar(tmp_path / "a.tar", ("0.jpg", JPEG), ("1.jpg", JPEG)), (tmp_path / "a.tar").read_bytes())[1]
    for length in range(0, 8000, 97):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        found = ends(tmp_path / "cut.tar")
        assert found and {status for status, _ in found} <= {"ok", "corrupt"}
        assert [body for status, body in found if status == "ok"] == [JPEG] * ((length >= 3516) + (length >= 7100))


def test_a_tar_that_shrank_or_vanished_since_gives_reasons(tmp_path):
    urls = [row["url"] for row in rows(tar(tmp_path / "a.tar", ("0.jpg", JPEG), ("1.jpg", JPEG)))]
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:4500])
    assert [one.status for one in read_members(urls, 50_000)] == ["ok", "corrupt"]
    (tmp_path / "a.tar").unlink()
    assert {one.status for one in read_members(urls, 50_000)} == {"connection"}


def test_an_archive_becomes_a_manifest_and_is_read_anew_when_it_changes(tmp_path):
    source, path = tar(tmp_path / "a.tar", ("0.jpg", JPEG), ("1.txt", b"alone")), str(tmp_path / "manifest")
    first = normalise(StreamConfig(source, shard_rows=10), path)
    assert [row["url"] for row in read_shard(path, 0)] == [row["url"] for row in rows(source)]
    tar(tmp_path / "a.tar", ("0.jpg", JPEG), ("0.txt", b"now with a caption"), ("1.jpg", JPEG))
    second = normalise(StreamConfig(source, shard_rows=10), path)
    assert (first.rows, second.rows) == (2, 2)
    assert first.shards != second.shards
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        normalise(StreamConfig(str(tmp_path / "none.tar")), path)
    assert [row["url"] for row in read_shard(path, 0)] == [row["url"] for row in rows(source)]  # is still there
    with pytest.raises(ValueError, match=r"a\.tar\.gz: .*decompress"):
        normalise(StreamConfig(str(tmp_path / "a.tar.gz")), path)
