"""Tar shards on the disk: random access by an index, and shards as the web has them."""

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import pytest

from pretrain.data import shards
from pretrain.data.formats import Source, load_records
from tests.pretrain.caption_files import (
    CAPTIONS,
    contents,
    image_bytes,
    write_images,
    write_shards,
    write_tar,
)
from virtex_d2.engine.errors import InputError


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def folder(tmp_path, images) -> Path:
    write_shards(tmp_path / "shards", images)
    return tmp_path / "shards"


def source(captions: object, index: Path, share: float = 0.5) -> Source:
    return Source("webdataset", str(captions), index_dir=str(index), max_skipped_share=share)


def make(folder: Path, members: list[tuple[str, bytes]], name: str = "0.tar") -> Path:
    folder.mkdir(exist_ok=True)
    return write_tar(folder / name, members)


WHOLE = [("1.jpg", b"one"), ("1.txt", b"A dog"), ("2.jpg", b"two"), ("2.txt", b"A cat")]


# Which shards


def test_a_pattern_a_list_a_folder_and_a_joined_row_name_the_same_shards(folder, tmp_path):
    names = [str(folder / "00000.tar"), str(folder / "00001.tar")]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    (folder / "00000_stats.json").write_text("{}")
    ways = [folder / "{00000..00001}.tar", tmp_path / "list.txt", folder, "::".join(names)]
    found = [contents(source(way, tmp_path)) for way in ways]
    assert [texts for _, texts in found[0]] == [tuple(texts) for texts in CAPTIONS.values()]
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize(
    ("pattern", "messages"),
    [
        ("{shards}/{{00000..00002}}.tar", ["00002.tar", "No such file"]),
        ("{shards}/0.tar", ["0.tar", "No such file"]),
        ("{images}", ["images", "found none"]),
        ("{shards}/00000.tar::{shards}/00000.tar", ["named twice"]),
        ("https://host/{{0..3}}.tar", ["'pipe:curl -s -f -L https://host/0.tar'"]),
        ("pipe:cat x.tar::{shards}/00000.tar", ["cannot be mixed"]),
        ("pipe:cat {shards}/00000.tar", ["pipes are for training alone"]),
        ("{shards}", ["shards"]),
    ],
)
def test_shards_that_are_not_there_are_refused(folder, images, tmp_path, pattern, messages):
    if pattern == "{shards}":
        (folder / "00000.tar").unlink()
        (folder / "00000.tar").mkdir()
    with pytest.raises(InputError) as caught:
        load_records(source(pattern.format(shards=folder, images=images), tmp_path))
    for message in messages:
        assert message in str(caught.value)


# The index


def test_records_name_shard_and_key_and_read_their_own_bytes(folder, images, tmp_path):
    for record, name in zip(load_records(source(folder, tmp_path)), CAPTIONS, strict=True):
        shard = folder / ("00000.tar" if name.startswith("a/") else "00001.tar")
        assert record.file_name == f"{shard}/{name}"
        assert record.image_id == name.rpartition(".")[0]
        assert image_bytes(record) == (images / name).read_bytes()


def test_the_index_is_made_once_and_again_when_a_shard_changes(folder, tmp_path, monkeypatch):
    reads = []
    members = shards.file_members
    monkeypatch.setattr(shards, "file_members", lambda s: reads.append(s) or members(s))
    first = contents(source(folder, tmp_path / "index"))
    assert len(reads) == 2
    assert contents(source(folder, tmp_path / "index")) == first
    assert len(reads) == 2
    (index,) = (tmp_path / "index").iterdir()
    assert index.name.startswith("shards-")

    os.utime(folder / "00001.tar", ns=(1, 1))
    assert contents(source(folder, tmp_path / "index")) == first
    assert len(reads) == 4
    write_tar(folder / "00001.tar", WHOLE)
    assert [texts for _, texts in contents(source(folder, tmp_path / "index"))][-2:] == [
        ("A dog",),
        ("A cat",),
    ]
    assert list((tmp_path / "index").iterdir()) == [index]


def test_a_damaged_index_is_made_again(folder, tmp_path):
    first = contents(source(folder, tmp_path / "index"))
    (index,) = (tmp_path / "index").iterdir()
    whole = index.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"x" * 1000):
        index.write_bytes(damaged)
        assert contents(source(folder, tmp_path / "index")) == first
        assert len(index.read_bytes()) == len(whole)


def test_indices_of_different_shards_lie_side_by_side(folder, tmp_path):
    both = contents(source(folder, tmp_path / "index"))
    one = contents(source(folder / "00000.tar", tmp_path / "index"))
    assert one == both[: len(one)]
    assert contents(source(folder, tmp_path / "index")) == both
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_long_names_links_and_metadata_do_not_disturb(tmp_path):
    long = "k" * 300
    path = make(tmp_path, [("__meta__.json", b"{}"), ("README", b"x"), (f"d/{long}.JPG", b"1")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo(f"d/{long}.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        text = tarfile.TarInfo(f"d/{long}.txt")
        text.size = 5
        tar.addfile(text, io.BytesIO(b"A dog"))
    (record,) = load_records(source(path, tmp_path, 0.0))
    assert record.file_name == f"{path}/d/{long}.jpg"
    assert (image_bytes(record), record.captions) == (b"1", ("A dog",))


# Samples that cannot be used


@pytest.mark.parametrize(
    ("members", "name", "reason"),
    [
        ([("3.jpg", b"x")], "3", "it has no text, only jpg"),
        ([("3.txt", b"x")], "3", "it has no image, only txt"),
        ([("3.jpg", b"x"), ("3.txt", b" \n\t\n")], "3", "its caption is blank"),
        ([("3.jpg", b"x"), ("3.txt", b"caf\xe9")], "3", "not UTF-8"),
        ([("3.jpg", b"x"), ("3.json", b"{")], "3", "not JSON"),
        ([("3.jpg", b"x"), ("3.json", b'{"caption": null}')], "3", "its caption is blank"),
        ([("3.jpg", b"x"), ("3.json", b"[1]")], "3", "no `caption`, no keys"),
        ([("3.jpg", b"x"), ("3.json", b'{"text": "A", "url": 1}')], "3", "only text, url"),
        ([("3.jpg", b"x"), ("3.json", b'{"caption": [5]}')], "3", "`caption` in its .json is 5"),
        ([("3.jpg", b"x"), ("3.txt", b"A"), ("3.JPG", b"y")], "3", "it has two members 3.JPG"),
        ([("3.txt", b"A"), ("3.jpg", b"x"), ("3.txt", b"B")], "3", "it has two members 3.txt"),
        ([("3.00.png", b"x"), ("3.00.txt", b"A")], "3.00", "first dot of 3.00.png parts"),
        ([("3.left.TXT", b"A")], "3.left", "first dot of 3.left.TXT parts"),
        ([("1.v2.jpeg", b"A")], "1.v2", "first dot of 1.v2.jpeg parts"),
    ],
)
def test_samples_that_cannot_be_used_are_skipped_named_and_counted(
    tmp_path, caplog, members, name, reason
):
    path = make(tmp_path / "s", WHOLE[:2] + members + WHOLE[2:])
    for _ in range(2):  # the second time from the index
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pretrain.data"):
            records = load_records(source(path, tmp_path, 0.34))
        assert [record.captions for record in records] == [("A dog",), ("A cat",)]
        (line,) = (record.getMessage() for record in caplog.records)
        assert line.startswith(f"{path}/{name} is skipped: ")
        assert reason in line
        with pytest.raises(InputError, match=r"1 of 3 samples.*DATA.MAX_SKIPPED_SHARE") as caught:
            load_records(source(path, tmp_path, 0.3))
        assert f"{path}/{name}: " in str(caught.value)
        assert reason in str(caught.value)


def test_the_key_of_captions_in_json_can_be_named_and_makes_another_index(tmp_path):
    content = json.dumps({"text": "A dog", "alt": ["B", "C"]}).encode()
    path = str(make(tmp_path / "s", [("1.jpg", b"x"), ("1.json", content)]))
    for key, captions in (("text", ("A dog",)), ("alt", ("B", "C")), ("text", ("A dog",))):
        given = Source("webdataset", path, index_dir=str(tmp_path), caption_key=key)
        (record,) = load_records(given)
        assert record.captions == captions
    with pytest.raises(InputError, match=r"no `caption`, only text, alt \(DATA.CAPTION_KEY"):
        load_records(source(path, tmp_path))


def test_members_that_do_not_lie_side_by_side_are_told_to(tmp_path):
    unsorted = [WHOLE[0], WHOLE[2], WHOLE[1], WHOLE[3]]
    path = make(tmp_path / "s", unsorted)
    with pytest.raises(InputError, match=r"4 of 4 samples.*tar --sort=name") as caught:
        load_records(source(path, tmp_path))
    assert "Are these uncompressed" not in str(caught.value)


def test_each_reason_is_named_before_a_second_of_the_same(tmp_path):
    members = [(f"{i}.jpg", b"x") for i in range(20)] + [("x.txt", b"A")]
    path = make(tmp_path / "s", members)
    with pytest.raises(InputError, match="the first: .*0: it has no text.*x: it has no image.*1: "):
        load_records(source(path, tmp_path))


def test_a_truncated_shard_keeps_what_is_whole(tmp_path, caplog):
    path = make(tmp_path / "s", WHOLE)
    whole = path.read_bytes()
    for length in (0, 100, 512, 700, 1024, 2048, 2100, 3000, 3500, 4096):
        caplog.clear()
        path.write_bytes(whole[:length])
        other = make(tmp_path / "s", WHOLE, "1.tar")
        with caplog.at_level(logging.WARNING, "pretrain.data"):
            records = load_records(source(tmp_path / "s", tmp_path))
        # a sample is whole when the next has begun, because its last member may be missing
        first = [record.captions for record in records if str(path) in record.file_name]
        assert first == ([("A dog",)] if length >= 3000 else []), length
        (line,) = (record.getMessage() for record in caplog.records)
        assert line.startswith(f"{path} is skipped: it is cut short"), length
        other.unlink()


def test_a_shard_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(InputError, match=r"a\.tar: it is cut short or not a plain tar"):
        load_records(source(tmp_path / "a.tar", tmp_path))


def test_a_packed_tar_is_no_plain_one(tmp_path):
    plain = make(tmp_path / "s", WHOLE)
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(plain, "1.jpg")
    with pytest.raises(InputError, match=r"b\.tar: .*not a plain tar"):
        load_records(source(tmp_path / "b.tar", tmp_path))


def test_an_index_holds_no_code_and_says_what_it_is(folder, tmp_path):
    load_records(source(folder, tmp_path / "index"))
    (index,) = (tmp_path / "index").iterdir()
    size = int.from_bytes(index.read_bytes()[:8], "little")
    header = json.loads(index.read_bytes()[8 : 8 + size])
    assert header["__metadata__"]["format"] == "pretrain.shard_index"
